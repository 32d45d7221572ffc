// Package schedule decides, for one guest, when its disk is validated, and what comes after what: a safe moment, a
// snapshot, a scan, and for what deviates a second snapshot that confirms it. The machine is pure: events in, actions out,
// no I/O and no clock.
//
// It holds to this, in whatever order events come, late or twice ones included:
//
//   - there is one snapshot at most, and each that was taken is released once;
//   - vCPUs that were held for a snapshot are let go once: by the snapshot, or with [Config.Hold] by the first scan's
//     verdict; or the validation or the guest ends;
//   - whoever asks gets one [Report], about a snapshot that was taken after they asked;
//   - [Deviates] is reported only if a second snapshot, of after a commit of the guest's journal, was scanned;
//   - what came to nothing is done again after a pause, if it had a reason but that somebody asked, or found something;
//   - after a dirty map was lost, or a validation ended that had taken it and did not put it back, the next scan is full.
//
// The caller owes each [Trap] one Safe or NotSafe, each [Snapshot] one SnapshotTaken or SnapshotLost, also when the guest is
// gone, and each [Scan] and [ConfirmScan] one ScanDone or ScanFailed, unless it was released; and events in the order in
// which things happened. A deadline for each of them is the caller's.
package schedule

import (
	"slices"
	"time"
)

// Config is when a guest is validated; what is zero is no reason.
type Config struct {
	Every   time.Duration // since the last snapshot that was scanned, or the start
	Exits   uint64        // of vCPUs since then
	Written uint64        // bytes since then

	Tries    int           // how often a safe moment is looked for before it is given up; 1 if less
	TryEvery time.Duration // between tries
	Force    bool          // take the snapshot at an unsafe moment then
	Hold     bool          // hold the vCPUs until the first scan is done, not only for the snapshot

	ConfirmWithin time.Duration // how long to wait for a commit of the journal before the second snapshot is taken anyway
}

const (
	maxAsked  = 1024 // that wait for a report
	maxRounds = 3    // of confirmation, for a guest that deviates in another way each time
)

// EventKind says what happened.
type EventKind uint8

// Events.
const (
	GuestStarted     EventKind = iota + 1 // Kept: what was scanned last is known, and all changes since
	GuestGone                             // it ended: its vCPUs, dirty map and journal are gone
	Paused                                // an operator stopped its vCPUs: nothing is begun
	Resumed                               // they run again
	Clock                                 // the alarm rang
	Counted                               // Count: exits since the guest's start
	Wrote                                 // Count: bytes since the guest's start
	Asked                                 // ID: who asks for a validation now
	Safe                                  // Run: its vCPUs are held at a safe moment
	NotSafe                               // Run, Reason: it is none, and they run on
	SnapshotTaken                         // Run: and with it the dirty map
	SnapshotLost                          // Run, Reason: it was not taken, or is of no use any more. Kept: the dirty map was put back
	ScanDone                              // Run, Findings; and of a confirming scan those that it confirms, and Fresh ones, that only it has
	ScanFailed                            // Run, Reason, Kept
	JournalCommitted                      // the guest's, that was awaited
	MapLost                               // what changed since the last snapshot is not known
)

// An Event is one thing that happened.
type Event struct {
	Kind     EventKind
	At       time.Duration // since any one moment
	Run      uint64        // of the action that it answers
	ID       uint64
	Count    uint64
	Findings int
	Fresh    int
	Kept     bool
	Reason   string
}

// ActionKind says what to do.
type ActionKind uint8

// Actions. Scan, ConfirmScan, Snapshot, Trap, Release have a Run.
const (
	Trap        ActionKind = iota + 1 // look for a safe moment: hold the vCPUs at it
	Snapshot                          // take one; Unsafe: hold the vCPUs wherever they are
	Resume                            // let the vCPUs go that are held
	Scan                              // the snapshot; Full: all of it, not only what changed
	ConfirmScan                       // scan the second snapshot, and what the first scan found; Full
	Release                           // the snapshot, and end its scan
	AwaitCommit                       // say when the guest's journal has been committed
	SetAlarm                          // for At, in place of the last one; 0: none
	Report                            // a validation's Outcome to those who asked, IDs, and to the log
)

