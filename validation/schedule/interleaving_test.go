package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// A watcher holds a schedule to what the package promises, by its events and actions alone.
type watcher struct {
	config  Config
	guest   bool
	paused  bool
	now     time.Duration
	alarm   time.Duration
	trap    uint64 // that is owed an answer
	pending uint64 // a snapshot that is
	orphan  bool   // and it is of a guest that is gone
	live    uint64 // the snapshot that is there
	last    uint64 // the last one that was asked for
	scan    uint64 // that is owed an answer
	second  bool   // it confirms
	found   int    // what the last confirming scan confirmed, -1 for none
	commit  bool   // a commit is awaited
	held    bool
	full    bool // the next scan must be
	was     bool // the last one was
	ids     uint64
	asked   []asker
}

// An asker is who waits for a report.
type asker struct {
	id    uint64
	fresh bool // a snapshot was taken since it asked
}

func watch(c Config) *watcher { return &watcher{config: c, full: true, found: -1} }

func (w *watcher) clone() *watcher {
	c := *w
	c.asked = slices.Clone(w.asked)
	return &c
}

// before takes what an event says.
func (w *watcher) before(e Event) {
	w.now = max(w.now, e.At)
	switch e.Kind {
	case GuestStarted:
		w.end()
		w.guest, w.paused, w.full = true, false, !e.Kept
	case GuestGone:
		w.end()
	case Paused:
		w.paused = w.guest
	case Resumed:
		w.paused = false
	case Clock:
		w.alarm = 0
	case Asked:
		w.asked = append(w.asked, asker{id: e.ID})
	case MapLost:
		w.full = true
	case Safe:
		if e.Run == w.trap && w.trap != 0 {
			w.held, w.trap = true, 0
		}
	case NotSafe:
		if e.Run == w.trap {
			w.trap = 0
		}
	case SnapshotTaken:
		if e.Run == w.pending && e.Run != 0 {
			w.pending, w.live = 0, e.Run
			if !w.orphan {
				w.was, w.full = w.full, false
				for i := range w.asked {
					w.asked[i].fresh = true
				}
			}
		}
	case SnapshotLost:
		if e.Run == w.pending && e.Run != 0 {
			w.pending = 0
			w.full = w.full || !e.Kept && !w.orphan
		} else if e.Run == w.scan && e.Run != 0 {
			w.scan = 0
			w.full = w.full || w.was || !e.Kept
		}
	case ScanDone:
		if e.Run == w.scan && e.Run != 0 {
			w.scan = 0
			if w.second {
				w.found = e.Findings
			}
		}
	case ScanFailed:
		if e.Run == w.scan && e.Run != 0 {
			w.scan = 0
			w.full = w.full || w.was || !e.Kept
		}
	case JournalCommitted:
		w.commit = false
	}
}

// end is a guest's: nothing of it is held or owed any more but a snapshot that is being taken.
func (w *watcher) end() {
	w.orphan = w.pending != 0
	w.guest, w.paused, w.held, w.trap, w.scan, w.commit, w.full = false, false, false, 0, 0, false, true
}

