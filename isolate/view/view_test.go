package view

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"redoubt.dev/redoubt/introspect/paging"
)

func make2(t *testing.T) (*View, []byte, []byte) {
	t.Helper()
	rw, ro := make([]byte, RWSize), make([]byte, ROSize)
	v, err := New(rw, ro)
	if err != nil {
		t.Fatal(err)
	}
	return v, rw, ro
}

// walker reads the view's tables as another program does.
func walker(rw, ro []byte) *paging.Space {
	return &paging.Space{Memory: memory{rw, ro}, Root: Physical, Levels: 4}
}

type memory struct{ rw, ro []byte }

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	switch at := uint64(off); {
	case at >= Physical && at < ROPhysical:
		return bytes.NewReader(m.rw).ReadAt(p, int64(at-Physical))
	case at >= ROPhysical:
		return bytes.NewReader(m.ro).ReadAt(p, int64(at-ROPhysical))
	}
	return 0, errors.New("outside the view")
}

func TestMap(t *testing.T) {
	v, rw, ro := make2(t)
	space := walker(rw, ro)
	for _, c := range []struct {
		virtual, physical uint64
		rights            Rights
	}{
		{0xffffffffc0123000, 0x4567000, Execute},
		{0xffff888001234000, 0x1234000, Write},
		{0xffff888001235000, 0x1235000, 0},
		{0x7fffdeadb000, 0x777000, Write | User},
	} {
		if err := v.Map(c.virtual, c.physical, c.rights); err != nil {
			t.Fatal(err)
		}
		m, err := space.Walk(c.virtual + 0x123)
		want := paging.Mapping{
			Virtual: c.virtual, Physical: c.physical, Size: PageSize,
			Writable: c.rights&Write != 0, Executable: c.rights&Execute != 0, User: c.rights&User != 0,
		}
		if err != nil || m != want {
			t.Errorf("%#x: %+v, %v; want %+v", c.virtual, m, err, want)
		}
	}
	v.Unmap(0xffff888001234000)
	v.Unmap(0xffff900000000000) // nothing there
	if m, err := space.Walk(0xffff888001234000); err == nil {
		t.Errorf("what was taken away is %+v", m)
	}
	if err := v.Clear(); err != nil {
		t.Fatal(err)
	}
	if m, err := space.Walk(0xffffffffc0123000); err == nil {
		t.Errorf("after Clear there is %+v", m)
	}
	if m, err := space.Walk(Entry); err != nil || !m.Executable || m.Writable {
		t.Errorf("after Clear the way in is %+v, %v", m, err)
	}
}

// Nothing of the view's own is both writable and executable, and what only the monitor writes is never writable.
func TestOwnPages(t *testing.T) {
	_, rw, ro := make2(t)
	n := 0
	for m, err := range walker(rw, ro).Mappings(0, ^uint64(0), 1<<10) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		if m.Writable && (m.Executable || m.Physical >= ROPhysical) || m.User {
			t.Errorf("%+v", m)
		}
	}
	if n != len(fixedPages) {
		t.Errorf("%d pages", n)
	}
}

func TestFull(t *testing.T) {
	v, _, _ := make2(t)
	var err error
	n := uint64(0)
	for ; err == nil; n++ {
		err = v.Map(0xffff888000000000+n<<21, 0x1000, 0)
	}
	if !errors.Is(err, ErrTables) || n < 400 {
		t.Fatalf("after %d: %v", n, err)
	}
	if err := v.Clear(); err != nil {
		t.Fatal(err)
	}
	if err := v.Map(0xffff888000000000, 0x1000, 0); err != nil {
		t.Error(err)
	}
}

// A module that writes its own tables does not make the monitor write elsewhere.
func TestForgedTables(t *testing.T) {
	v, rw, _ := make2(t)
	const at = 0xffff888000000000
	if err := v.Map(at, 0x1000, 0); err != nil {
		t.Fatal(err)
	}
	top := rw[at>>39&511*8:]
	for _, lie := range []uint64{1, 0x1000 | 1, Physical | 1, Physical + RWSize | 1, Physical + (rwPages-1)*PageSize | 1, 0x000f_ffff_ffff_f001, Physical + trapPage*PageSize | 1} {
		binary.LittleEndian.PutUint64(top, lie)
		if err := v.Map(at, 0x2000, Write); err == nil {
			t.Errorf("an entry %#x is followed", lie)
		}
		v.Unmap(at)
	}
}

// The stubs: each ends in the same way, with the vector and an error code on the stack.
func TestStubs(t *testing.T) {
	_, _, ro := make2(t)
	for i := range 256 {
		gate := ro[idtPage*PageSize+i*16:]
		le := binary.LittleEndian
		to := uint64(le.Uint16(gate)) | uint64(le.Uint16(gate[6:]))<<16 | uint64(le.Uint32(gate[8:]))<<32
		if want := uint64(Virtual+RWSize+stubPage*PageSize) + uint64(i)*16; to != want || gate[4] != 1 || gate[5] != 0x8e {
			t.Fatalf("gate %d leads to %#x: % x", i, to, gate[:16])
		}
		code := ro[stubPage*PageSize+i*16:][:16]
		if !HasErrorCode(byte(i)) {
			if !bytes.HasPrefix(code, []byte{0x6a, 0}) {
				t.Fatalf("stub %d: % x", i, code)
			}
			code = code[2:]
		}
		if want := []byte{0x6a, byte(i), 0xe6, TrapPort, 0x48, 0x83, 0xc4, 0x10, 0x48, 0xcf}; !bytes.HasPrefix(code, want) {
			t.Fatalf("stub %d: % x", i, code)
		}
	}
}

func TestTrap(t *testing.T) {
	v, rw, _ := make2(t)
	for i, w := range []uint64{0xffff_ffff_ffff_ff80 | 14, 2, 0x1234, CodeSelector, 0x202, 0x5678, DataSelector} {
		binary.LittleEndian.PutUint64(rw[trapTop-56+i*8:], w)
	}
	got := v.Trap()
	if want := (Trap{0x8e, 2, 0x1234, CodeSelector, 0x202, 0x5678, DataSelector}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
