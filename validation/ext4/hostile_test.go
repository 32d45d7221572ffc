package ext4

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// seven is a name in the images.
var seven = "7-" + strings.Repeat("n", 40)

// memory is an image that a test changes.
type memory []byte

func load(t testing.TB, name string) memory { return loadImage(t, name) }

func (m memory) open(t testing.TB) *FS {
	t.Helper()
	f, err := Open(bytes.NewReader(m), int64(len(m)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (m memory) inode(t testing.TB, path string) (in *Inode, raw []byte) {
	t.Helper()
	e, err := m.open(t).Lookup(path)
	if err != nil {
		t.Fatal(err)
	}
	return e.Inode, m[e.Inode.offset:][:len(e.Inode.raw)]
}

// entry is where a directory's entry for a name begins, in the only block of it.
func (m memory) entry(t testing.TB, dir, name string) []byte {
	t.Helper()
	in, _ := m.inode(t, dir)
	for e, err := range in.Extents() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind != Data {
			continue
		}
		b := m[e.Offset:][:e.Length]
		for i := 8; i+len(name) <= len(b); i += 4 {
			if int(b[i-2]) == len(name) && string(b[i:][:len(name)]) == name {
				return b[i-8:]
			}
		}
	}
	t.Fatalf("no entry %s in %s", name, dir)
	return nil
}

func walkErrors(t testing.TB, f *FS) (all []string, names int) {
	t.Helper()
	for e, err := range f.Walk() {
		if names++; names > 10000 {
			t.Fatal("the walk does not end")
		}
		if err != nil {
			all = append(all, e.Path+": "+err.Error())
			names--
		}
	}
	return all, names
}

// TestDirectoryLoop: a directory that is in itself is entered once, and said.
func TestDirectoryLoop(t *testing.T) {
	m := load(t, "maps")
	_, before := walkErrors(t, m.open(t))
	dir, _ := m.inode(t, "/other")
	e := m.entry(t, "/other", seven)
	binary.LittleEndian.PutUint32(e, dir.Number)
	e[7] = 2
	all, names := walkErrors(t, m.open(t))
	if len(all) != 1 || !strings.Contains(all[0], "second name of a directory") || names != before {
		t.Errorf("%q, %d names of %d", all, names, before)
	}
}

// TestLyingType: a directory that its entry calls a file is entered all the same.
func TestLyingType(t *testing.T) {
	m := load(t, "maps")
	_, before := walkErrors(t, m.open(t))
	e := m.entry(t, "/", "other")
	e[7] = 1
	all, names := walkErrors(t, m.open(t))
	if len(all) != 1 || !strings.Contains(all[0], "its name says type") || names != before {
		t.Errorf("%q, %d names of %d", all, names, before)
	}
}

// TestNamesThatAreNone: what no kernel would look up is an error, the names around it are read.
func TestNamesThatAreNone(t *testing.T) {
	for _, spoil := range []func(e []byte){
		func(e []byte) { e[8] = '/' },
		func(e []byte) { e[9] = 0 },
		func(e []byte) { binary.LittleEndian.PutUint32(e, 1<<30) },
		func(e []byte) { binary.LittleEndian.PutUint32(e, 100) }, // an inode that is not used
	} {
		m := load(t, "maps")
		_, before := walkErrors(t, m.open(t))
		spoil(m.entry(t, "/other", seven))
		all, names := walkErrors(t, m.open(t))
		if len(all) != 1 || names != before-1 {
			t.Errorf("%q, %d names of %d", all, names, before)
		}
	}
}

// TestMapThatNeverEnds: a block map all of whose pointers lead to one block is given up, by who reads it all.
func TestMapThatNeverEnds(t *testing.T) {
	m := load(t, "maps")
	in, raw := m.inode(t, "/sparse")
	var node int64
	for e, err := range in.Extents() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == Metadata {
			node = e.Offset
		}
	}
	for i := range int64(256) {
		binary.LittleEndian.PutUint32(m[node+4*i:], uint32(node/1024))
	}
	binary.LittleEndian.PutUint32(raw[0x28+4*14:], uint32(node/1024))
	binary.LittleEndian.PutUint32(raw[4:], 1<<31)
	f := m.open(t)
	e, err := f.Lookup("/sparse")
	if err != nil {
		t.Fatal(err)
	}
	var last error
	for _, last = range e.Inode.Extents() {
	}
	if !isAny(last, ErrEffort) {
		t.Errorf("%v", last)
	}
	found := false
	for err := range f.Check() {
		found = found || isAny(err, ErrCorrupt, ErrEffort)
	}
	if !found {
		t.Error("the check finds nothing")
	}
}

// TestUnknownFeatures are refused by their names and bits.
func TestUnknownFeatures(t *testing.T) {
	for bits, want := range map[uint32]string{0x10000: "encrypt", 0x20000: "casefold", 1 << 27: "incompat bit 27 (0x8000000)", 8: "external journal"} {
		m := load(t, "extents")
		b := m[superOffset:]
		binary.LittleEndian.PutUint32(b[0x60:], binary.LittleEndian.Uint32(b[0x60:])|bits)
		_, err := Open(bytes.NewReader(m), int64(len(m)), Options{})
		if !isAny(err, ErrUnsupported) || !strings.Contains(err.Error(), want) {
			t.Errorf("%#x: %v", bits, err)
		}
	}
}

// TestChecksums: a bit that changes in any metadata is found, by reading and by the check.
func TestChecksums(t *testing.T) {
	whole := load(t, "sums")
	dir, _ := whole.inode(t, "/other")
	acl, _ := whole.inode(t, "/sparse")
	g, err := whole.open(t).group(0)
	if err != nil {
		t.Fatal(err)
	}
	places := map[string]int64{
		"inode": dir.offset + 8, "attributes": 1024*int64(acl.acl) + 700, "descriptor": g.offset + 12,
		"inode bitmap": 1024*int64(g.inodeBitmap) + 15, "block bitmap": 1024*int64(g.blockBitmap) + 30,
	}
	for e, err := range dir.Extents() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == Data {
			places["hash tree"], places["directory"] = e.Offset+0x1c, e.Offset+1024+500
			break
		}
	}
	for e, err := range acl.Extents() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == Metadata {
			places["extent block"] = e.Offset + 40 // the last one of these
		}
	}
	for what, off := range places {
		m := bytes.Clone(whole)
		m[off] ^= 4
		f := memory(m).open(t)
		found := false
		for err := range f.Check() {
			found = found || isAny(err, ErrChecksum)
		}
		if !found {
			t.Errorf("%s: a changed bit at byte %d is not found", what, off)
		}
	}
	super := bytes.Clone(whole)
	super[superOffset+0x90] ^= 1
	if _, err := Open(bytes.NewReader(super), int64(len(super)), Options{}); !isAny(err, ErrChecksum) {
		t.Errorf("superblock: %v", err)
	}
}