// after takes the actions, and says what is wrong with them.
func (w *watcher) after(e Event, actions []Action) error {
	for _, a := range actions {
		switch a.Kind {
		case Trap:
			if w.trap != 0 || w.pending != 0 || w.live != 0 || !w.guest || w.paused || w.held {
				return fmt.Errorf("a trap at a wrong time: %+v", *w)
			}
			w.trap = a.Run
		case Snapshot:
			if w.pending != 0 || w.live != 0 || a.Run <= w.last {
				return fmt.Errorf("a second snapshot: %+v", *w)
			}
			if a.Unsafe {
				if !w.config.Force {
					return fmt.Errorf("unsafe")
				}
				w.held = true
			}
			if !w.held {
				return fmt.Errorf("a snapshot of what runs")
			}
			w.pending, w.last, w.orphan = a.Run, a.Run, false
		case Resume:
			if !w.held {
				return fmt.Errorf("nothing is held")
			}
			w.held = false
		case Scan, ConfirmScan:
			if w.live != a.Run || w.scan != 0 || a.Full != w.was {
				return fmt.Errorf("a scan of no snapshot, or not in full: %+v", *w)
			}
			w.scan, w.second = a.Run, a.Kind == ConfirmScan
			if w.held && (!w.config.Hold || w.second) {
				return fmt.Errorf("held over a scan")
			}
		case Release:
			if w.live != a.Run {
				return fmt.Errorf("release of %d, which is none", a.Run)
			}
			if w.scan == a.Run {
				w.scan = 0
			}
			w.live = 0
		case AwaitCommit:
			w.commit = true
		case SetAlarm:
			if a.At != 0 && a.At <= w.now {
				return fmt.Errorf("an alarm for what is past: %v at %v", a.At, w.now)
			}
			w.alarm = a.At
		case Report:
			if (a.Outcome == Deviates) != (w.found > 0) || a.Outcome == Deviates && a.Findings != w.found {
				return fmt.Errorf("%v with %d confirmed", a.Outcome, w.found)
			}
			w.found = -1
			for _, id := range a.IDs {
				i := slices.IndexFunc(w.asked, func(a asker) bool { return a.id == id })
				if i < 0 {
					return fmt.Errorf("a second report to %d, or one that was not asked for", id)
				}
				if !w.asked[i].fresh && (a.Outcome == Clean || a.Outcome == Deviates || a.Outcome == Withdrawn || a.Outcome == Unconfirmed) {
					return fmt.Errorf("%d is told of a snapshot from before it asked", id)
				}
				w.asked = slices.Delete(w.asked, i, i+1)
			}
		}
	}
	if w.scan == 0 && w.found == 0 {
		w.found = -1
	}
	if w.held && w.pending == 0 && w.scan == 0 {
		return fmt.Errorf("held, and nothing goes on")
	}
	if w.live != 0 && w.scan == 0 {
		return fmt.Errorf("a snapshot that nobody reads")
	}
	if w.guest && !w.paused && len(w.asked) > 0 && w.trap == 0 && w.pending == 0 && w.scan == 0 && w.alarm == 0 {
		return fmt.Errorf("somebody waits, and nothing goes on")
	}
	if !w.guest && len(w.asked) > 0 {
		return fmt.Errorf("somebody waits for a guest that is gone")
	}
	return nil
}

// events are all that may happen next: what is owed, and what is not.
func (w *watcher) events() []Event {
	owed := max(w.trap, w.pending, w.scan)
	w.ids++
	all := []Event{
		{Kind: GuestStarted},
		{Kind: GuestStarted, Kept: true},
		{Kind: GuestGone},
		{Kind: Paused},
		{Kind: Resumed},
		{Kind: Clock, At: max(w.now, w.alarm)},
		{Kind: Counted, Count: 10 * w.ids},
		{Kind: Asked, ID: w.ids},
		{Kind: Safe, Run: owed},
		{Kind: NotSafe, Run: owed, Reason: "x"},
		{Kind: SnapshotTaken, Run: owed},
		{Kind: SnapshotLost, Run: owed},
		{Kind: SnapshotLost, Run: owed, Kept: true},
		{Kind: ScanDone, Run: owed},
		{Kind: ScanDone, Run: owed, Findings: 2},
		{Kind: ScanDone, Run: owed, Fresh: 1},
		{Kind: ScanFailed, Run: owed, Kept: true},
		{Kind: ScanFailed, Run: owed},
		{Kind: JournalCommitted},
		{Kind: MapLost},
	}
	if w.pending != 0 && w.pending != owed { // of a guest that is gone
		all = append(all, Event{Kind: SnapshotTaken, Run: w.pending}, Event{Kind: SnapshotLost, Run: w.pending})
	}
	return all
}

// A play is a schedule that is watched.
type play struct {
	schedule *Schedule
	watcher  *watcher
	log      []Event
}

func newPlay(c Config) *play { return &play{schedule: New(c), watcher: watch(c)} }

func (p *play) clone() *play {
	s := *p.schedule
	s.asked, s.run.ids = slices.Clone(s.asked), slices.Clone(s.run.ids)
	return &play{&s, p.watcher.clone(), slices.Clone(p.log)}
}

func (p *play) step(t *testing.T, e Event) []Action {
	t.Helper()
	e.At = max(e.At, p.watcher.now)
	p.log = append(p.log, e)
	p.watcher.before(e)
	actions := p.schedule.Step(e)
	if err := p.watcher.after(e, actions); err != nil {
		t.Fatalf("%v\n%+v\n%s", err, p.watcher.config, p.story())
	}
	return actions
}

// story is what happened, for people.
func (p *play) story() string {
	s := New(p.watcher.config)
	var b strings.Builder
	for _, e := range p.log {
		fmt.Fprintf(&b, "%+v\n%s", e, describe(s.Step(e)))
	}
	return b.String()
}

