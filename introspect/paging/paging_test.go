package paging

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"
)

// ram is a guest's memory of which tables are made from the top down.
type ram struct {
	b    []byte
	next uint64
}

func newRAM(size int) *ram { return &ram{make([]byte, size), uint64(size)} }

func (r *ram) table() uint64 { r.next -= tableSize; return r.next }

func (r *ram) entry(at uint64) uint64 { return binary.LittleEndian.Uint64(r.b[at:]) }

func (r *ram) set(at, e uint64) { binary.LittleEndian.PutUint64(r.b[at:], e) }

// space is one with an empty root.
func (r *ram) space(levels int) *Space {
	return &Space{Memory: bytes.NewReader(r.b), Root: r.table() | 0xfff, Levels: levels} // with a PCID
}

// put maps an address by an entry of a level, below tables that allow all.
func (r *ram) put(s *Space, virtual uint64, level int, e uint64) (at uint64) {
	table := s.Root & addressMask
	for l := s.Levels; ; l-- {
		at = table + virtual>>shift(l)&(perTable-1)*entrySize
		if l == level {
			r.set(at, e)
			return at
		}
		if r.entry(at)&present == 0 {
			r.set(at, r.table()|present|writable|user)
		}
		table = r.entry(at) & addressMask
	}
}

// TestWalk: each size of page, at both numbers of levels, in both halves of the addresses.
func TestWalk(t *testing.T) {
	for _, levels := range []int{4, 5} {
		for _, upper := range []uint64{0, ^uint64(0) << (shift(levels+1) - 1)} {
			r := newRAM(1 << 20)
			s := r.space(levels)
			const gib, mib = 1 << 30, 1 << 20
			for _, c := range []struct {
				virtual uint64
				level   int
				entry   uint64
				want    Mapping
			}{
				{upper + 0x1000, 1, 0x7000 | present | large, Mapping{Physical: 0x7000, Size: 4096, Executable: true}}, // its bit 7 is PAT
				{upper + 0x2000, 1, 0xfffff_ffff_f000 | present | writable | user | noExec, Mapping{Physical: 0xfffff_ffff_f000, Size: 4096, Writable: true, User: true}},
				{upper + 4*mib, 2, 6*mib | present | large | writable | 1<<12, Mapping{Physical: 6 * mib, Size: 2 * mib, Writable: true, Executable: true}},
				{upper + 3*gib, 3, 5*gib | present | large | user, Mapping{Physical: 5 * gib, Size: gib, User: true, Executable: true}},
			} {
				r.put(s, c.virtual, c.level, c.entry)
				c.want.Virtual = c.virtual
				for _, at := range []uint64{c.virtual, c.virtual + 0x123, c.virtual + c.want.Size - 1} {
					if m, err := s.Walk(at); err != nil || m != c.want {
						t.Errorf("%d levels, %#x: %+v, %v, want %+v", levels, at, m, err, c.want)
					}
				}
			}
		}
	}
}

// TestRights: a right that any level denies is not there.
func TestRights(t *testing.T) {
	for level := 1; level <= 4; level++ {
		for deny, want := range map[uint64]Mapping{
			writable: {Virtual: 0x1000, Physical: 0x5000, Size: 4096, User: true, Executable: true},
			user:     {Virtual: 0x1000, Physical: 0x5000, Size: 4096, Writable: true, Executable: true},
			noExec:   {Virtual: 0x1000, Physical: 0x5000, Size: 4096, Writable: true, User: true},
		} {
			r := newRAM(1 << 16)
			s := r.space(4)
			r.put(s, 0x1000, 1, 0x5000|present|writable|user)
			table := s.Root & addressMask
			for l := 4; l > level; l-- {
				table = r.entry(table+0x1000>>shift(l)&(perTable-1)*entrySize) & addressMask
			}
			at := table + 0x1000>>shift(level)&(perTable-1)*entrySize
			r.set(at, r.entry(at)^deny)
			if m, err := s.Walk(0x1000); err != nil || m != want {
				t.Errorf("level %d without %#x: %+v, %v", level, deny, m, err)
			}
		}
	}
}

