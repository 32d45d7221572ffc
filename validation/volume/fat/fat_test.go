package fat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
)

// small is a FAT12 file system of one directory and two files, and where its parts are.
func small() []byte {
	const sector = 512
	b := make([]byte, 200*sector)
	le := binary.LittleEndian
	copy(b, "\xeb\x3c\x90MSDOS5.0")
	le.PutUint16(b[11:], sector)
	b[13] = 1
	le.PutUint16(b[14:], 1)
	b[16] = 2
	le.PutUint16(b[17:], 16) // entries of the root: one sector
	le.PutUint16(b[19:], 200)
	b[21] = 0xf8
	le.PutUint16(b[22:], 1)
	copy(b[43:], "SMALL      ")
	b[510], b[511] = 0x55, 0xaa
	for _, table := range [][]byte{b[sector:], b[2*sector:]} {
		for n, v := range map[int]uint16{2: 0xfff, 3: 4, 4: 7, 7: 0xfff, 5: 0xff8} {
			lead(table, n, v)
		}
	}
	put := func(off int, name string, attr byte, cluster, size int) {
		copy(b[off:], name)
		b[off+11] = attr
		le.PutUint16(b[off+24:], 45<<9|1<<5|1)
		le.PutUint16(b[off+26:], uint16(cluster))
		le.PutUint32(b[off+28:], uint32(size))
	}
	root := 3 * sector
	put(root, "SMALL      ", attrLabel, 0, 0)
	put(root+32, "DIR        ", attrDirectory, 2, 0)
	put(root+64, "FILE    TXT", 0, 3, 1100)
	dir := 4 * sector
	put(dir, ".          ", attrDirectory, 2, 0)
	put(dir+32, "..         ", attrDirectory, 0, 0)
	put(dir+64, "BELOW      ", attrReadOnly, 5, 10)
	return b
}

// lead sets an entry of a FAT12's table.
func lead(table []byte, n int, v uint16) {
	o := n * 3 / 2
	w := binary.LittleEndian.Uint16(table[o:])
	if n&1 == 1 {
		w = w&0xf | v<<4
	} else {
		w = w&0xf000 | v
	}
	binary.LittleEndian.PutUint16(table[o:], w)
}

func open(t testing.TB, b []byte) *FS {
	t.Helper()
	f, err := Open(reader{b, new(int64)}, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// A reader counts what is read.
type reader struct {
	b     []byte
	bytes *int64
}

func (r reader) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(r.b)) {
		return 0, io.EOF
	}
	n := copy(p, r.b[off:])
	*r.bytes += int64(n)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func errorsOf(f *FS) (all []string) {
	for err := range f.Check() {
		all = append(all, err.Error())
	}
	return all
}

// TestSmall reads a file system that is laid out by hand.
func TestSmall(t *testing.T) {
	f := open(t, small())
	if all := errorsOf(f); all != nil {
		t.Errorf("%q", all)
	}
	file, err := f.Lookup("/file.txt")
	if err != nil || file.Size != 1100 || file.Mtime.Year() != 2025 {
		t.Fatalf("%+v, %v", file, err)
	}
	clusters := ""
	for r, err := range file.Runs() {
		if err != nil {
			t.Fatal(err)
		}
		if !r.Metadata {
			clusters += string(rune('a' + (r.Offset-f.data)/512))
			clusters += string(rune('0' + r.Length/512))
		}
	}
	if clusters != "b2f1" {
		t.Errorf("runs %s", clusters)
	}
	if below, err := f.Lookup("dir/BELOW"); err != nil || !below.ReadOnly {
		t.Errorf("%+v, %v", below, err)
	}
}

// TestHostile: chains that loop or lead nowhere, directories in themselves, lies about sizes.
func TestHostile(t *testing.T) {
	le := binary.LittleEndian
	table, root, dir := 512, 3*512, 4*512
	for want, spoil := range map[string]func(b []byte){
		"another owner":              func(b []byte) { lead(b[table:], 7, 5) },
		"leads to":                   func(b []byte) { lead(b[table:], 4, 1000) },
		"second name of a directory": func(b []byte) { le.PutUint16(b[dir+64+26:], 2); b[dir+64+11] = attrDirectory },
		"clusters for 1700":          func(b []byte) { le.PutUint32(b[root+64+28:], 1700) },
		"from cluster 3 on":          func(b []byte) { le.PutUint32(b[root+64+28:], 1<<31) },
		"in cluster 9999":            func(b []byte) { le.PutUint16(b[root+64+26:], 9999) },
		"takes more than":            func(b []byte) { lead(b[table:], 2, 2) },
		"name":                       func(b []byte) { b[root+64+3] = '/' },
	} {
		b := small()
		spoil(b)
		if all := errorsOf(open(t, b)); !strings.Contains(strings.Join(all, "\n"), want) {
			t.Errorf("%s: %q", want, all)
		}
	}
	for size := 0; size < 200*512; size += 300 {
		if _, err := Open(reader{small()[:size], new(int64)}, int64(size)); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotFAT) {
			t.Fatalf("%d bytes: %v", size, err)
		}
	}
}