// end ends the guest, and has come what is still owed: nothing may be left.
func (p *play) end(t *testing.T) {
	t.Helper()
	w := p.watcher
	pending := w.pending
	p.step(t, Event{Kind: GuestGone})
	if pending != 0 {
		p.step(t, Event{Kind: SnapshotTaken, Run: pending})
	}
	if w.live != 0 || w.held || len(w.asked) > 0 || w.alarm != 0 {
		t.Fatalf("at the end: %+v\n%s", *w, p.story())
	}
}

func configs() (all []Config) {
	for i := range 8 {
		c := Config{Exits: 35, ConfirmWithin: 5, TryEvery: 2, Tries: 1 + i>>2, Hold: i&1 != 0, Force: i&2 != 0}
		if i&1 != 0 {
			c.Every = 100
		}
		all = append(all, c)
	}
	return all
}

// Numbers in what may happen next.
const (
	evStarted, evAsked, evSafe, evNotSafe, evTaken, evLost, evDone, evFound, evFresh, evFailed, evCommitted = 0, 7, 8, 9, 10, 11, 13, 14, 15, 16, 18
)

// TestEveryInterleaving: from each stage of a validation, under each configuration, whatever comes next, in any order, the
// promises hold.
func TestEveryInterleaving(t *testing.T) {
	count := 0
	var all func(*play, int)
	all = func(p *play, depth int) {
		if depth == 0 {
			count++
			p.clone().end(t)
			return
		}
		for _, e := range p.watcher.events() {
			q := p.clone()
			q.step(t, e)
			all(q, depth-1)
		}
	}
	for i, c := range configs() {
		p := newPlay(c)
		for j, n := range []int{evStarted, evAsked, evNotSafe, evSafe, evTaken, evFound, evCommitted, evSafe, evTaken} {
			if n == evNotSafe && c.Tries == 1 {
				continue // it would be over
			}
			p.step(t, p.watcher.events()[n])
			depth := 2
			if (i+j)%8 == 0 {
				depth = 3
			}
			if n == evNotSafe {
				q := p.clone()
				p.step(t, Event{Kind: Clock, At: p.watcher.alarm})
				all(q, depth)
				continue
			}
			all(p, depth)
		}
	}
	t.Logf("%d interleavings", count)
}

// owed is one of the events that the schedule waits for, as a number in what may happen next; -1 if it waits for none.
func (w *watcher) owed(n int) int {
	pick := func(from ...int) int { return from[n%len(from)] }
	switch {
	case w.trap != 0:
		return pick(evSafe, evSafe, evSafe, evNotSafe)
	case w.pending != 0 && !w.orphan:
		return pick(evTaken, evTaken, evTaken, evTaken, evTaken, evLost)
	case w.scan != 0:
		return pick(evDone, evFound, evFound, evFresh, evFresh, evFailed)
	case w.commit:
		return evCommitted
	}
	return -1
}

// TestLongHistories: so they do over long ones, which come to every outcome.
func TestLongHistories(t *testing.T) {
	outcomes := map[Outcome]int{}
	for seed := range uint64(1000) {
		rnd := rand.New(rand.NewPCG(seed, 9))
		p := newPlay(configs()[seed%8])
		for range 100 {
			events := p.watcher.events()
			e := events[rnd.IntN(len(events))]
			if n := p.watcher.owed(rnd.IntN(12)); n >= 0 && rnd.IntN(12) > 0 {
				e = events[n]
			}
			for _, a := range p.step(t, e) {
				if a.Kind == Report {
					outcomes[a.Outcome]++
				}
			}
		}
		p.end(t)
	}
	for o := Clean; o <= Gone; o++ {
		if outcomes[o] == 0 {
			t.Errorf("no history ends with %v: %v", o, outcomes)
		}
	}
}

// TestTooManyAsk: of those who ask only so many wait; the others are told at once.
func TestTooManyAsk(t *testing.T) {
	s := New(Config{})
	s.Step(Event{Kind: GuestStarted})
	for i := range uint64(maxAsked) {
		s.Step(Event{Kind: Asked, ID: i})
	}
	got := s.Step(Event{Kind: Asked, ID: maxAsked})
	if len(got) != 1 || got[0].Kind != Report || got[0].Outcome != Refused || !slices.Equal(got[0].IDs, []uint64{maxAsked}) {
		t.Errorf("%+v", got)
	}
}
