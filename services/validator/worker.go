package validator

import (
	"context"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/schedule"
	"redoubt.dev/redoubt/validation/verdict"
)

// A worker validates one guest. Its goroutine carries out what its schedule says, one action after another; between two of
// them it does what others ask for.
type worker struct {
	m      *Manager
	g      Guest
	spec   spec.Validation
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}

	asks   chan *ask
	wants  chan *want
	counts chan schedule.Event // has room for one of each kind: Wrote, Counted

	// What follows is the goroutine's.
	machine *schedule.Schedule
	begun   time.Time
	alarm   *time.Timer
	waiting map[uint64]*want // by the id that the schedule has

	// What the last scan left: of the disks as they were when the maps of changes began that are since.
	index     asked.Text
	validated bool       // the frozen map of changes was looked at
	last      asked.Text // the comparison of that index with the baseline of that digest
	lastOf    string
	holds     bool // the guest is held for a validation
	open      bool // there is a snapshot

	now *inquiry // the validation under way, nil for none
}

// A want is somebody's who waits for a validation's report.
type want struct {
	full, force bool
	seen        *seen                // nil: none
	report      chan *verdict.Report // has room for one
}

// An inquiry is one validation, from its first try to its report.
type inquiry struct {
	report *verdict.Report
	base   *accepted
	full   bool // somebody asks for everything to be read
	force  bool // somebody takes a moment that is not safe, too
	seen   *seen
	tries  int
	first  []baseline.Finding // of the last snapshot, which the next confirms
}

// commitTime is how long a guest's file system may take to commit what it has done: ext4's default is five seconds (ext4(5),
// commit=). A finding counts once a snapshot confirms it that was taken so long after the first.
var commitTime = 5500 * time.Millisecond // changed by tests

func newWorker(m *Manager, g Guest) *worker {
	v := g.Spec().Validated()
	w := &worker{
		m: m, g: g, spec: v, done: make(chan struct{}), asks: make(chan *ask), wants: make(chan *want), counts: make(chan schedule.Event, 2),
		begun: time.Now(), alarm: time.NewTimer(time.Hour), waiting: map[uint64]*want{},
		machine: schedule.New(schedule.Config{
			Every: time.Duration(v.Every), Exits: v.Exits, Written: uint64(v.Written),
			Tries: v.Tries, TryEvery: tryEvery, Force: v.Force, Hold: v.Hold, ConfirmWithin: commitTime,
		}),
	}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	return w
}

// run is the worker's goroutine.
func (w *worker) run() {
	defer close(w.done)
	defer w.close()
	defer w.end()
	w.alarm.Stop()
	defer w.alarm.Stop()
	w.step(schedule.Event{Kind: schedule.GuestStarted})
	if !w.m.has(w.g.UUID(), fileBaseline) { // nothing is due before there is something to hold it to
		w.step(schedule.Event{Kind: schedule.Paused})
	}
	for id := uint64(1); ; {
		select {
		case <-w.ctx.Done():
			w.step(schedule.Event{Kind: schedule.GuestGone})
			return
		case a := <-w.asks:
			a.done <- a.do(w.ctx, w)
		case a := <-w.wants:
			if a.seen != nil && w.anySeen() {
				a.end(&verdict.Report{Error: "another listing of what the guest shows is being looked at: ask again"})
				continue
			}
			w.waiting[id] = a
			if n := w.now; n != nil && len(n.report.Snapshots) == 0 { // it is theirs, too
				n.take(a)
			}
			w.step(schedule.Event{Kind: schedule.Asked, ID: id})
			id++
		case e := <-w.counts:
			w.step(e)
		case <-w.alarm.C:
			w.step(schedule.Event{Kind: schedule.Clock})
		}
	}
}

// step gives the schedule an event, and carries out what follows until nothing does.
func (w *worker) step(e schedule.Event) {
	for events := []schedule.Event{e}; len(events) > 0; events = events[1:] {
		e := events[0]
		e.At = time.Since(w.begun)
		for _, a := range w.machine.Step(e) {
			if answer, ok := w.act(a); ok {
				events = append(events, answer)
			}
		}
	}
}

