package manager

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/journal"
)

// turn is what a sequence of the host's has changed in the TPM's slots so far, which is a function of
// its commands and their responses: a manager that goes on from a killed one's journal finds it
// again.
type turn struct {
	own      []tpm2.TPMHandle // what the host itself has loaded
	objects  []tpm2.TPMSContext
	sessions []tpm2.TPMSContext                  // both: the guest's, set aside
	saved    map[tpm2.TPMHandle]tpm2.TPMSContext // the guest's objects that are still loaded, too
}

// First handles of a kind (Part 2 §7.2).
const (
	firstLoadedSession = 0x02000000
	firstTransient     = 0x80000000
	handleKind         = 0xff000000
)

// counts reports whether a command can change what is loaded.
func counts(cmd []byte) bool {
	switch engine.CommandCode(cmd) {
	case tpm2.TPMCCCreatePrimary, tpm2.TPMCCLoad, tpm2.TPMCCLoadExternal, tpm2.TPMCCCreateLoaded,
		tpm2.TPMCCContextLoad, tpm2.TPMCCStartAuthSession, tpm2.TPMCCContextSave, tpm2.TPMCCFlushContext:
		return true
	}
	return false
}

// step takes a command and its response in. It fails where the response is none to the command.
func (t *turn) step(cmd, rsp []byte) error {
	done := engine.ResponseCode(rsp) == tpm2.TPMRCSuccess
	if !done || !counts(cmd) {
		return nil // it changed nothing
	}
	code := engine.CommandCode(cmd)
	handle := func(b []byte) (tpm2.TPMHandle, error) {
		if len(b) < 14 {
			return 0, fmt.Errorf("%w: no handle in %#x", journal.ErrJournal, uint32(code))
		}
		return tpm2.TPMHandle(binary.BigEndian.Uint32(b[10:])), nil
	}
	switch code {
	case tpm2.TPMCCFlushContext:
		h, err := handle(cmd)
		if err != nil {
			return err
		}
		if c, ok := t.saved[h]; ok {
			t.objects = append(t.objects, c)
			delete(t.saved, h)
		}
		t.own = slices.DeleteFunc(t.own, func(o tpm2.TPMHandle) bool { return o == h })
	case tpm2.TPMCCContextSave:
		h, err := handle(cmd)
		if err != nil {
			return err
		}
		c, err := tpm2.Unmarshal[tpm2.TPMSContext](rsp[10:])
		if err != nil {
			return fmt.Errorf("%w: saved context: %w", journal.ErrJournal, err)
		}
		if uint32(h)&handleKind != firstTransient { // a session leaves by being saved
			t.sessions = append(t.sessions, *c)
			return nil
		}
		c.SavedHandle = h // the TPM writes 0x80000000 for every object
		if t.saved == nil {
			t.saved = map[tpm2.TPMHandle]tpm2.TPMSContext{}
		}
		t.saved[h] = *c
	case tpm2.TPMCCContextLoad:
		h, err := handle(rsp)
		if err != nil {
			return err
		}
		c, err := tpm2.Unmarshal[tpm2.TPMSContext](cmd[10:])
		if err != nil {
			return fmt.Errorf("%w: loaded context: %w", journal.ErrJournal, err)
		}
		back := func(s tpm2.TPMSContext) bool {
			return s.SavedHandle == h && bytes.Equal(s.ContextBlob.Buffer, c.ContextBlob.Buffer)
		}
		n := len(t.objects) + len(t.sessions)
		t.objects, t.sessions = slices.DeleteFunc(t.objects, back), slices.DeleteFunc(t.sessions, back)
		if len(t.objects)+len(t.sessions) == n {
			t.own = append(t.own, h) // the host's, or in a slot that is not the right one
		}
	default:
		h, err := handle(rsp)
		if err != nil {
			return err
		}
		t.own = append(t.own, h)
	}
	return nil
}

// replay is the turn of exchanges.
func replay(all []journal.Exchange) (*turn, error) {
	t := &turn{}
	for _, x := range all {
		if err := t.step(x.Command, x.Response); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// errTurn says that a sequence does more than the journal has room for.
var errTurn = errors.New("the host's sequence is too long for the journal")
