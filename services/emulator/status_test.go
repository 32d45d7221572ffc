package emulator

import (
	"encoding/binary"
	"log/slog"
	"os"
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

func guestMemory(t *testing.T, size uint64) *os.File {
	t.Helper()
	f, err := memfd.New("memory", int64(size))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestStatusBounds: the word must be the guest's memory as a whole, as its machine lays it out.
func TestStatusBounds(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		machine  spec.Emulator
		size, at uint64
		file     int64 // where it is in the memory's file; -1: refused
	}{
		{spec.Native, gib, 0x1000, 0x1000},
		{spec.Native, gib, gib - 4, gib - 4},
		{spec.Native, gib, gib, -1},
		{spec.Native, gib, gib - 2, -1},
		{spec.Native, 4 * gib, 3*gib - 4, 3*gib - 4},
		{spec.Native, 4 * gib, 3 * gib, -1}, // the hole
		{spec.Native, 4 * gib, 4 * gib, 3 * gib},
		{spec.Native, 4 * gib, 5*gib - 4, 4*gib - 4},
		{spec.Native, 4 * gib, 5 * gib, -1},
		{spec.QEMU, 4 * gib, 2*gib - 4, 2*gib - 4},
		{spec.QEMU, 4 * gib, 2 * gib, -1},
		{spec.QEMU, 4 * gib, 4 * gib, 2 * gib},
		{spec.QEMU, gib, 1<<64 - 4, -1},
		{"other", gib, 0x1000, -1},
	} {
		memory := guestMemory(t, c.size)
		s, err := newStatus(protocol.Start{Emulator: c.machine, Memory: c.size, Status: c.at}, memory)
		if c.file < 0 {
			if rpc.KindOf(err) != rpc.Invalid || !strings.Contains(err.Error(), "validation.status: ") {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		if _, err := memory.WriteAt(binary.LittleEndian.AppendUint32(nil, 0x01020304), c.file); err != nil {
			t.Fatal(err)
		}
		if n, err := s.read(); n != 0x01020304 || err != nil {
			t.Errorf("%+v: %#x, %v", c, n, err)
		}
		s.close()
	}
	if s, err := newStatus(protocol.Start{}, nil); s != nil || err != nil {
		t.Error(s, err)
	}
}

// TestLookStatus: the guest's word is told, and what cannot be read is no word.
func TestLookStatus(t *testing.T) {
	m, memory := &still{}, guestMemory(t, 1<<20)
	word, err := newStatus(protocol.Start{Emulator: spec.Native, Memory: 1 << 20, Status: 0x8000}, memory)
	if err != nil {
		t.Fatal(err)
	}
	s := &service{log: slog.New(slog.DiscardHandler), machine: m, holder: &holder{guest: m}, status: word, resumed: make(chan struct{})}
	for _, b := range []byte{1, 0} {
		if _, err := memory.WriteAt([]byte{b}, 0x8003); err != nil { // any bit of it counts
			t.Fatal(err)
		}
		if out, err := trap(t, s, false, true); err != nil || out.Status != uint32(b)<<24 {
			t.Fatalf("%+v, %v", out, err)
		}
	}
	word.close()
	if _, err := trap(t, s, false, true); err == nil {
		t.Error("what cannot be read counts as nothing")
	}
}