// act carries out one action, and gives the event that answers it, if one does.
func (w *worker) act(a schedule.Action) (e schedule.Event, ok bool) {
	switch a.Kind {
	case schedule.SetAlarm:
		w.alarm.Stop()
		if a.At != 0 {
			w.alarm.Reset(max(0, a.At-time.Since(w.begun)))
		}
	case schedule.Trap:
		return w.look(a.Run), true
	case schedule.Snapshot:
		if a.Unsafe {
			return w.force(a.Run), true
		}
		return schedule.Event{Kind: schedule.SnapshotTaken, Run: a.Run}, true // with the safe moment
	case schedule.Resume:
		if !w.holds { // it goes on since the snapshot was begun
			break
		}
		took, err := w.letGo()
		if n := len(w.inquiry().report.Snapshots); n > 0 {
			w.now.report.Snapshots[n-1].Held = took
		}
		if err != nil {
			w.m.Log.Warn("a guest is not let go", "guest", w.g.Name(), "err", err)
		}
	case schedule.Scan, schedule.ConfirmScan:
		return w.scanned(a), true
	case schedule.Release:
		w.drop()
	case schedule.Report:
		w.conclude(a)
	case schedule.AwaitCommit: // the alarm tells
	}
	return e, false
}

// inquiry is the validation under way, or the next.
func (w *worker) inquiry() *inquiry {
	if w.now == nil {
		w.now = &inquiry{report: &verdict.Report{Guest: w.g.Name(), Cause: verdict.BySpec, Started: time.Now(), Findings: []baseline.Finding{}}}
		for _, a := range w.waiting {
			w.now.report.Cause = verdict.Asked
			w.now.take(a)
		}
	}
	return w.now
}

// look looks whether this is a safe moment, and where it is has a snapshot begun.
func (w *worker) look(run uint64) schedule.Event {
	n := w.inquiry()
	n.tries++
	s, err := w.trap(w.ctx, false, w.spec.Hold)
	if err == nil && w.open {
		n.taken(s)
		return schedule.Event{Kind: schedule.Safe, Run: run}
	}
	if err != nil {
		s.Why = err.Error()
	}
	if n.force && n.tries >= w.spec.Tries { // who asked wants it all the same
		if s, err := w.trap(w.ctx, true, w.spec.Hold); err == nil && w.open {
			n.taken(s)
			return schedule.Event{Kind: schedule.Safe, Run: run}
		}
	}
	return schedule.Event{Kind: schedule.NotSafe, Run: run, Reason: s.Why}
}

func (n *inquiry) taken(s verdict.Safety) {
	s.Tries, s.Snapshot = n.tries, len(n.report.Snapshots)+1
	n.tries = 0
	n.report.Snapshots = append(n.report.Snapshots, s)
}

func (w *worker) force(run uint64) schedule.Event {
	n := w.inquiry()
	s, err := w.trap(w.ctx, true, w.spec.Hold)
	if err == nil && w.open {
		n.taken(s)
		return schedule.Event{Kind: schedule.SnapshotTaken, Run: run}
	}
	if err != nil {
		s.Why = err.Error()
	}
	return schedule.Event{Kind: schedule.SnapshotLost, Run: run, Kept: true, Reason: s.Why}
}

