package gate

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
)

// TestTranscripts plays testdata/*.txt: a line an event, the actions below. Renew with -rewrite.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		var g Gate
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			e := Event{}
			switch d.Cmd {
			case "instance":
				e.Kind = Instance
			case "connected":
				e.Kind = FrontConnected
			case "ready":
				e.Kind = ReadyNode
			case "ready-gone":
				e.Kind = ReadyGone
			case "engine-up":
				e.Kind = EngineUp
			case "failed":
				e.Kind, e.Reason = Failed, d.CmdArgs[0].Key
			case "deadline":
				e.Kind = Deadline
			case "front-gone":
				e.Kind = FrontGone
			default:
				d.Fatalf(t, "no such event")
			}
			if e.Kind != Failed && len(d.CmdArgs) == 1 {
				n, err := strconv.Atoi(d.CmdArgs[0].Key)
				if err != nil {
					d.Fatalf(t, "%v", err)
				}
				e.Number = n
			}
			return describe(g.Step(e), &g)
		})
	})
}

func describe(actions []Action, g *Gate) string {
	var b strings.Builder
	for _, a := range actions {
		switch a.Kind {
		case WatchReady:
			fmt.Fprintf(&b, "watch /vTPMready%d\n", a.Number)
		case SetState:
			fmt.Fprintf(&b, "state %v\n", a.State)
		case Wake:
			b.WriteString("WAKE\n")
		case Fail:
			fmt.Fprintf(&b, "FAIL %s\n", a.Reason)
		}
	}
	if m := g.Missing(); len(m) > 0 {
		fmt.Fprintf(&b, "(waits for %s)\n", strings.Join(m, ", "))
	}
	if b.Len() == 0 {
		return "(nothing)\n"
	}
	return b.String()
}

// orders calls visit with every order of events.
func orders(events []Event, visit func([]Event)) {
	if len(events) <= 1 {
		visit(events)
		return
	}
	for i := range events {
		rest := append(append([]Event(nil), events[:i]...), events[i+1:]...)
		orders(rest, func(o []Event) { visit(append([]Event{events[i]}, o...)) })
	}
}

func run(events []Event) (wakes, fails, at int) {
	var g Gate
	for i, e := range events {
		for _, a := range g.Step(e) {
			switch a.Kind {
			case Wake:
				wakes, at = wakes+1, i
			case Fail:
				fails, at = fails+1, i
			}
		}
	}
	return wakes, fails, at
}

const n = 7

var (
	needed = []Event{{Kind: FrontConnected}, {Kind: Instance, Number: n}, {Kind: ReadyNode, Number: n}, {Kind: EngineUp, Number: n}}
	ends   = []Event{{Kind: Failed, Reason: "x"}, {Kind: Deadline}, {Kind: FrontGone}}
	noise  = []Event{
		{Kind: ReadyNode, Number: n + 1},
		{Kind: EngineUp, Number: n + 1},
		{Kind: ReadyGone, Number: n + 1},
		{Kind: FrontConnected},
		{Kind: Instance, Number: n},
		{Kind: ReadyNode, Number: n},
		{Kind: EngineUp, Number: n},
	}
)

// TestEveryInterleaving: over every order of the needed events, with up to three others of
// ends and noise mixed in, the gate yields one wake or one failure, the wake at the
// earliest moment all four facts hold, and a failure only where an end came before that.
func TestEveryInterleaving(t *testing.T) {
	extras := append(append([]Event(nil), ends...), noise...)
	sets := [][]Event{{}}
	for i := range extras {
		sets = append(sets, []Event{extras[i]})
		for j := i; j < len(extras); j++ {
			sets = append(sets, []Event{extras[i], extras[j]})
			for k := j; k < len(extras); k++ {
				sets = append(sets, []Event{extras[i], extras[j], extras[k]})
			}
		}
	}
	count := 0
	for _, extra := range sets {
		orders(append(append([]Event(nil), needed...), extra...), func(o []Event) {
			count++
			wantWake, wantAt := expected(o)
			wakes, fails, at := run(o)
			if wakes+fails != 1 || (wakes == 1) != wantWake || at != wantAt {
				t.Fatalf("order %v: %d wakes, %d fails at %d; want wake %v at %d", o, wakes, fails, at, wantWake, wantAt)
			}
		})
	}
	t.Logf("%d interleavings", count)
}

// expected says independently of the machine, by looking at prefixes only, what must happen.
func expected(o []Event) (wake bool, at int) {
	for i, e := range o {
		if e.Kind == Failed || e.Kind == Deadline || e.Kind == FrontGone {
			return false, i
		}
		all := true
		for _, want := range needed {
			found := false
			for _, p := range o[:i+1] {
				found = found || p == want
			}
			all = all && found
		}
		if all {
			return true, i
		}
	}
	return false, -1
}

// TestMissingFactNeverOpens: without any one of the four facts there is no wake in any
// order, whatever the store shows; and the deadline then fails it.
func TestMissingFactNeverOpens(t *testing.T) {
	for drop := range needed {
		rest := append(append([]Event(nil), needed[:drop]...), needed[drop+1:]...)
		for _, forged := range [][]Event{
			{},
			{{Kind: ReadyNode, Number: n + 1}, {Kind: EngineUp, Number: n + 1}},
			{{Kind: ReadyNode, Number: 0}, {Kind: EngineUp, Number: 0}},
			{{Kind: ReadyNode, Number: n + 1}, {Kind: ReadyNode, Number: 0}, {Kind: ReadyNode, Number: -n}},
		} {
			orders(append(append([]Event(nil), rest...), forged...), func(o []Event) {
				if wakes, fails, _ := run(o); wakes+fails != 0 {
					t.Fatalf("without %v, order %v: %d wakes, %d fails", needed[drop], o, wakes, fails)
				}
				if wakes, fails, _ := run(append(o, Event{Kind: Deadline})); wakes != 0 || fails != 1 {
					t.Fatalf("without %v, order %v, deadline: %d wakes, %d fails", needed[drop], o, wakes, fails)
				}
			})
		}
	}
}

// TestStaleReadyNode: a ready node that is gone again before the rest holds opens nothing
// until it comes back.
func TestStaleReadyNode(t *testing.T) {
	var g Gate
	step := func(e Event) int {
		c := 0
		for _, a := range g.Step(e) {
			if a.Kind == Wake {
				c++
			}
		}
		return c
	}
	wakes := step(Event{Kind: ReadyNode, Number: n}) + step(Event{Kind: Instance, Number: n}) +
		step(Event{Kind: ReadyGone, Number: n}) + step(Event{Kind: EngineUp, Number: n}) + step(Event{Kind: FrontConnected})
	if wakes != 0 {
		t.Fatalf("woken by a node that was removed")
	}
	if step(Event{Kind: ReadyNode, Number: n}) != 1 {
		t.Fatalf("not woken when the node came back")
	}
}