// TestNotThere: what has no page says which level ends the walk; what no processor takes is refused, and so are
// tables and pages beyond the memory.
func TestNotThere(t *testing.T) {
	r := newRAM(1 << 16)
	s := r.space(4)
	r.put(s, 0x1000, 1, 0x5000|present)
	r.put(s, 0x200000, 2, 0)
	for virtual, level := range map[uint64]int{
		0x2000: 1, 0x200000: 2, 1 << 30: 3, 1 << 39: 4, 1 << 47: 0, 1<<64 - 1<<48: 0, 1<<64 - 1<<47: 4,
	} {
		var none *NotMappedError
		if _, err := s.Walk(virtual); !errors.As(err, &none) || none.Level != level || none.Virtual != virtual {
			t.Errorf("%#x: %v", virtual, err)
		}
	}
	for name, e := range map[string]uint64{"PS of level 4": 0x1000 | present | large, "an address within the page": 1<<13 | present | large} {
		level := 4
		if name != "PS of level 4" {
			level = 3
		}
		r.put(s, 2<<39, level, e)
		if _, err := s.Walk(2 << 39); !errors.Is(err, ErrTable) {
			t.Errorf("%s: %v", name, err)
		}
		r.put(s, 2<<39, 4, 0)
	}
	r.put(s, 3<<39, 4, 1<<40|present)
	if _, err := s.Walk(3 << 39); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a table beyond the memory: %v", err)
	}
	r.put(s, 0x3000, 1, 1<<40|present)
	if _, err := s.ReadAt(make([]byte, 1), 0x3000); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a page beyond the memory: %v", err)
	}
	if _, err := (&Space{Memory: s.Memory, Root: s.Root, Levels: 3}).Walk(0); err == nil {
		t.Error("three levels")
	}
}

// TestReadAt: what is read crosses pages that are no neighbours, and ends where the first is not there.
func TestReadAt(t *testing.T) {
	r := newRAM(1 << 16)
	s := r.space(4)
	const base = 1<<64 - 1<<47 // the kernel's half
	r.put(s, base+0x1000, 1, 0x5000|present)
	r.put(s, base+0x2000, 1, 0x3000|present)
	copy(r.b[0x5ffc:], "abcd")
	copy(r.b[0x3000:], "efgh")
	p := make([]byte, 8)
	at := uint64(base + 0x1ffc)
	if n, err := s.ReadAt(p, int64(at)); n != 8 || err != nil || string(p) != "abcdefgh" {
		t.Errorf("%q, %d, %v", p, n, err)
	}
	var none *NotMappedError
	at = base + 0x2ffc
	if n, err := s.ReadAt(p, int64(at)); n != 4 || !errors.As(err, &none) || none.Virtual != base+0x3000 {
		t.Errorf("%d, %v", n, err)
	}
}

// TestMappings: the pages of a range in order, no more; tables that lead to themselves end the listing within
// its bound.
func TestMappings(t *testing.T) {
	r := newRAM(1 << 18)
	s := r.space(4)
	const kernel = 1<<64 - 1<<47
	want := []uint64{0x1000, 0x200000, 1 << 30, kernel, kernel + 0x5000}
	for i, v := range want {
		level := []int{1, 2, 3, 1, 1}[i]
		e := uint64(present)
		if level > 1 {
			e |= large
		}
		r.put(s, v, level, e)
	}
	list := func(first, last uint64) (all []uint64) {
		for m, err := range s.Mappings(first, last, 100) {
			if err != nil {
				t.Fatal(err)
			}
			if w, err := s.Walk(m.Virtual); err != nil || w != m {
				t.Errorf("%+v, walked %+v, %v", m, w, err)
			}
			all = append(all, m.Virtual)
		}
		return all
	}
	if got := list(0, 1<<64-1); !slices.Equal(got, want) {
		t.Errorf("%x", got)
	}
	if got := list(0x2000, kernel+0x4fff); !slices.Equal(got, want[1:4]) {
		t.Errorf("%x", got)
	}
	for m, err := range s.Mappings(0, 1<<64-1, 100) { // who has enough is given no more
		if m.Virtual != 0x1000 || err != nil {
			t.Errorf("%+v, %v", m, err)
		}
		break
	}
	for i := range uint64(perTable) {
		r.set(s.Root&addressMask+i*entrySize, s.Root&addressMask|present)
	}
	n, last := 0, error(nil)
	for _, err := range s.Mappings(0, 1<<64-1, 100) {
		n, last = n+1, err
	}
	if !errors.Is(last, errBudget) || n > 100*perTable {
		t.Errorf("%d pages, %v", n, last)
	}
}

