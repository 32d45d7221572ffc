package memory

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
)

// sparse is a file of which each 8 bytes are their offset.
type sparse struct{ size int64 }

func (s sparse) ReadAt(p []byte, off int64) (n int, err error) {
	for ; n < len(p) && off+int64(n) < s.size; n++ {
		at := off + int64(n)
		p[n] = byte(at &^ 7 >> (8 * (at & 7)))
	}
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

// TestMachines: an address is where the machine has it, and the hole is no memory.
func TestMachines(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		machine  Machine
		size     uint64
		at, want uint64
		ok       bool
	}{
		{Native, gib, gib - 8, gib - 8, true},
		{Native, gib, gib, 0, false},
		{Native, 4 * gib, 3*gib - 8, 3*gib - 8, true},
		{Native, 4 * gib, 3 * gib, 0, false},
		{Native, 4 * gib, 4 * gib, 3 * gib, true},
		{Native, 4 * gib, 5*gib - 8, 4*gib - 8, true},
		{Native, 4 * gib, 5 * gib, 0, false},
		{QEMU, 2 * gib, 2*gib - 8, 2*gib - 8, true},
		{QEMU, 11 * gib / 4, 2 * gib, 0, false}, // 0xb0000000
		{QEMU, 11 * gib / 4, 4 * gib, 2 * gib, true},
		{QEMU, 5 * gib / 2, 2 * gib, 2 * gib, true},
		{Flat, 4 * gib, 3 * gib, 3 * gib, true},
	} {
		p, err := New(sparse{int64(c.size)}, c.size, c.machine)
		if err != nil {
			t.Fatal(err)
		}
		var b [8]byte
		_, err = p.ReadAt(b[:], int64(c.at))
		if got := binary.LittleEndian.Uint64(b[:]); (err == nil) != c.ok || c.ok && got != c.want {
			t.Errorf("%s, %#x: %#x is %#x, %v", c.machine, c.size, c.at, got, err)
		}
		if !c.ok && !errors.Is(err, ErrNone) {
			t.Errorf("%s: %v", c.machine, err)
		}
	}
	if _, err := New(nil, 1, "xen"); err == nil {
		t.Error("an unknown machine")
	}
	// A file that is shorter than it says.
	p, err := New(sparse{4096}, 8192, Flat)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := p.ReadAt(make([]byte, 100), 4000); n != 96 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(n, err)
	}
}

// TestCache: what is read is the memory's, over pages, at its end, and as it was until it is to be forgotten.
func TestCache(t *testing.T) {
	b := make([]byte, 3*pageSize+100)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	want := bytes.Clone(b)
	c := NewCache(bytes.NewReader(b))
	for _, r := range [][2]int{{0, 10}, {pageSize - 5, 10}, {10, 2 * pageSize}, {3 * pageSize, 100}, {2*pageSize + 1, pageSize + 99}} {
		got := make([]byte, r[1])
		if n, err := c.ReadAt(got, int64(r[0])); n != r[1] || err != nil || !bytes.Equal(got, want[r[0]:r[0]+r[1]]) {
			t.Errorf("%v: %d, %v", r, n, err)
		}
	}
	if n, err := c.ReadAt(make([]byte, 200), 3*pageSize); n != 100 || err == nil {
		t.Error(n, err)
	}
	b[5]++
	var one [1]byte
	if _, _ = c.ReadAt(one[:], 5); one[0] != want[5] {
		t.Error("read twice")
	}
	c.Forget()
	if _, _ = c.ReadAt(one[:], 5); one[0] != b[5] {
		t.Error("not read anew")
	}
	// A page that cannot be read whole, in the place of one that was: neither is taken for the other.
	far := sparse{cacheSize*pageSize + 100}
	c = NewCache(far)
	for range 2 {
		for _, at := range []int64{8, cacheSize*pageSize + 8, 16} {
			var got, want [8]byte
			_, _ = far.ReadAt(want[:], at)
			if _, err := c.ReadAt(got[:], at); err != nil || got != want {
				t.Errorf("at %#x: %x, %v, want %x", at, got, err, want)
			}
		}
	}
}

// coreFile is an ELF core with segments (address, offset, size) of a file of n bytes.
func coreFile(n int, segments ...[3]uint64) []byte {
	le := binary.LittleEndian
	b := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	b = le.AppendUint16(b, 4)
	b = le.AppendUint16(b, 62)
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{0, 64, 0} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, uint16(len(segments)), 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	for _, s := range segments {
		b = le.AppendUint32(b, 1)
		b = le.AppendUint32(b, 0)
		for _, v := range []uint64{s[1], 0, s[0], s[2], s[2], 0} {
			b = le.AppendUint64(b, v)
		}
	}
	b = append(b, make([]byte, max(0, n-len(b)))...)
	for i := 512; i < len(b); i++ {
		b[i] = byte(i)
	}
	return b
}

func TestCore(t *testing.T) {
	b := coreFile(2048, [3]uint64{1 << 32, 1024, 512}, [3]uint64{0, 512, 512})
	p, err := Open(bytes.NewReader(b), 2048, QEMU)
	if err != nil {
		t.Fatal(err)
	}
	var one [1]byte
	for at, want := range map[int64]byte{0: 0, 511: 255, 1<<32 + 3: 3} {
		if _, err := p.ReadAt(one[:], at); err != nil || one[0] != want {
			t.Errorf("%#x: %d, %v", at, one[0], err)
		}
	}
	if p.End() != 1<<32+512 {
		t.Errorf("%#x", p.End())
	}
	for name, b := range map[string][]byte{
		"outside the file":  coreFile(2048, [3]uint64{0, 1024, 2048}),
		"one over another":  coreFile(2048, [3]uint64{0, 512, 512}, [3]uint64{100, 1024, 512}),
		"without any":       coreFile(2048),
		"beyond all memory": coreFile(2048, [3]uint64{1<<64 - 16, 512, 512}),
		"cut":               b[:70],
	} {
		if _, err := Open(bytes.NewReader(b), uint64(len(b)), QEMU); err == nil {
			t.Errorf("a core %s is read", name)
		}
	}
}

// FuzzOpen: whatever the dump, it is refused, or every address can be asked for.
func FuzzOpen(f *testing.F) {
	f.Add(coreFile(2048, [3]uint64{1 << 32, 1024, 512}, [3]uint64{0, 512, 512}), uint64(1)<<32)
	f.Add(make([]byte, 4096), uint64(4090))
	f.Fuzz(func(t *testing.T, b []byte, at uint64) {
		p, err := Open(bytes.NewReader(b), uint64(len(b)), QEMU)
		if err != nil {
			return
		}
		for _, at := range []uint64{at, p.End() - 8, 0} {
			var got [16]byte
			if n, err := NewCache(p).ReadAt(got[:], int64(at)); n < len(got) && err == nil {
				t.Errorf("%#x: %d bytes and no error", at, n)
			}
		}
	})
}
