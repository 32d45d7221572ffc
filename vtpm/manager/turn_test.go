package manager

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/vtpm/journal"
)

// message is a TPM command or response with a code.
func message(code uint32, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	b = binary.BigEndian.AppendUint32(b, uint32(10+len(body)))
	return append(binary.BigEndian.AppendUint32(b, code), body...)
}

func handleBytes(h uint32) []byte { return binary.BigEndian.AppendUint32(nil, h) }

// saved is a context of an object or session.
func saved(h uint32, blob string) []byte {
	return tpm2.Marshal(tpm2.TPMSContext{
		Sequence: 1, SavedHandle: tpm2.TPMHandle(h), Hierarchy: tpm2.TPMRHOwner, ContextBlob: tpm2.TPM2BContextData{Buffer: []byte(blob)},
	})
}

// TestTurn tells a sequence's story: what is the host's, what is set aside, what is back.
func TestTurn(t *testing.T) {
	const object, session, own = 0x80000001, 0x03000002, 0x80000000
	tr := &turn{}
	for i, s := range []struct {
		cmd, rsp               []byte
		own, objects, sessions int
	}{
		{message(uint32(tpm2.TPMCCContextSave), handleBytes(object)...), message(0, saved(0x80000000, "o")...), 0, 0, 0}, // it is still there
		{message(uint32(tpm2.TPMCCFlushContext), handleBytes(object)...), message(0), 0, 1, 0},
		{message(uint32(tpm2.TPMCCContextSave), handleBytes(session)...), message(0, saved(session, "s")...), 0, 1, 1},
		{message(uint32(tpm2.TPMCCCreatePrimary)), message(uint32(tpm2.TPMRCObjectMemory)), 0, 1, 1},
		{message(uint32(tpm2.TPMCCCreatePrimary)), message(0, handleBytes(own)...), 1, 1, 1},
		{message(uint32(tpm2.TPMCCFlushContext), handleBytes(own)...), message(0), 0, 1, 1},
		{message(uint32(tpm2.TPMCCContextLoad), saved(session, "s")...), message(0, handleBytes(session)...), 0, 1, 0},
		{message(uint32(tpm2.TPMCCContextLoad), saved(0x80000000, "o")...), message(0, handleBytes(own)...), 1, 1, 0}, // not its slot
		{message(uint32(tpm2.TPMCCContextLoad), saved(0x80000000, "o")...), message(0, handleBytes(object)...), 1, 0, 0},
		{message(uint32(tpm2.TPMCCFlushContext), handleBytes(own)...), message(0), 0, 0, 0},
	} {
		if err := tr.step(s.cmd, s.rsp); err != nil {
			t.Fatal(i, err)
		}
		if len(tr.own) != s.own || len(tr.objects) != s.objects || len(tr.sessions) != s.sessions {
			t.Errorf("after %d: own %x, %d objects, %d sessions", i, tr.own, len(tr.objects), len(tr.sessions))
		}
	}
}

// FuzzTurn: exchanges that a manager left which was taken over are a turn or refused.
func FuzzTurn(f *testing.F) {
	f.Add(message(uint32(tpm2.TPMCCContextSave), handleBytes(0x80000001)...), message(0, saved(0x80000000, "o")...))
	f.Add(message(uint32(tpm2.TPMCCContextLoad), saved(0x80000000, "o")...), message(0, handleBytes(0x80000000)...))
	f.Add(message(uint32(tpm2.TPMCCFlushContext)), message(0))
	f.Add(message(uint32(tpm2.TPMCCContextSave), 0x80), message(0, 1, 2, 3))
	f.Fuzz(func(t *testing.T, cmd, rsp []byte) {
		first := journal.Exchange{Command: message(uint32(tpm2.TPMCCContextSave), handleBytes(0x80000001)...), Response: message(0, saved(0x80000000, "o")...)}
		tr, err := replay([]journal.Exchange{first, {Command: cmd, Response: rsp}})
		if err != nil && !errors.Is(err, journal.ErrJournal) {
			t.Fatal(err)
		}
		if err == nil && len(tr.own)+len(tr.objects)+len(tr.sessions) > 2 {
			t.Fatalf("%+v of two commands", tr)
		}
	})
}
