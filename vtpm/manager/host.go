package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/journal"
)

// Host runs f with a transport for the host's own commands, at locality 0. No guest's command comes
// between those of f. The guest notices nothing of it: where its objects or sessions fill the
// TPM's few slots, some are saved aside and are back under their handles when Host returns. f must
// flush what it loads, and must not keep the transport.
func (d *Device) Host(ctx context.Context, f func(transport.TPM) error) error {
	if err := d.take(ctx); err != nil {
		return err
	}
	defer d.give()
	return d.sequence(ctx, f)
}

// sequence is Host for who has the turn.
func (d *Device) sequence(ctx context.Context, f func(transport.TPM) error) error {
	h := d.host(ctx, &turn{})
	d.note.BeginTurn()
	err := f(h)
	// The guest's things come back even if ctx has ended.
	h.ctx = context.WithoutCancel(ctx)
	return errors.Join(err, h.restore())
}

// host is the transport of a sequence. The turn is the caller's.
func (d *Device) host(ctx context.Context, t *turn) *host {
	return &host{raw{ctx, d.eng, d.note, t}}
}

// finish ends a sequence that its manager was killed in: what it had loaded is flushed, and what it
// had set aside is put back.
func (d *Device) finish(ctx context.Context) error {
	all, err := d.note.Turn()
	if err != nil {
		return err
	}
	t, err := replay(all)
	if err != nil {
		return err
	}
	h := d.host(ctx, t)
	for _, o := range slices.Clone(t.own) {
		// It may be gone: a session ends with its last command.
		if _, err := (tpm2.FlushContext{FlushHandle: o}).Execute(h.raw); err != nil && !errors.Is(err, tpm2.TPMRCHandle) && !errors.Is(err, tpm2.TPMRCValue) {
			return fmt.Errorf("flush %#x: %w", o, err)
		}
	}
	t.own = nil
	if err := h.restore(); err != nil {
		return err
	}
	d.note.BeginTurn()
	return nil
}

// raw sends commands and repeats those that the TPM asks to repeat. Such a response means that
// nothing was done (Part 2 §6.6.3, format-zero warnings).
type raw struct {
	ctx  context.Context
	eng  executor
	note *journal.Journal
	turn *turn // nil: before the guest is let in, when nothing is the guest's
}

// executor is an engine.
type executor interface {
	Execute(ctx context.Context, locality uint8, cmd []byte) ([]byte, error)
	Log() string
}

// maxRetries bounds the repetitions; an emulated TPM answers differently the next time.
const maxRetries = 64

func (r raw) Send(cmd []byte) ([]byte, error) {
	for n := 0; ; n++ {
		rsp, err := r.eng.Execute(r.ctx, 0, cmd)
		if err != nil {
			return nil, err
		}
		switch engine.ResponseCode(rsp) {
		case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting:
			if n < maxRetries {
				continue
			}
		case tpm2.TPMRCFailure:
			return nil, fmt.Errorf("%w (engine's log: %s)", ErrFailure, r.eng.Log())
		}
		if r.turn == nil {
			return rsp, nil
		}
		if err := r.turn.step(cmd, rsp); err != nil {
			return nil, err
		}
		if !r.note.Noted(counts(cmd), journal.Exchange{Command: cmd, Response: rsp}) {
			return nil, errTurn
		}
		return rsp, nil
	}
}

// host is raw that makes room in a full TPM.
type host struct{ raw }

// Send implements transport.TPM.
func (h *host) Send(cmd []byte) ([]byte, error) {
	for {
		rsp, err := h.raw.Send(cmd)
		if err != nil {
			return nil, err
		}
		switch engine.ResponseCode(rsp) {
		case tpm2.TPMRCObjectMemory:
			done, err := h.setAside(firstTransient)
			if err != nil || !done {
				return rsp, err
			}
		case tpm2.TPMRCSessionMemory:
			done, err := h.setAside(firstLoadedSession)
			if err != nil || !done {
				return rsp, err
			}
		default:
			return rsp, nil
		}
	}
}

// setAside saves the guest's first object or session of a kind out of the TPM. It reports
// false if there is none.
func (h *host) setAside(first uint32) (bool, error) {
	handles, err := h.handles(first)
	if err != nil {
		return false, err
	}
	for _, v := range handles {
		if slices.Contains(h.turn.own, v) {
			continue
		}
		if _, err := (tpm2.ContextSave{SaveHandle: v}).Execute(h.raw); err != nil {
			return false, fmt.Errorf("set the guest's handle %#x aside: %w", v, err)
		}
		if first == firstTransient { // a saved session leaves by itself, an object does not
			if _, err := (tpm2.FlushContext{FlushHandle: v}).Execute(h.raw); err != nil {
				return false, fmt.Errorf("set the guest's handle %#x aside: %w", v, err)
			}
		}
		return true, nil
	}
	return false, nil
}

// handles lists what is loaded of a kind.
func (h *host) handles(first uint32) ([]tpm2.TPMHandle, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(h.raw)
	if err != nil {
		return nil, fmt.Errorf("list loaded handles: %w", err)
	}
	l, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, fmt.Errorf("list loaded handles: %w", err)
	}
	var out []tpm2.TPMHandle
	for _, v := range l.Handle {
		// A list runs on into the next kind. HMAC sessions are listed as kind 2, policy sessions
		// as kind 3 among them (Part 3 §30.2).
		kind := uint32(v) & handleKind
		if kind == first || first == firstLoadedSession && kind == 0x03000000 {
			out = append(out, v)
		}
	}
	return out, nil
}

// restore brings the guest's things back under their handles.
func (h *host) restore() error {
	var errs []error
	for _, c := range slices.Clone(h.turn.sessions) { // a session keeps its handle
		if _, err := (tpm2.ContextLoad{Context: c}).Execute(h.raw); err != nil {
			errs = append(errs, fmt.Errorf("restore the guest's session %#x: %w", c.SavedHandle, err))
		}
	}
	objects := slices.Clone(h.turn.objects)
	slices.SortFunc(objects, func(a, b tpm2.TPMSContext) int { return int(int64(a.SavedHandle) - int64(b.SavedHandle)) })
	for _, c := range objects {
		if err := h.restoreObject(c); err != nil {
			errs = append(errs, fmt.Errorf("restore the guest's object %#x: %w", c.SavedHandle, err))
		}
	}
	return errors.Join(errs...)
}

// restoreObject loads an object into the slot it had. The TPM takes the first free slot; a slot
// before the right one is filled with a copy meanwhile.
func (h *host) restoreObject(c tpm2.TPMSContext) (err error) {
	want := c.SavedHandle
	c.SavedHandle = firstTransient
	var fillers []tpm2.TPMHandle
	defer func() {
		for _, f := range fillers {
			if _, ferr := (tpm2.FlushContext{FlushHandle: f}).Execute(h.raw); err == nil {
				err = ferr
			}
		}
	}()
	for {
		rsp, err := tpm2.ContextLoad{Context: c}.Execute(h.raw)
		if err != nil {
			return err
		}
		if rsp.LoadedHandle == want {
			return nil
		}
		fillers = append(fillers, rsp.LoadedHandle)
	}
}
