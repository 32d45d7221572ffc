package manager

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"redoubt.dev/redoubt/vtpm/engine"
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
	h := &host{raw: raw{ctx, d.eng}}
	err := f(h)
	// The guest's things come back even if ctx has ended.
	h.ctx = context.WithoutCancel(ctx)
	return errors.Join(err, h.restore())
}

// raw sends commands and repeats those that the TPM asks to repeat. Such a response means that
// nothing was done (Part 2 §6.6.3, format-zero warnings).
type raw struct {
	ctx context.Context
	eng *engine.Engine
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
		return rsp, nil
	}
}

// host is raw that makes room in a full TPM.
type host struct {
	raw
	own     []tpm2.TPMHandle // what the host itself has loaded
	objects []tpm2.TPMSContext
	session []tpm2.TPMSContext
}

// Send implements transport.TPM.
func (h *host) Send(cmd []byte) ([]byte, error) {
	for {
		rsp, err := h.raw.Send(cmd)
		if err != nil {
			return nil, err
		}
		switch engine.ResponseCode(rsp) {
		case tpm2.TPMRCSuccess:
			h.note(cmd, rsp)
			return rsp, nil
		case tpm2.TPMRCObjectMemory:
			done, err := h.setAside(firstTransient, &h.objects)
			if err != nil || !done {
				return rsp, err
			}
		case tpm2.TPMRCSessionMemory:
			done, err := h.setAside(firstLoadedSession, &h.session)
			if err != nil || !done {
				return rsp, err
			}
		default:
			return rsp, nil
		}
	}
}

// First handles of a kind (Part 2 §7.2).
const (
	firstLoadedSession = 0x02000000
	firstTransient     = 0x80000000
	handleKind         = 0xff000000
)

// note remembers the handles that the host's commands load.
func (h *host) note(cmd, rsp []byte) {
	switch engine.CommandCode(cmd) {
	case tpm2.TPMCCCreatePrimary, tpm2.TPMCCLoad, tpm2.TPMCCLoadExternal, tpm2.TPMCCCreateLoaded,
		tpm2.TPMCCContextLoad, tpm2.TPMCCStartAuthSession:
		if len(rsp) >= 14 {
			h.own = append(h.own, tpm2.TPMHandle(binary.BigEndian.Uint32(rsp[10:])))
		}
	case tpm2.TPMCCFlushContext:
		if len(cmd) >= 14 {
			gone := tpm2.TPMHandle(binary.BigEndian.Uint32(cmd[10:]))
			h.own = slices.DeleteFunc(h.own, func(o tpm2.TPMHandle) bool { return o == gone })
		}
	}
}

// setAside saves the guest's first object or session of a kind out of the TPM. It reports
// false if there is none.
func (h *host) setAside(first uint32, to *[]tpm2.TPMSContext) (bool, error) {
	handles, err := h.handles(first)
	if err != nil {
		return false, err
	}
	for _, v := range handles {
		if slices.Contains(h.own, v) {
			continue
		}
		saved, err := tpm2.ContextSave{SaveHandle: v}.Execute(h.raw)
		if err != nil {
			return false, fmt.Errorf("set the guest's handle %#x aside: %w", v, err)
		}
		if first == firstTransient { // a saved session leaves by itself, an object does not
			if _, err := (tpm2.FlushContext{FlushHandle: v}).Execute(h.raw); err != nil {
				return false, fmt.Errorf("set the guest's handle %#x aside: %w", v, err)
			}
			saved.Context.SavedHandle = v // the TPM writes 0x80000000 for every object
		}
		*to = append(*to, saved.Context)
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
	for _, c := range h.session { // a session keeps its handle
		if _, err := (tpm2.ContextLoad{Context: c}).Execute(h.raw); err != nil {
			errs = append(errs, fmt.Errorf("restore the guest's session %#x: %w", c.SavedHandle, err))
		}
	}
	slices.SortFunc(h.objects, func(a, b tpm2.TPMSContext) int { return int(int64(a.SavedHandle) - int64(b.SavedHandle)) })
	for _, c := range h.objects {
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
