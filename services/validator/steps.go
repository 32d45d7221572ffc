package validator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

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

// trap looks whether this moment is safe, and if it is, or force says so, begins a snapshot. Unless keep says so the guest
// goes on when it returns.
func (w *worker) trap(ctx context.Context, force, keep bool) (s verdict.Safety, err error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, trapLimit)
	defer cancel()
	held, err := w.g.Hold(ctx, protocol.Hold{Who: protocol.HolderValidation, Safe: true, Force: force})
	if err != nil { // it may be held all the same
		w.holds = true
		_, lerr := w.letGo()
		return s, errors.Join(err, lerr)
	}
	if held.LetGo {
		s.Held, s.Why = held.Took, unsafe(held)
		return s, nil
	}
	w.holds = true
	defer func() {
		if err == nil && keep && w.open {
			return
		}
		took, gerr := w.letGo()
		if s.Held = took; err == nil {
			err = gerr
		}
	}()
	s.TakenAt = time.Now()
	validated := w.validated && w.index.File != nil
	w.validated = false
	taken, err := w.g.Snapshot(ctx, validated, force)
	if err != nil {
		return s, err
	}
	s.HeldIO = taken.Held
	s.Held = time.Since(start)
	if taken.InFlight > 0 && !force {
		w.validated = validated // nothing was begun
		s.Why = plural(taken.InFlight, "request") + " of the disks in flight"
		return s, nil
	}
	w.open = true
	is := unsafe(held)
	s.Safe = is == "" && taken.InFlight == 0
	switch {
	case s.Safe:
		s.Why = "safe: no processor with interrupts off, no request in flight"
		if w.spec.Status != 0 {
			s.Why += ", none in progress by the guest's own status"
		}
	case is != "":
		s.Why = "forced: " + is
	default:
		s.Why = "forced: " + plural(taken.InFlight, "request") + " in flight"
	}
	return s, nil
}

// unsafe says what about the processors and the guest's own word keeps a moment from being safe, "" if nothing does.
func unsafe(held protocol.Held) string {
	var all []string
	if len(held.Masked) > 0 {
		all = append(all, "interrupts are off on processors "+strings.Trim(fmt.Sprint(held.Masked), "[]"))
	}
	if held.Status != 0 {
		all = append(all, fmt.Sprintf("a write is in progress by the guest's own status (%#x)", held.Status))
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

// trapLimit is how long an emulator and a BlkBack may take to hold the guest and to begin a snapshot: so long the guest may
// stand still for one that is sick.
const trapLimit = 10 * time.Second

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
