package toolstack

import (
	"slices"
	"time"

	"redoubt.dev/redoubt/services/protocol"
)

// moment is an event as it came here: its time is whoever's word it is.
type moment struct {
	protocol.Event
	seq uint64
}

// maxTimeline bounds the events kept of one start.
const maxTimeline = 256

// event records one moment of a guest and tells those who follow.
func (t *Toolstack) event(e protocol.Event) { t.tell(e, nil) }

// tell is event of what also changes the guest, if change is not nil: who hears of it finds the guest so, and who finds it so
// finds the event in its timeline. g.mu is held over the change.
func (t *Toolstack) tell(e protocol.Event, change func(*guest)) {
	t.mu.Lock()
	g := t.byUUID[e.UUID]
	t.mu.Unlock()
	if g == nil {
		return
	}
	g.mu.Lock()
	if g.gone || (e.Number > 0 && e.Number <= g.told) { // its record is not written anew; its adoption told it
		g.mu.Unlock()
		return
	}
	g.told = max(g.told, e.Number)
	switch e.Kind {
	case protocol.EventVTPMReady:
		switch g.state {
		case Starting:
			g.set(Running, "")
		case Stopping:
			if g.before != "" {
				g.before = Running
			}
		}
	case protocol.EventKernelStarted:
		g.starts++
	case protocol.EventVTPMStarted, protocol.EventManufactured:
		if e.Instance != g.saved.Instance || (e.EKSHA256 != "" && e.EKSHA256 != g.saved.EKSHA256) {
			g.saved.Instance = e.Instance
			if e.EKSHA256 != "" {
				g.saved.EKSHA256 = e.EKSHA256
			}
			if err := t.save(g.saved); err != nil {
				t.log.Warn("guest record", "guest", g.saved.Spec.Name, "err", err)
			}
		}
	}
	if change != nil {
		change(g)
	}
	m := moment{e, t.seq.Add(1)}
	if len(g.timeline) < maxTimeline {
		g.timeline = append(g.timeline, m)
	}
	g.mu.Unlock()
	t.events.send(m)
}

// ended records that a guest is down.
func (t *Toolstack) ended(e protocol.Ended) {
	t.mu.Lock()
	g := t.byUUID[e.UUID]
	t.mu.Unlock()
	if g == nil {
		return
	}
	g.console.detach()
	g.channel.detach()
	state := Stopped
	if e.Outcome == protocol.Crashed {
		state = Failed
	}
	end := protocol.Event{UUID: e.UUID, Kind: protocol.EventEnded, Text: string(e.Outcome) + ": " + e.Reason, Time: time.Now()}
	t.tell(end, func(g *guest) { g.set(state, e.Reason) })
}

// history is what the timelines hold of one guest or all, in order of time.
func (t *Toolstack) history(name string) []moment {
	var all []moment
	for _, g := range t.list() {
		if name != "" && g.saved.Spec.Name != name {
			continue
		}
		g.mu.Lock()
		all = append(all, g.timeline...)
		g.mu.Unlock()
	}
	slices.SortStableFunc(all, func(a, b moment) int { return a.Time.Compare(b.Time) })
	return all
}