// Outcome is what a validation came to.
type Outcome uint8

// Outcomes.
const (
	Clean       Outcome = iota + 1
	Deviates            // Findings were confirmed
	Withdrawn           // what the first snapshot showed, the second does not
	Unconfirmed         // each snapshot showed other deviations, of which the last has Findings
	GaveUp              // there was no safe moment; Reason
	Lost                // its snapshot was; Reason
	Failed              // a scan did; Reason
	Gone                // the guest is
	Refused             // too many ask
)

var outcomes = [...]string{"", "clean", "deviates", "withdrawn", "unconfirmed", "gave up", "lost", "failed", "gone", "refused"}

// String is the outcome in a word or two.
func (o Outcome) String() string { return outcomes[min(int(o), len(outcomes)-1)] }

// An Action is one thing to do, in the order given.
type Action struct {
	Kind     ActionKind
	Run      uint64
	At       time.Duration
	Full     bool
	Unsafe   bool
	IDs      []uint64
	Outcome  Outcome
	Findings int  // confirmed; or of an outcome that is none of a second scan, those that the first found
	Forced   bool // a snapshot was taken at an unsafe moment
	Reason   string
}

type phase uint8

const (
	absent     phase = iota // there is no guest
	idle                    // until there is a reason
	waiting                 // until the next try, or that the guest runs
	trapping                // for a safe moment
	taking                  // the snapshot
	scanning                // it
	committing              // the guest's journal
)

// A Schedule is the machine of one guest. It is not safe for concurrent use.
type Schedule struct {
	config Config
	phase  phase
	paused bool
	now    time.Duration
	alarm  time.Duration // that is set
	out    []Action

	last    mark          // the last snapshot that was scanned, or the start
	retry   time.Duration // after a validation that came to nothing: not before
	suspect bool          // it came to nothing when something was to be confirmed
	exits   uint64
	written uint64
	asked   []uint64 // those who are not of the run

	full   bool   // the next scan must be
	number uint64 // of the last run
	orphan uint64 // a run of a guest that is gone, whose snapshot is not taken yet
	held   bool
	run    run
}

// A mark is a moment, and the counters at it.
type mark struct {
	at             time.Duration
	exits, written uint64
}

// counted takes a sum; one that is less than the last is of another beginning.
func counted(total uint64, sum *uint64, bases ...*uint64) {
	if total < *sum {
		for _, b := range bases {
			*b = 0
		}
	}
	*sum = total
}

// A run is one validation.
type run struct {
	number    uint64 // of its snapshot
	ids       []uint64
	tries     int
	try       time.Duration // when the next is, or the second snapshot at the latest
	full      bool          // its scan is
	confirms  int           // 0: the first snapshot
	suspicion int           // findings of the scan before
	forced    bool
	first     mark // its first snapshot
}

// New returns the schedule of a guest that has not started.
func New(c Config) *Schedule {
	c.Tries = max(1, c.Tries)
	return &Schedule{config: c, full: true}
}

// Step takes one event and returns what follows from it.
func (s *Schedule) Step(e Event) []Action {
	s.out = nil
	s.now = max(s.now, e.At)
	switch e.Kind {
	case GuestStarted:
		s.started(e)
	case GuestGone:
		s.gone()
	case Paused:
		s.paused = s.phase != absent
	case Resumed:
		s.paused = false
	case Counted:
		counted(e.Count, &s.exits, &s.last.exits, &s.run.first.exits)
	case Wrote:
		counted(e.Count, &s.written, &s.last.written, &s.run.first.written)
	case Asked:
		s.ask(e.ID)
	case MapLost:
		s.full = true
	case Clock:
		s.alarm = 0 // it is not set any more
	case Safe, NotSafe:
		s.trapped(e)
	case SnapshotTaken, SnapshotLost:
		s.snapshot(e)
	case ScanDone, ScanFailed:
		s.scanned(e)
	case JournalCommitted:
		if s.phase == committing {
			s.look()
		}
	}
	s.goOn()
	s.setAlarm()
	return s.out
}