// TestCutShort: devices of every size are refused or read without a crash.
func TestCutShort(t *testing.T) {
	m := load(t, "sums")
	for size := 0; size < len(m); size += 511 {
		if _, err := Open(bytes.NewReader(m[:size]), int64(size), Options{}); err == nil {
			t.Errorf("%d bytes of %d are taken", size, len(m))
		}
	}
	if _, err := Open(bytes.NewReader(m[:100<<10]), int64(len(m)), Options{}); err != nil {
		t.Fatal(err)
	}
}

// TestLookup finds files by paths, through links.
func TestLookup(t *testing.T) {
	m := load(t, "inline")
	f := m.open(t)
	for path, kind := range map[string]uint32{
		"/": unix.S_IFDIR, "": unix.S_IFDIR, "dir/link": unix.S_IFLNK, "/dir/../dir/./file": unix.S_IFREG, "/../hard": unix.S_IFREG, "//dir//null": unix.S_IFCHR,
		"/dir/link/0-" + strings.Repeat("n", 40): unix.S_IFREG,
	} {
		if e, err := f.Lookup(path); err != nil || e.Inode.Type() != kind || !strings.HasPrefix(e.Path, "/") {
			t.Errorf("%q: %v, %v", path, e, err)
		}
	}
	for _, path := range []string{"/none", "/file/below", "/dir/link/none"} {
		if _, err := f.Lookup(path); !isAny(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", path, err)
		}
	}
	_, raw := m.inode(t, "/dir/link")
	copy(raw[0x28:], "/dir/link\x00")
	raw[4] = 9
	if _, err := m.open(t).Follow("/dir/link"); !isAny(err, unix.ELOOP) {
		t.Errorf("a link to itself: %v", err)
	}
}

// TestACL holds the form that programs see to the kernel's.
func TestACL(t *testing.T) {
	disk := []byte{1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 7, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 0x10, 0, 7, 0, 0x20, 0, 4, 0}
	want := "0200000001000600ffffffff02000700e803000004000400ffffffff10000700ffffffff20000400ffffffff"
	got, ok := convertACL(disk)
	if !ok || fmt.Sprintf("%x", got) != want {
		t.Errorf("%x, %v", got, ok)
	}
	for n := range disk {
		if _, ok := convertACL(disk[:n]); ok != (n == 4 || n == 8 || n == 16 || n == 20 || n == 24) {
			t.Errorf("%d bytes of it: %v", n, ok)
		}
	}
}

// TestInlineParent: a directory in its inode whose parent is no inode is an error, and its entries are read.
func TestInlineParent(t *testing.T) {
	m := load(t, "inline")
	_, before := walkErrors(t, m.open(t))
	in, raw := m.inode(t, "/dir")
	if in.Flags&flagInline == 0 {
		t.Fatal("it is not in its inode")
	}
	binary.LittleEndian.PutUint32(raw[blockFieldAt:], 1<<20)
	all, names := walkErrors(t, m.open(t))
	if len(all) != 1 || !strings.Contains(all[0], "parent in inode") || names != before {
		t.Errorf("%q, %d names of %d", all, names, before)
	}
	found := false
	for err := range m.open(t).Check() {
		found = found || strings.Contains(err.Error(), "parent in inode")
	}
	if !found {
		t.Error("the check finds nothing")
	}
}
