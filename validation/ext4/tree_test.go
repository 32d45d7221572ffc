package ext4

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A want is what a path must be.
type want struct {
	mode   uint32
	size   int64
	target string
	data   func() ([]byte, error) // of a regular file that is small enough
	links  uint32
	uid    uint32
	rdev   [2]uint32
	xattrs map[string]string
}

// A tree is what an image is made of, and what must be read from it.
type tree struct {
	dir      string
	want     map[string]*want
	commands []string // for debugfs
}

func newTree(t testing.TB) *tree {
	t.Helper()
	return &tree{dir: t.TempDir(), want: map[string]*want{"/": {mode: unix.S_IFDIR | 0o755}}}
}

func random(seed uint64, n int) []byte {
	b := make([]byte, n+8)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b[:n]
}

func (tr *tree) file(t testing.TB, path string, b []byte) {
	t.Helper()
	write(t, filepath.Join(tr.dir, path), b)
	tr.parents(path)
	tr.want[path] = &want{mode: unix.S_IFREG | 0o644, size: int64(len(b)), links: 1, data: func() ([]byte, error) { return b, nil }}
}

func (tr *tree) parents(path string) {
	for d := filepath.Dir(path); d != "/"; d = filepath.Dir(d) {
		tr.want[d] = &want{mode: unix.S_IFDIR | 0o755}
	}
}