func (s *Schedule) do(a Action) { s.out = append(s.out, a) }

func (s *Schedule) started(e Event) {
	if s.phase != absent {
		s.gone()
	}
	s.phase, s.paused, s.last, s.retry, s.suspect = idle, false, mark{at: s.now}, 0, false
	s.exits, s.written = 0, 0
	s.full = !e.Kept
}

func (s *Schedule) ask(id uint64) {
	switch {
	case s.phase == absent:
		s.do(Action{Kind: Report, IDs: []uint64{id}, Outcome: Gone})
	case len(s.asked)+len(s.run.ids) >= maxAsked:
		s.do(Action{Kind: Report, IDs: []uint64{id}, Outcome: Refused, Reason: "too many ask"})
	default:
		s.asked = append(s.asked, id)
	}
}

// due reports whether there is a reason to validate, but that somebody asks.
func (s *Schedule) due() bool {
	return s.now >= s.retry && (s.config.Every != 0 && s.now >= s.last.at+s.config.Every || s.reached())
}

// reached reports whether there is a reason that time does not bring.
func (s *Schedule) reached() bool {
	c := s.config
	return s.suspect || c.Exits != 0 && s.exits-s.last.exits >= c.Exits || c.Written != 0 && s.written-s.last.written >= c.Written
}

// goOn does what waits for its time.
func (s *Schedule) goOn() {
	switch s.phase {
	case idle:
		// One snapshot at most: that of a guest before this one may still come.
		if !s.paused && s.orphan == 0 && (len(s.asked) > 0 || s.due()) {
			s.run = run{}
			s.look()
		}
	case waiting:
		if !s.paused && s.now >= s.run.try {
			s.trap()
		}
	case committing:
		if s.now >= s.run.try {
			s.look()
		}
	}
}

// look begins to look for a safe moment, of the first snapshot or of another.
func (s *Schedule) look() {
	s.number++
	s.run.number, s.run.tries = s.number, 0
	if s.paused {
		s.phase, s.run.try = waiting, s.now
		return
	}
	s.trap()
}

func (s *Schedule) trap() {
	s.phase = trapping
	s.do(Action{Kind: Trap, Run: s.run.number})
}

func (s *Schedule) trapped(e Event) {
	if s.phase != trapping || e.Run != s.run.number {
		return
	}
	if e.Kind == Safe {
		s.held = true
		s.take(false)
		return
	}
	if s.paused { // the guest was stopped meanwhile: no try
		s.phase, s.run.try = waiting, s.now
		return
	}
	s.run.tries++
	switch {
	case s.run.tries < s.config.Tries:
		s.phase, s.run.try = waiting, s.now+s.config.TryEvery
	case s.config.Force:
		s.held, s.run.forced = true, true
		s.take(true)
	default:
		s.finish(GaveUp, s.run.suspicion, e.Reason)
	}
}

func (s *Schedule) take(unsafe bool) {
	s.phase = taking
	s.do(Action{Kind: Snapshot, Run: s.run.number, Unsafe: unsafe})
}

func (s *Schedule) resume() {
	if s.held {
		s.held = false
		s.do(Action{Kind: Resume})
	}
}

func (s *Schedule) snapshot(e Event) {
	switch {
	case s.orphan != 0 && e.Run == s.orphan:
		s.orphan = 0
		if e.Kind == SnapshotTaken {
			s.do(Action{Kind: Release, Run: e.Run})
		}
	case e.Run != s.run.number:
	case s.phase == taking && e.Kind == SnapshotTaken:
		s.taken()
	case s.phase == taking:
		s.full = s.full || !e.Kept
		s.finish(Lost, s.run.suspicion, e.Reason)
	case s.phase == scanning && e.Kind == SnapshotLost:
		s.putBack(e.Kept)
		s.finish(Lost, s.run.suspicion, e.Reason)
	}
}