// FuzzWalk: whatever is in the memory, a walk ends, and says what its tables say.
func FuzzWalk(f *testing.F) {
	r := newRAM(1 << 15)
	s := r.space(4)
	r.put(s, 0x1000, 1, 0x5000|present)
	f.Add(r.b, s.Root, uint64(0x1000), false)
	f.Add([]byte("short"), uint64(0), ^uint64(0), true)
	f.Fuzz(func(t *testing.T, memory []byte, root, virtual uint64, five bool) {
		s := &Space{Memory: bytes.NewReader(memory), Root: root, Levels: 4}
		if five {
			s.Levels = 5
		}
		m, err := s.Walk(virtual)
		if err == nil && (m.Size < 4096 || m.Virtual > virtual || virtual-m.Virtual >= m.Size || m.Physical&(m.Size-1) != 0) {
			t.Errorf("%#x: %+v", virtual, m)
		}
		listed := Mapping{}
		var failed error
		for l, err := range s.Mappings(virtual, virtual, 8) {
			listed, failed = l, err
		}
		// Both read the same tables: whole ones there, entries here.
		if failed == nil && (err == nil) != (listed != Mapping{}) || failed == nil && err == nil && listed != m {
			t.Errorf("%#x: walked %+v, %v, listed %+v", virtual, m, err, listed)
		}
		p := make([]byte, 64)
		if n, err := s.ReadAt(p, int64(virtual)); n < len(p) && err == nil {
			t.Errorf("%d bytes and no error", n)
		}
	})
}

// TestKeep: with kept pages as without, the same is read; what has changed is found when they are to be kept anew.
func TestKeep(t *testing.T) {
	r := newRAM(4 << 20)
	s := r.space(4)
	const page, large = 0x7000_0000_0000, 0x7000_0020_0000
	r.put(s, page, 1, 0x3000|present)
	r.put(s, page+tableSize, 1, 0x5000|present)
	at := r.put(s, large, 2, 0|present|1<<7)
	copy(r.b[0x3ff8:], "the end")
	copy(r.b[0x5000:], "the beginning")
	read := func(virtual int64) string {
		b := make([]byte, 16)
		if n, err := s.ReadAt(b, virtual); err != nil {
			t.Fatal(n, err)
		}
		return string(b)
	}
	want := []string{read(page + 0xff8), read(large + 0x5000), read(large + 0x3ff8)}
	if want[0] != "the end\x00the begi" || want[1] != "the beginning\x00\x00\x00" {
		t.Fatalf("%q", want)
	}
	s.Keep()
	for range 2 {
		if got := []string{read(page + 0xff8), read(large + 0x5000), read(large + 0x3ff8)}; !slices.Equal(got, want) {
			t.Errorf("%q, not %q", got, want)
		}
	}
	r.set(at, 0)
	if got := read(large + 0x5000); got != want[1] {
		t.Errorf("%q", got)
	}
	s.Keep()
	if n, err := s.ReadAt(make([]byte, 8), large); err == nil {
		t.Errorf("%d bytes of a page that is gone", n)
	}
}