// sparse makes a file of holes with data at some places.
func (tr *tree) sparse(t testing.TB, path string, size int64, at map[int64][]byte) {
	t.Helper()
	name := filepath.Join(tr.dir, path)
	write(t, name, nil)
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, b := range at {
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	tr.parents(path)
	tr.want[path] = &want{mode: unix.S_IFREG | 0o644, size: size, links: 1, data: func() ([]byte, error) { return os.ReadFile(name) }}
}

func (tr *tree) symlink(t testing.TB, path, target string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(filepath.Join(tr.dir, path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, filepath.Join(tr.dir, path)); err != nil {
		t.Fatal(err)
	}
	tr.parents(path)
	tr.want[path] = &want{mode: unix.S_IFLNK | 0o777, size: int64(len(target)), target: target, links: 1}
}

func (tr *tree) link(t testing.TB, path, old string) {
	t.Helper()
	if err := os.Link(filepath.Join(tr.dir, old), filepath.Join(tr.dir, path)); err != nil {
		t.Fatal(err)
	}
	tr.want[old].links++
	tr.want[path] = tr.want[old]
}

// device has debugfs make a device node, for which the host would want root.
func (tr *tree) device(path string, kind string, major, minor uint32) {
	tr.commands = append(tr.commands, "cd "+filepath.Dir(path), fmt.Sprintf("mknod %s %s %d %d", filepath.Base(path), kind, major, minor), "cd /")
	mode := map[string]uint32{"c": unix.S_IFCHR, "b": unix.S_IFBLK}[kind]
	tr.want[path] = &want{mode: mode, rdev: [2]uint32{major, minor}, links: 1}
}

func (tr *tree) fifo(path string) {
	tr.commands = append(tr.commands, "cd "+filepath.Dir(path), fmt.Sprintf("mknod %s p", filepath.Base(path)), "cd /")
	tr.want[path] = &want{mode: unix.S_IFIFO, links: 1}
}

func (tr *tree) xattr(t testing.TB, path, name string, value []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "value")
	write(t, file, value)
	tr.commands = append(tr.commands, fmt.Sprintf("ea_set -f %s %s %s", file, path, name))
	w := tr.want[path]
	if w.xattrs == nil {
		w.xattrs = map[string]string{}
	}
	w.xattrs[name] = string(value)
}

// standard is a tree of one of everything; many is how many files one of its directories has, value the bytes of its
// largest attribute. With deep there is a file whose map has three levels, where that takes no gigabytes.
func standard(t testing.TB, block, many, value int, deep bool) *tree {
	tr := newTree(t)
	for i, n := range []int{0, 1, 59, 60, 61, 100, 130, 200, 500, block - 1, block, block + 1, 12 * block, 12*block + 1, 40*block + 7} {
		tr.file(t, fmt.Sprintf("/sizes/%d", n), random(uint64(i), n))
	}
	tr.file(t, "/big", random(99, 300*block+123))
	tr.sparse(t, "/sparse/all", 5<<20, nil)
	tr.sparse(t, "/sparse/some", 3<<20+5, map[int64][]byte{0: random(1, block), 1 << 20: random(2, 3*block), 3 << 20: []byte("end")})
	second := int64(block) * int64(12+block/4)
	tr.sparse(t, "/sparse/second", second+int64(block), map[int64][]byte{second: random(3, block)})
	if deep && block == 1024 {
		third := int64(block) * int64(12+block/4+block/4*block/4)
		tr.sparse(t, "/sparse/third", third+int64(block), map[int64][]byte{third: random(4, block)})
	}
	at := map[int64][]byte{}
	for k := range int64(60) { // every second block
		at[2*k*int64(block)] = random(uint64(k), block)
	}
	tr.sparse(t, "/sparse/comb", int64(119*block), at)
	tr.sparse(t, "/sparse/tail", 4<<20, map[int64][]byte{0: random(9, 3*block)})
	if err := os.Truncate(filepath.Join(tr.dir, "/sparse/tail"), int64(3*block)); err != nil {
		t.Fatal(err)
	}
	tail := append(random(9, 3*block), make([]byte, 4<<20-3*block)...)
	tr.want["/sparse/tail"].data = func() ([]byte, error) { return tail, nil }
	tr.commands = append(tr.commands, fmt.Sprintf("sif /sparse/tail size %d", 4<<20))
	for i := range many {
		pad := i % 110
		if many > 700 { // enough for a hash tree of two levels
			pad += 120
		}
		tr.file(t, fmt.Sprintf("/many/%d-%s", i, strings.Repeat("n", pad)), []byte(fmt.Sprint(i)))
	}
	tr.file(t, "/long/"+strings.Repeat("x", 255), []byte("long"))
	tr.file(t, "/long/"+strings.Repeat("y", 254), []byte("also long"))
	below := "/deep"
	for i := range 30 {
		below += fmt.Sprintf("/d%d", i)
	}
	tr.file(t, below+"/file", []byte("deep"))
	for _, n := range []int{1, 50, 59, 60, 61, 100, 200, 900} {
		tr.symlink(t, fmt.Sprintf("/links/%d", n), strings.Repeat("t", n))
	}
	tr.file(t, "/hard/a", []byte("two names"))
	tr.link(t, "/hard/b", "/hard/a")
	tr.link(t, "/sizes/c", "/hard/a")
	tr.file(t, "/dev/plain", nil)
	tr.device("/dev/tty", "c", 5, 0)
	tr.device("/dev/large", "b", 259, 40000)
	tr.fifo("/dev/fifo")
	tr.file(t, "/owned", []byte("owner"))
	tr.commands = append(tr.commands, "sif /owned uid 100001", "sif /owned gid 200002")
	tr.want["/owned"].uid = 100001
	tr.file(t, "/attrs/small", []byte("x"))
	tr.xattr(t, "/attrs/small", "user.a", []byte("b"))
	tr.xattr(t, "/attrs/small", "security.ima", random(5, 30))
	tr.file(t, "/attrs/large", random(6, 5000))
	tr.xattr(t, "/attrs/large", "security.capability", random(7, 20))
	tr.xattr(t, "/attrs/large", "user.large", random(8, value))
	tr.xattr(t, "/attrs/large", "trusted.empty", []byte("e"))
	return tr
}

// image makes an image of the tree.
func (tr *tree) image(t testing.TB, size string, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", append(append([]string{"-q", "-F", "-d", tr.dir}, args...), path, size)...)
	if len(tr.commands) > 0 {
		debugfs(t, path, tr.commands...)
	}
	return path
}

// verify walks a file system and holds everything in it to the tree.
func (tr *tree) verify(t testing.TB, f *FS) {
	t.Helper()
	seen := map[string]bool{}
	for e, err := range f.Walk() {
		if err != nil {
			t.Errorf("%v: %v", e, err)
			continue
		}
		if strings.HasPrefix(e.Path, "/lost+found") {
			continue
		}
		w := tr.want[e.Path]
		if w == nil {
			t.Errorf("%v: not expected", e)
			continue
		}
		if seen[e.Path] {
			t.Errorf("%v: twice", e)
		}
		seen[e.Path] = true
		w.verify(t, e)
	}
	var missing []string
	for p := range tr.want {
		if !seen[p] {
			missing = append(missing, p)
		}
	}
	sort.Strings(missing)
	if len(missing) > 0 {
		t.Errorf("%d names are missing: %.300s", len(missing), strings.Join(missing, " "))
	}
}

func (w *want) verify(t testing.TB, e Entry) {
	t.Helper()
	in := e.Inode
	if in.Type() != w.mode&unix.S_IFMT || w.mode&0o7777 != 0 && in.Mode != w.mode {
		t.Errorf("%v: mode %o, not %o", e, in.Mode, w.mode)
	}
	if in.Type() != unix.S_IFDIR && (in.Size != w.size || in.Links != w.links) {
		t.Errorf("%v: size %d and %d links, not %d and %d", e, in.Size, in.Links, w.size, w.links)
	}
	if w.uid != 0 && in.UID != w.uid {
		t.Errorf("%v: user %d, not %d", e, in.UID, w.uid)
	}
	if major, minor := in.Device(); major != w.rdev[0] || minor != w.rdev[1] {
		t.Errorf("%v: device %d:%d, not %v", e, major, minor, w.rdev)
	}
	if w.target != "" {
		if s, err := in.Readlink(); err != nil || s != w.target {
			t.Errorf("%v: target %.70q, %v", e, s, err)
		}
	}
	if w.data != nil {
		data, err := w.data()
		if err != nil {
			t.Fatal(err)
		}
		sameContents(t, e, data)
	}
	xattrs, err := in.Xattrs()
	if err != nil {
		t.Errorf("%v: %v", e, err)
	}
	if len(xattrs) != len(w.xattrs) {
		t.Errorf("%v: %d attributes, not %d", e, len(xattrs), len(w.xattrs))
	}
	for _, x := range xattrs {
		if w.xattrs[x.Name] != string(x.Value) {
			t.Errorf("%v: attribute %s is %x, not %x", e, x.Name, x.Value, w.xattrs[x.Name])
		}
	}
}

// sameContents reads a file whole, and in pieces of odd sizes.
func sameContents(t testing.TB, e Entry, want []byte) {
	t.Helper()
	r, err := e.Inode.Open()
	if err != nil {
		t.Errorf("%v: %v", e, err)
		return
	}
	var b bytes.Buffer
	if _, err := r.WriteTo(&b); err != nil || !bytes.Equal(b.Bytes(), want) {
		t.Errorf("%v: %d bytes of contents differ from %d, %v", e, b.Len(), len(want), err)
		return
	}
	for off := 0; off < len(want); off += max(777, len(want)/7) {
		p := make([]byte, min(1500, len(want)/3+1))
		n, err := r.ReadAt(p, int64(off))
		if err != nil && err != io.EOF || !bytes.Equal(p[:n], want[off:min(off+len(p), len(want))]) { //nolint:errorlint // ReadAt's own
			t.Errorf("%v: %d bytes at %d differ, %v", e, n, off, err)
		}
	}
}
