package inspect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"redoubt.dev/redoubt/introspect/image"
	"redoubt.dev/redoubt/introspect/introspecttest"
	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/memory"
)

// readsDump: a copy of the memory, and an ELF core of it, answer as the guest does.
func readsDump(t *testing.T, w world) {
	raw := make([]byte, introspecttest.Memory)
	if _, err := w.g.Memory.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	const above = 1 << 20
	for name, file := range map[string][]byte{
		"raw":  raw,
		"core": core(segment{0, raw[:above]}, segment{above, raw[above:]}),
	} {
		p, err := memory.Open(bytes.NewReader(file), uint64(len(file)), memory.QEMU)
		if err != nil {
			t.Fatal(err)
		}
		a, l, err := Ask(Guest{p, func() ([]byte, error) { return w.g.Image.ELF, nil }}, Question{What: []string{Modules}})
		if err != nil || len(a.Modules.Modules) != len(w.g.Said["modules"]) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
		if err := l.Check(); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := Ask(Guest{mustMemory(t, raw[:8<<20]), func() ([]byte, error) { return w.g.Packed, nil }}, Question{What: []string{Modules}, Layout: w.g.Layout}); !errors.Is(err, kernel.ErrNotFound) {
		t.Errorf("a part of it: %v", err)
	}
	if _, err := image.Unpack(w.g.Packed[:len(w.g.Packed)/2]); err == nil {
		t.Error("half an image was unpacked")
	}
}

func mustMemory(t *testing.T, b []byte) *memory.Physical {
	t.Helper()
	p, err := memory.New(bytes.NewReader(b), uint64(len(b)), memory.Flat)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

type segment struct {
	physical uint64
	data     []byte
}

// core is an ELF core of segments, as QEMU writes it (dump/dump.c).
func core(all ...segment) []byte {
	le := binary.LittleEndian
	b := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	b = le.AppendUint16(b, 4)  // ET_CORE
	b = le.AppendUint16(b, 62) // EM_X86_64
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{0, 64, 0} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, uint16(len(all)), 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	at := uint64(64 + 56*len(all))
	for _, s := range all {
		b = le.AppendUint32(b, 1) // PT_LOAD
		b = le.AppendUint32(b, 0)
		n := uint64(len(s.data))
		for _, v := range []uint64{at, 0, s.physical, n, n, 0} {
			b = le.AppendUint64(b, v)
		}
		at += n
	}
	for _, s := range all {
		b = append(b, s.data...)
	}
	return b
}
