package validator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/validation/verdict"
)

// close gives back what the worker has.
func (w *worker) close() {
	w.index.Close()
	w.last.Close()
	for _, a := range w.waiting {
		a.end(&verdict.Report{Error: errDown.Error()})
	}
}

// trap holds the guest, begins a snapshot and looks whether its moment is safe; where it is not, and force does not say so, the
// snapshot is dropped. Unless keep says so the guest goes on when the snapshot is begun.
func (w *worker) trap(ctx context.Context, force, keep bool) (s verdict.Safety, err error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, protocol.HoldLimit)
	defer cancel()
	w.holds = true // it may be, also where the call fails
	var good bool  // the snapshot stays
	defer func() {
		if !good || !keep {
			took, gerr := w.letGo()
			s.Held, err = max(s.Held, took), errors.Join(err, gerr)
		}
		if !good {
			w.drop()
		}
	}()
	s.TakenAt = start
	held, taken, err := w.take(ctx, force, keep)
	if err != nil {
		return s, err
	}
	if s.HeldIO, s.Held = taken.Held, held.Took; keep {
		s.Held = time.Since(start)
	} else {
		w.holds = false
	}
	is := unsafe(held, taken)
	switch s.Safe, good = is == "", is == "" || force; {
	case s.Safe:
		s.Why = "safe: no processor with interrupts off, no request in flight"
		if w.spec.Status != 0 {
			s.Why += ", none in progress by the guest's own status"
		}
	case force:
		s.Why = "forced: " + is
	default:
		s.Why = is
	}
	return s, nil
}

// take has the emulator hold the guest and BlkBack begin a snapshot meanwhile. They tell each other when, by pipes: how long the
// guest stands still does not depend on how soon the Builder is heard. What changed until a snapshot that is dropped is looked at
// with the next one.
func (w *worker) take(ctx context.Context, force, keep bool) (held protocol.Held, taken protocol.Snapshotted, err error) {
	validated := w.validated && w.index.File != nil
	w.validated = false
	hears, stopped, err := ipc.OneWay()
	if err != nil {
		return held, taken, err
	}
	begins, begun, err := ipc.OneWay()
	if err != nil {
		ipc.CloseAll([]*os.File{hears, stopped})
		return held, taken, err
	}
	var failed error
	var both sync.WaitGroup
	// Each end is closed when nobody writes to it any more: the one that waits is told if the other has failed.
	both.Go(func() {
		taken, failed = w.g.Snapshot(ctx, validated, force, hears, begun)
		ipc.CloseAll([]*os.File{hears, begun})
	})
	in := protocol.Hold{Who: protocol.HolderValidation, Keep: keep, Files: protocol.Files{protocol.FileStopped, protocol.FileBegun}}
	held, err = w.g.Hold(ctx, in, stopped, begins)
	ipc.CloseAll([]*os.File{stopped, begins})
	both.Wait()
	if failed == nil {
		if w.open = taken.InFlight == 0 || force; !w.open {
			w.validated = validated // nothing was begun
		}
		if err == nil && !held.Begun {
			err = rpc.Errorf(rpc.Unavailable, "a snapshot was begun too late")
		}
	}
	if err == nil {
		err = failed
	}
	return held, taken, err
}

// unsafe says what keeps a moment from being safe, "" if nothing does.
func unsafe(held protocol.Held, taken protocol.Snapshotted) string {
	var all []string
	if len(held.Masked) > 0 {
		masked := "interrupts are off on processors " + strings.Trim(fmt.Sprint(held.Masked), "[]")
		if held.Paused {
			masked += ", where the guest is paused"
		}
		all = append(all, masked)
	}
	if held.Status != 0 {
		all = append(all, fmt.Sprintf("a write is in progress by the guest's own status (%#x)", held.Status))
	}
	if taken.InFlight > 0 {
		all = append(all, plural(taken.InFlight, "request")+" of the disks in flight")
	}
	return strings.Join(all, "; ")
}

// letGo lets the guest go on. It is done also when there is nobody any more who waits for it.
func (w *worker) letGo() (time.Duration, error) {
	if !w.holds {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), letGoLimit)
	defer cancel()
	was, err := w.g.LetGo(ctx, protocol.HolderValidation)
	if err == nil || errors.Is(err, rpc.ErrGone) {
		w.holds = false
	}
	return was.Took, err
}

// letGoLimit is how long an emulator may take to let its guest go on.
const letGoLimit = 20 * time.Second

// drop ends the snapshot.
func (w *worker) drop() {
	if !w.open {
		return
	}
	w.open = false
	ctx, cancel := context.WithTimeout(context.Background(), letGoLimit)
	defer cancel()
	if err := w.g.DropSnapshot(ctx); err != nil {
		w.m.Log.Warn("snapshot", "guest", w.g.Name(), "err", err)
	}
}

// snapshot takes the first safe moment, for what is no validation: it looks at one after another until as many were not safe as
// the spec lets pass.
func (w *worker) snapshot(ctx context.Context, force bool) (err error) {
	wait := time.NewTimer(0)
	defer wait.Stop()
	for try := 1; ; try++ {
		select {
		case <-wait.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		s, err := w.trap(ctx, (force || w.spec.Force) && try == w.spec.Tries, false)
		switch {
		case err != nil || w.open:
			return err
		case try == w.spec.Tries:
			return noMoment(try, s.Why)
		}
		wait.Reset(tryEvery)
	}
}

func noMoment(tries int, why string) error {
	return rpc.Errorf(rpc.Unavailable, "no safe moment in %d; at the last, %s: ask again, or with --force", tries, why)
}

// tryEvery is how long to wait for the next moment: no multiple of a clock's tick, so that what happens at each of those is
// not met each time.
const tryEvery = 17300 * time.Microsecond

// scan has an inspector look at the snapshot and drops it.
func (w *worker) scan(ctx context.Context, q asked.Scan) (out asked.Answer, err error) {
	defer w.drop()
	disks, err := w.g.View()
	if err != nil {
		return out, err
	}
	q.Guest = w.g.UUID()
	if q.Changed = q.Changed && w.index.File != nil; q.Changed {
		q.Index = w.index
	}
	if out, err = w.m.Scanner.Scan(ctx, w.g.Name(), disks, q); err != nil {
		return out, err
	}
	w.last.Close() // it was of the last index
	w.index.Close()
	if w.index = out.Index; w.index.Size == 0 {
		w.index.Close()
	}
	w.validated = true
	return out, nil
}

// compare is scan for what deviates from a baseline.
func (w *worker) compare(ctx context.Context, b *accepted, full bool, seen *seen, taken time.Time) (c verdict.Compared, s protocol.Scanned, err error) {
	q := asked.Scan{Changed: !full, Baseline: b.text}
	if seen != nil {
		is := seen.is
		is.Taken = taken
		q.Listing, q.Seen = seen.listing, &is
	}
	if !full && w.lastOf == b.sum {
		q.Last = w.last
	}
	out, err := w.scan(ctx, q)
	if err != nil {
		return c, s, err
	}
	text, err := read(out.Answer)
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil {
		out.Answer.Close()
		return c, s, fmt.Errorf("the inspector's answer: %w", err)
	}
	w.last, w.lastOf = out.Answer, b.sum
	return c, out.Scanned, nil
}

func read(t asked.Text) ([]byte, error) {
	b := make([]byte, t.Size)
	if len(b) == 0 {
		return b, nil
	}
	_, err := t.File.ReadAt(b, 0)
	return b, err
}