func (s *Schedule) taken() {
	s.phase = scanning
	s.run.full, s.full = s.full, false
	scan := Action{Kind: ConfirmScan, Run: s.run.number, Full: s.run.full}
	if s.run.confirms == 0 {
		// Who asked until now sees the disk as it was afterwards.
		s.run.ids, s.asked = s.asked, nil
		s.run.first = mark{s.now, s.exits, s.written}
		scan.Kind = Scan
	}
	if !s.config.Hold || s.run.confirms > 0 {
		s.resume()
	}
	s.do(scan)
}

// putBack is what becomes of the dirty map that a snapshot took.
func (s *Schedule) putBack(kept bool) { s.full = s.full || s.run.full || !kept }

func (s *Schedule) scanned(e Event) {
	if s.phase != scanning || e.Run != s.run.number {
		return
	}
	confirms := s.run.confirms > 0
	findings, fresh := max(0, e.Findings), max(0, e.Fresh)
	switch {
	case e.Kind == ScanFailed:
		s.putBack(e.Kept)
		s.finish(Failed, s.run.suspicion, e.Reason)
	case !confirms && findings == 0:
		s.finish(Clean, 0, "")
	case !confirms:
		s.confirm(findings)
	case findings > 0:
		s.finish(Deviates, findings, "")
	case fresh == 0:
		s.finish(Withdrawn, 0, "")
	case s.run.confirms < maxRounds:
		s.confirm(fresh)
	default:
		s.finish(Unconfirmed, fresh, "each snapshot shows other deviations")
	}
}

// confirm has the guest commit its journal, and then looks for another safe moment.
func (s *Schedule) confirm(suspicion int) {
	s.resume()
	s.do(Action{Kind: Release, Run: s.run.number})
	s.run.confirms++
	s.run.suspicion = suspicion
	s.phase, s.run.try = committing, s.now+s.config.ConfirmWithin
	s.do(Action{Kind: AwaitCommit})
}

// finish ends a validation.
func (s *Schedule) finish(o Outcome, findings int, reason string) {
	s.resume()
	if s.phase == scanning {
		s.do(Action{Kind: Release, Run: s.run.number})
	}
	ids := s.run.ids
	if s.run.confirms == 0 && s.phase != scanning { // it has no snapshot that they would have to be before
		ids, s.asked = append(ids, s.asked...), nil
	}
	s.do(Action{Kind: Report, IDs: slices.Clone(ids), Outcome: o, Findings: findings, Forced: s.run.forced, Reason: reason})
	if o == GaveUp || o == Lost || o == Failed {
		s.retry = s.now + time.Duration(s.config.Tries)*max(s.config.TryEvery, time.Second)
		s.suspect = s.suspect || s.run.suspicion > 0
	} else {
		s.last, s.retry, s.suspect = s.run.first, 0, false
	}
	s.run = run{}
	s.phase = idle
}

// gone ends everything. What is held ends with the guest.
func (s *Schedule) gone() {
	if s.phase == absent {
		return
	}
	if s.phase == taking {
		s.orphan = s.run.number
	}
	s.held = false
	if s.phase == idle {
		if len(s.asked) > 0 {
			s.do(Action{Kind: Report, IDs: s.asked, Outcome: Gone})
		}
	} else {
		s.run.ids, s.asked = append(s.run.ids, s.asked...), nil
		s.finish(Gone, s.run.suspicion, "")
	}
	s.asked = nil
	s.full, s.paused, s.phase = true, false, absent
}

// setAlarm sets the alarm for the next thing that time alone brings.
func (s *Schedule) setAlarm() {
	at := time.Duration(0)
	switch {
	case s.phase == committing || s.phase == waiting && !s.paused:
		at = s.run.try
	case s.phase != idle || s.paused || s.orphan != 0:
	case s.reached():
		at = s.retry
	case s.config.Every != 0:
		at = max(s.last.at+s.config.Every, s.retry)
	}
	if at != s.alarm {
		s.alarm = at
		s.do(Action{Kind: SetAlarm, At: at})
	}
}