// scanned has the snapshot compared with the baseline.
func (w *worker) scanned(a schedule.Action) schedule.Event {
	n := w.inquiry()
	failed := func(err error) schedule.Event {
		// What changed stays in the maps until a scan has looked at it.
		return schedule.Event{Kind: schedule.ScanFailed, Run: a.Run, Kept: true, Reason: err.Error()}
	}
	if n.base == nil {
		var err error
		if n.base, err = w.m.baseline(w.g.UUID(), w.spec); err == nil && n.base == nil {
			err = errNone
		}
		if err != nil {
			return failed(err)
		}
		n.report.Baseline = n.base.Version
	}
	first := a.Kind == schedule.Scan
	// Whether changes were missed the index knows better than the schedule: it is there as long as none was.
	r := n.report
	var taken time.Time
	if k := len(r.Snapshots); k > 0 {
		taken = r.Snapshots[k-1].TakenAt
	}
	c, scanned, err := w.compare(w.ctx, n.base, first && n.full, n.seen, taken)
	if err != nil {
		return failed(err)
	}
	found := n.hidden(c)
	if first {
		r.Full, r.Why, r.Files = scanned.Full, scanned.Why, scanned.Names
	}
	r.Read, r.Bytes, r.Omitted = r.Read+scanned.Read, r.Bytes+scanned.Bytes, c.Omitted
	if c.Hidden != nil {
		r.Omitted += c.Hidden.Omitted
	}
	e := schedule.Event{Kind: schedule.ScanDone, Run: a.Run, Findings: len(found)}
	if first {
		n.first = found
		return e
	}
	r.Findings, r.Withdrawn = baseline.Confirm(n.first, found)
	e.Findings, e.Fresh = len(r.Findings), len(baseline.Unconfirmed(n.first, found))
	n.first = found // what is new in it a third may confirm
	return e
}

// conclude ends a validation: its verdict is recorded, what follows is done, and those who asked are told.
func (w *worker) conclude(a schedule.Action) {
	n := w.inquiry()
	w.now = nil
	r := n.report
	r.Took = time.Since(r.Started)
	var failed error
	switch a.Outcome {
	case schedule.Clean, schedule.Withdrawn, schedule.Deviates:
	case schedule.GaveUp:
		failed = noMoment(w.spec.Tries, a.Reason)
	case schedule.Gone:
		failed = errDown
	case schedule.Unconfirmed:
		failed = rpc.Errorf(rpc.Unavailable, "each snapshot showed other deviations, so that none was confirmed: ask again")
	default:
		failed = rpc.Errorf(rpc.Unavailable, "%s", a.Reason)
	}
	if failed != nil {
		r.Findings, r.Error = []baseline.Finding{}, failed.Error()
	}
	if n.base != nil {
		n.base.text.Close()
	}
	// What its guest's end has cut short, and nobody waits for, is no news.
	if a.Outcome != schedule.Gone || len(a.IDs) > 0 {
		if err := w.m.conclude(w.g, w.spec, r, failed); err != nil {
			w.m.Log.Warn("validation", "guest", w.g.Name(), "err", err)
			if r.Error == "" {
				r.Error = err.Error()
			}
		}
	}
	for _, id := range a.IDs {
		if t := w.waiting[id]; t != nil {
			t.end(r)
			delete(w.waiting, id)
		}
	}
}

// asked has the guest validated and waits for the report.
func (w *worker) asked(ctx context.Context, a *want) (*verdict.Report, error) {
	a.report = make(chan *verdict.Report, 1)
	select {
	case w.wants <- a:
	case <-w.done:
		a.end(nil)
		return nil, errDown
	case <-ctx.Done():
		a.end(nil)
		return nil, ctx.Err()
	}
	select {
	case r := <-a.report:
		return r, nil
	case <-w.done:
		select {
		case r := <-a.report:
			return r, nil
		default:
			return nil, errDown
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// count tells the schedule how much there was, unless it has not taken the last word yet.
func (w *worker) count(e schedule.Event) {
	select {
	case w.counts <- e:
	default:
	}
}

// Wrote tells that a guest has written so much since its back end began, in bytes.
func (m *Manager) Wrote(uuid string, n uint64) {
	if w, err := m.worker(uuid); err == nil {
		w.count(schedule.Event{Kind: schedule.Wrote, Count: n})
	}
}

// Exited tells that a guest's processors have left it so often since it was started.
func (m *Manager) Exited(uuid string, n uint64) {
	if w, err := m.worker(uuid); err == nil {
		w.count(schedule.Event{Kind: schedule.Counted, Count: n})
	}
}