// TestShownByTheKernel: what a guest's kernel shows of a directory is shown, whatever else would hide it. A reader that ends at the
// first free entry, or takes a long name for any entry behind it, lets a guest run what its baseline never sees.
func TestShownByTheKernel(t *testing.T) {
	const root = 3 * 512
	names := func(b []byte) string {
		var all []string
		for f, err := range open(t, b).Root().ReadDir() {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, f.Name)
		}
		return strings.Join(all, " ")
	}
	b := small()
	copy(b[root+96+32:], b[root+64:][:32]) // behind an entry that was never used
	copy(b[root+96+32:], "BEHIND  TXT")
	if got := names(b); got != "DIR FILE.TXT BEHIND.TXT" {
		t.Errorf("behind the first free entry: %s", got)
	}
	b = small()
	copy(b[root+96:], b[root+64:][:32])
	long := b[root+64:][:32]
	clear(long)
	long[0], long[11] = 0x41, attrLong
	for i, c := range "other" {
		long[1+2*i] = byte(c)
	}
	long[13] = nameSum([]byte("FILE    TXT"))
	if got := names(b); got != "DIR other" {
		t.Errorf("a long name: %s", got)
	}
	long[13]++
	if got := names(b); got != "DIR FILE.TXT" {
		t.Errorf("a long name of another entry: %s", got)
	}
}

// TestUnread: what cannot be read is an error, not zeros.
func TestUnread(t *testing.T) {
	b := small()
	f, err := Open(reader{b[:6*512], new(int64)}, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	file, err := f.Lookup("/file.txt")
	if err != nil {
		t.Fatal(err)
	}
	c, err := file.Open()
	if err != nil {
		t.Fatal(err)
	}
	if n, err := c.ReadAt(make([]byte, 1100), 0); err == nil || n > 512 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// wide is small as a FAT32: its root is a chain.
func wide() []byte {
	b := small()
	le := binary.LittleEndian
	le.PutUint16(b[22:], 0)
	le.PutUint32(b[36:], 1)
	le.PutUint32(b[44:], 2)
	for i, v := range []uint32{0x0ffffff8, 0x0fffffff, 0x0fffffff, 4, 0x0fffffff} {
		le.PutUint32(b[512+4*i:], v)
	}
	return b
}

// readAll reads all that there is, at a bounded cost.
func readAll(t testing.TB, b []byte) {
	t.Helper()
	r := reader{b, new(int64)}
	v, err := Open(r, int64(len(b)))
	if err != nil {
		return
	}
	for e, err := range v.Walk() {
		if err != nil || e.File.Dir {
			continue
		}
		for _, err := range e.File.Runs() {
			_ = err
		}
		if c, err := e.File.Open(); err == nil {
			_, _ = c.ReadAt(make([]byte, 700), c.Size()/2)
		}
	}
	for err := range v.Check() {
		_ = err
	}
	_, _ = v.Lookup("/dir/below")
	if *r.bytes > int64(len(b))*5000 {
		t.Fatalf("%d bytes read of %d", *r.bytes, len(b))
	}
}

// TestDamage reads images of which some bytes that are not zero were changed.
func TestDamage(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 5))
	for _, whole := range [][]byte{small(), wide()} {
		var places []int
		for off, c := range whole {
			if c != 0 {
				places = append(places, off)
			}
		}
		for range 3000 {
			b := bytes.Clone(whole)
			for range 1 + r.IntN(5) {
				b[places[r.IntN(len(places))]+r.IntN(2)] = []byte{0, 0xff, 1, 2, byte(r.Uint32())}[r.IntN(5)]
			}
			readAll(t, b)
		}
	}
}

// FuzzOpen reads all of what may be a FAT file system: nothing may crash, or read more than a bounded multiple of it.
func FuzzOpen(f *testing.F) {
	f.Add(small())
	f.Add(wide())
	f.Fuzz(func(t *testing.T, b []byte) { readAll(t, b) })
}
