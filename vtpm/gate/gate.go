// Package gate decides, for one guest, when its vTPM front end may go on: the event-driven
// half of the adaptive start of a trusted guest (CN101539864A, steps 2–10).
//
// The guest's kernel and its vTPM start at the same time. Whichever comes first, the guest
// waits at its first TPM command until the vTPM works, and exactly once it is woken, or
// exactly once it is failed. The machine here is pure: events in, actions out, no I/O and no
// clock. Package backend feeds it from the store's watches and from the vTPM manager, and
// carries its actions out.
//
// Four facts must come together, in any order: the front end is Connected, the domain's
// instance number is known, /vTPMready<number> exists, and the engine of that very instance
// has itself answered INIT. The last makes the store alone insufficient: a ready node that is
// stale, forged or of another instance opens nothing.
package gate

import "fmt"

// State is a XenBus state (xen/include/public/io/xenbus.h), extended by VTPMReady.
type State int

const (
	Unknown      State = 0
	Initialising State = 1
	InitWait     State = 2
	Initialised  State = 3
	Connected    State = 4
	Closing      State = 5
	Closed       State = 6
	VTPMReady    State = 9 // beyond XenBus' own: the vTPM works and the front end is woken
)

func (s State) String() string {
	switch s {
	case Unknown:
		return "Unknown"
	case Initialising:
		return "Initialising"
	case InitWait:
		return "InitWait"
	case Initialised:
		return "Initialised"
	case Connected:
		return "Connected"
	case Closing:
		return "Closing"
	case Closed:
		return "Closed"
	case VTPMReady:
		return "VTPMReady"
	}
	return fmt.Sprintf("State(%d)", int(s))
}

// EventKind says what happened.
type EventKind int

const (
	FrontConnected EventKind = iota + 1 // the front end's state node became Connected (step 8)
	Instance                            // the domain's instance number was written (step 4)
	ReadyNode                           // /vTPMready<number> exists (step 5)
	ReadyGone                           // /vTPMready<number> was removed
	EngineUp                            // the manager holds the engine's INIT reply for number
	Failed                              // the vTPM cannot be had; Reason says why
	Deadline                            // the longest wait an operator allows is over
	FrontGone                           // the emulator is gone: nobody is left to wake
)

// An Event is one thing that happened. Number belongs to Instance, ReadyNode, ReadyGone and
// EngineUp; Reason to Failed.
type Event struct {
	Kind   EventKind
	Number int
	Reason string
}

// ActionKind says what to do.
type ActionKind int

const (
	WatchReady ActionKind = iota + 1 // watch /vTPMready<Number>; the watch fires once when set
	SetState                         // write the back end's state node
	Wake                             // serve the front end's commands (step 10)
	Fail                             // fail the guest closed; Reason says why
)

// An Action is one thing to do, in the order given.
type Action struct {
	Kind   ActionKind
	Number int
	State  State
	Reason string
}

// Gate is the machine of one guest's start. The zero value is a gate that waits for
// everything. It is not safe for concurrent use.
type Gate struct {
	number    int // the instance number, 0 while unknown
	connected bool
	ready     map[int]bool // numbers whose ready node exists
	engine    map[int]bool // numbers whose engine answered
	decided   bool         // a Wake or a Fail was returned
}

// Decided reports whether the gate has opened or failed. Nothing changes it afterwards.
func (g *Gate) Decided() bool { return g.decided }

// Missing names what a gate still waits for, for an operator's eyes.
func (g *Gate) Missing() []string {
	var m []string
	if g.decided {
		return nil
	}
	if g.number == 0 {
		m = append(m, "instance number")
	} else {
		if !g.engine[g.number] {
			m = append(m, "engine")
		}
		if !g.ready[g.number] {
			m = append(m, fmt.Sprintf("/vTPMready%d", g.number))
		}
	}
	if !g.connected {
		m = append(m, "front end")
	}
	return m
}

// Step takes one event and returns what follows from it. Over the whole life of a gate at
// most one Wake or one Fail is returned, never both.
func (g *Gate) Step(e Event) []Action {
	if g.decided {
		return nil
	}
	var out []Action
	switch e.Kind {
	case FrontConnected:
		if !g.connected {
			g.connected = true
			out = append(out, Action{Kind: SetState, State: Connected})
		}
	case Instance:
		switch {
		case e.Number <= 0:
			return g.fail(fmt.Sprintf("instance number %d is not positive", e.Number))
		case g.number == 0:
			g.number = e.Number
			out = append(out, Action{Kind: WatchReady, Number: e.Number})
		case g.number != e.Number:
			return g.fail(fmt.Sprintf("instance number changed from %d to %d", g.number, e.Number))
		}
	case ReadyNode:
		set(&g.ready, e.Number, true)
	case ReadyGone:
		set(&g.ready, e.Number, false)
	case EngineUp:
		set(&g.engine, e.Number, true)
	case Failed:
		return g.fail(e.Reason)
	case Deadline:
		return g.fail(fmt.Sprintf("not ready in time, still missing: %v", g.Missing()))
	case FrontGone:
		return g.fail("the emulator ended before the vTPM was ready")
	}
	if g.connected && g.number != 0 && g.ready[g.number] && g.engine[g.number] {
		g.decided = true
		out = append(out, Action{Kind: SetState, State: VTPMReady}, Action{Kind: Wake})
	}
	return out
}

func (g *Gate) fail(reason string) []Action {
	g.decided = true
	return []Action{{Kind: SetState, State: Closing}, {Kind: Fail, Reason: reason}}
}

func set(m *map[int]bool, n int, v bool) {
	if *m == nil {
		*m = map[int]bool{}
	}
	(*m)[n] = v
}
