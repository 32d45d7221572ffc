package scan

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
	"redoubt.dev/redoubt/validation/partition"
)

// TestEntries holds what a scan finds to the tree that its image was made of.
func TestEntries(t *testing.T) {
	tree := makeTree(t)
	if err := errors.Join(os.Symlink("large", filepath.Join(tree, "dir3/link")), os.Link(filepath.Join(tree, "large"), filepath.Join(tree, "dir2-y")),
		os.Chmod(filepath.Join(tree, "dir1/f1"), 0o755), os.Chmod(filepath.Join(tree, "some/c"), 0o755)); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d", tree, image, "8M")
	debugfs(t, image, "mknod null c 1 3", "ea_set /large security.ima abc", "ea_set /large user.other abc")
	x := scanImage(t, load(t, image), nil, nil).Index
	count := 0
	err := filepath.Walk(tree, func(path string, info os.FileInfo, err error) error {
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(path, tree), "/")
		e, ok := x.Lookup(baseline.Name{Volume: "disk0", Path: name})
		st := info.Sys().(*unixStat)
		switch {
		case strings.HasPrefix(name, "/none"), name == "/some", name == "/some/sub", name == "/some/sub/d":
			if ok {
				t.Errorf("%s: is not wanted, and is %+v", name, e)
			}
			return err
		case !ok:
			t.Errorf("%s is missing", name)
			return err
		}
		count++
		if e.Mode != st.Mode || !info.IsDir() && e.Links != uint32(st.Nlink) || info.IsDir() && e.Links != 1 {
			t.Errorf("%s: %+v, not %o with %d links", name, e, st.Mode, st.Nlink)
		}
		want := baseline.Digest{}
		if info.Mode().IsRegular() {
			if e.Size != info.Size() {
				t.Errorf("%s: %d bytes", name, e.Size)
			}
			if !strings.HasPrefix(name, "/dir1") || st.Mode&0o100 != 0 {
				want = sha256.Sum256(load(t, path))
			}
		}
		if e.Digest != want {
			t.Errorf("%s: digest %x, not %x", name, e.Digest, want)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	all := slices.Collect(x.All())
	if len(all) != count+2 { // null, lost+found
		t.Errorf("%d entries, not %d", len(all), count+2)
	}
	if !slices.IsSortedFunc(all, func(a, b baseline.Entry) int { return a.Compare(b.Name) }) {
		t.Error("they are not in their order")
	}
	if e, _ := x.Lookup(baseline.Name{Volume: "disk0", Path: "/large"}); len(e.Xattrs) != 1 || e.Xattrs[0] != (baseline.Xattr{Name: "security.ima", Value: "abc"}) {
		t.Errorf("attributes %+v", e.Xattrs)
	}
	if e, _ := x.Lookup(baseline.Name{Volume: "disk0", Path: "/null"}); e.Major != 1 || e.Minor != 3 {
		t.Errorf("device %d:%d", e.Major, e.Minor)
	}
	if e, _ := x.Lookup(baseline.Name{Volume: "disk0", Path: "/dir3/link"}); e.Target != "large" {
		t.Errorf("target %q", e.Target)
	}
	for _, path := range []string{"", "large", "/large/", "/large/x", "//large", "/none", "/nowhere", "/dir1/"} {
		if e, ok := x.Lookup(baseline.Name{Volume: "disk0", Path: path}); ok {
			t.Errorf("%q is %+v", path, e)
		}
	}
}

type unixStat = syscall.Stat_t

// disks makes a disk of partitions: ext4, FAT, LVM, swap, nothing.
func disks(t testing.TB) (disk []byte, at map[string]int) {
	t.Helper()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "tree/etc/passwd"), []byte("root"))
	image, esp := filepath.Join(dir, "fs.img"), filepath.Join(dir, "esp.img")
	must(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d", filepath.Join(dir, "tree"), image, "4M")
	must(t, "mformat", "-C", "-i", esp, "-v", "ESP", "-T", "8192", "-h", "16", "-s", "32", "::")
	put(t, filepath.Join(dir, "BOOT.EFI"), []byte("boot"))
	must(t, "mmd", "-i", esp, "::EFI")
	must(t, "mcopy", "-i", esp, filepath.Join(dir, "BOOT.EFI"), "::EFI/BOOT.EFI")
	parts := [][]byte{load(t, image), load(t, esp), make([]byte, 1<<20), make([]byte, 1<<20)}
	copy(parts[2][512+24:], "LVM2 001")
	copy(parts[3][4096-10:], "SWAPSPACE2")
	disk, at = make([]byte, 1<<20), map[string]int{}
	disk[510], disk[511] = 0x55, 0xaa
	for i, p := range parts {
		e := disk[446+16*i:]
		first, count := len(disk)/512, len(p)/512
		e[4] = 0x83
		copy(e[8:], []byte{byte(first), byte(first >> 8), byte(first >> 16), 0, byte(count), byte(count >> 8), byte(count >> 16), 0})
		at[fmt.Sprintf("p%d", i+1)] = len(disk)
		disk = append(disk, p...)
	}
	return disk, at
}

// TestDisks scans several disks, and what of them is not read is a problem of its volume only.
func TestDisks(t *testing.T) {
	disk, at := disks(t)
	sources := func(b []byte, c *Changes) []Source {
		return []Source{
			{Disk: 1, Reader: bytes.NewReader(make([]byte, 1<<20)), Size: 1 << 20, Changed: &Changes{4096, make([]uint64, 4)}},
			{Disk: 0, Reader: bytes.NewReader(b), Size: int64(len(b)), Changed: c},
		}
	}
	scan := func(b []byte, c *Changes, last *Index) *Result {
		t.Helper()
		r, err := Run(context.Background(), sources(b, c), [32]byte{1}, rules{}, last, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Problems) != 1 || r.Problems[0].Name.String() != "disk0p3:/" || !errors.Is(r.Problems[0].Err, partition.ErrRefused) {
			t.Errorf("problems %v", r.Problems)
		}
		if r.Index, err = Open(r.Index.Bytes()); err != nil {
			t.Fatal(err)
		}
		return r
	}
	first := scan(disk, nil, nil)
	if got := fmt.Sprint(first.Touched); got != "[disk0p1:/ disk0p1:/etc disk0p1:/etc/passwd disk0p1:/lost+found disk0p2:/ disk0p2:/EFI disk0p2:/EFI/BOOT.EFI]" || !first.Full {
		t.Errorf("%s, full %v", got, first.Full)
	}
	e, ok := first.Index.Lookup(baseline.Name{Volume: "disk0p2", Path: "/EFI/BOOT.EFI"})
	if !ok || e.Digest != sha256.Sum256([]byte("boot")) {
		t.Errorf("%+v", e)
	}
	none := scan(disk, changesOf(disk, disk, 4096, nil), first.Index)
	if none.Full || len(none.Touched) > 0 || none.Stats.Bytes > 0 || none.Stats.Inodes > 0 || !bytes.Equal(none.Index.Bytes(), first.Index.Bytes()) {
		t.Errorf("without a change: %+v", none)
	}
	fat := bytes.Clone(disk)
	copy(fat[at["p2"]+bytes.Index(fat[at["p2"]:], []byte("boot")):], "evil")
	r := scan(fat, changesOf(disk, fat, 4096, nil), first.Index)
	if got := fmt.Sprint(r.Touched); got != "[disk0p2:/EFI/BOOT.EFI]" || r.Full {
		t.Errorf("%s, full %v", got, r.Full)
	}
	gone := bytes.Clone(disk)
	clear(gone[at["p2"]:at["p3"]])
	r = scan(gone, changesOf(disk, gone, 4096, nil), first.Index)
	if got := fmt.Sprint(r.Touched); got != "[disk0p2:/ disk0p2:/EFI disk0p2:/EFI/BOOT.EFI]" || r.Full {
		t.Errorf("%s, full %v", got, r.Full)
	}
}

// TestFull: a last index that does not fit is no basis, and the result says why.
func TestFull(t *testing.T) {
	image := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", image, "8M")
	b := load(t, image)
	first := scanImage(t, b, nil, nil)
	none := changesOf(b, b, 4096, nil)
	if r := scanImage(t, b, none, first.Index); r.Full {
		t.Errorf("full: %s", r.Why)
	}
	run := func(b []byte, c *Changes, rules32 byte) *Result {
		t.Helper()
		r, err := Run(context.Background(), []Source{{Reader: bytes.NewReader(b), Size: int64(len(b)), Changed: c}}, [32]byte{rules32}, rules{}, first.Index, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	other := filepath.Join(t.TempDir(), "other.img")
	put(t, other, b)
	must(t, "tune2fs", "-U", "random", other)
	uuid := load(t, other)
	put(t, other, append(bytes.Clone(b), make([]byte, 8<<20)...))
	must(t, "resize2fs", other)
	large := load(t, other)
	for why, r := range map[string]*Result{
		"rules are others": run(b, none, 2),
		"may have changed": run(b, nil, 1),
		"layout is":        run(uuid, changesOf(b, uuid, 4096, nil), 1),
		"lies elsewhere":   run(large, changesOf(append(bytes.Clone(b), make([]byte, 8<<20)...), large, 4096, nil), 1),
	} {
		if !r.Full || !strings.Contains(r.Why, why) {
			t.Errorf("full %v: %q, not %q", r.Full, r.Why, why)
		}
	}
	if _, err := Run(context.Background(), []Source{{Reader: bytes.NewReader(b), Size: int64(len(b)), Changed: &Changes{4096, make([]uint64, 2)}}}, [32]byte{}, rules{}, nil, Options{}); err == nil {
		t.Error("changes of a smaller disk are taken")
	}
}

// TestBounds: what is more than the options allow is a problem, and a scan that is stopped ends.
func TestBounds(t *testing.T) {
	tree := makeTree(t)
	put(t, filepath.Join(tree, "sparse"), []byte("x"))
	if err := os.Truncate(filepath.Join(tree, "sparse"), 1<<40); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", tree, image, "8M")
	b := load(t, image)
	scan := func(o Options, last *Index) *Result {
		t.Helper()
		r, err := Run(context.Background(), []Source{{Reader: bytes.NewReader(b), Size: int64(len(b)), Changed: changesOf(b, b, 4096, nil)}}, [32]byte{}, rules{}, last, o)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := scan(Options{}, nil)
	if len(r.Problems) != 1 || r.Problems[0].Name.Path != "/sparse" || !errors.Is(r.Problems[0].Err, ErrEffort) {
		t.Errorf("%v", r.Problems)
	}
	if _, ok := r.Index.Lookup(baseline.Name{Volume: "disk0", Path: "/sparse"}); ok {
		t.Error("what was not read has an entry")
	}
	if again := scan(Options{}, r.Index); again.Full || len(again.Problems) != 1 || again.Stats.Bytes > 0 {
		t.Errorf("it is a problem no longer: %+v", again)
	}
	if r := scan(Options{MaxBytes: 300_000}, nil); len(r.Problems) < 10 || r.Stats.Bytes > 300_000 {
		t.Errorf("%d problems, %d bytes", len(r.Problems), r.Stats.Bytes)
	}
	if r := scan(Options{MaxMemory: 20_000}, nil); len(r.Problems) == 0 || !errors.Is(r.Problems[0].Err, ErrEffort) {
		t.Errorf("%v", r.Problems)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &stopper{b: b, stop: cancel}
	if _, err := Run(ctx, []Source{{Reader: s, Size: int64(len(b))}}, [32]byte{}, rules{}, nil, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if s.reads.Load() > 300 {
		t.Errorf("%d reads", s.reads.Load())
	}
}

// TestChanged holds the answer for a range to the bits of its granules, one by one.
func TestChanged(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for range 200 {
		c := &Changes{Granule: 4096 << r.IntN(3), Bits: make([]uint64, 1+r.IntN(5))}
		for range r.IntN(6) {
			g := r.IntN(64 * len(c.Bits))
			c.Bits[g/64] |= 1 << (g % 64)
		}
		offset, end := int64(r.IntN(5))*512, c.Granule*64*int64(len(c.Bits))
		replayed := ext4.Range{Offset: r.Int64N(end), Length: 1 + r.Int64N(3*c.Granule)}
		s := newChanged(c, offset, slices.Values([]ext4.Range{replayed}))
		for range 100 {
			x := ext4.Range{Offset: r.Int64N(end), Length: 1 + r.Int64N(end/2)}
			if r.IntN(2) == 0 {
				x.Length = 1 + r.Int64N(2*c.Granule)
			}
			first, last := (offset+x.Offset)/c.Granule, (offset+x.Offset+x.Length-1)/c.Granule
			want := last/64 >= int64(len(c.Bits)) || first <= (offset+replayed.Offset+replayed.Length-1)/c.Granule && (offset+replayed.Offset)/c.Granule <= last
			for g := first; g <= last && !want; g++ {
				want = c.Bits[g/64]>>(g%64)&1 != 0
			}
			if s.any(x) != want {
				t.Fatalf("%+v at %d of %+v and %+v: %v", x, offset, c, replayed, !want)
			}
		}
	}
}

// TestRules: what is wanted of a file follows its mode, also where nothing else of it changed.
func TestRules(t *testing.T) {
	image := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d", makeTree(t), image, "8M")
	before := load(t, image)
	first := scanImage(t, before, nil, nil)
	debugfs(t, image, "sif /dir1/f3 mode 0100755", "sif /some/c mode 0100755")
	b := load(t, image)
	r := scanImage(t, b, changesOf(before, b, 4096, nil), first.Index)
	if got := fmt.Sprint(r.Touched); got != "[disk0:/dir1/f3 disk0:/some/c]" || r.Full || r.Stats.Files != 2 {
		t.Errorf("touched %s, full: %s, %+v", got, r.Why, r.Stats)
	}
	for n, e := range entriesOf(scanImage(t, b, nil, nil).Index) {
		if g, ok := r.Index.Lookup(n); !ok || !sameEntry(&g, &e) {
			t.Errorf("%v is %+v, not %+v", n, g, e)
		}
	}
	// A change of an inode's times alone has nothing hashed.
	debugfs(t, image, "sif /large mtime 20200101", "sif /large ctime 20200101")
	now := load(t, image)
	r = scanImage(t, now, changesOf(b, now, 4096, nil), r.Index)
	if r.Stats.Files != 0 || len(r.Touched) != 0 || r.Full {
		t.Errorf("touched %v, full: %s, %+v", r.Touched, r.Why, r.Stats)
	}
}

// TestProblemStays: what could not be read stays a problem while nothing changes, without a full scan.
func TestProblemStays(t *testing.T) {
	tree := makeTree(t)
	if err := os.Symlink(strings.Repeat("t", 300), filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", "-d", tree, image, "8M")
	debugfs(t, image, "sif /link size 5000", "sif /large block[3] 99999999")
	b := load(t, image)
	r := scanImage(t, b, nil, nil)
	for range 3 {
		if fmt.Sprint(names(r.Problems)) != "[disk0:/large disk0:/link]" {
			t.Fatalf("%v, full: %s", r.Problems, r.Why)
		}
		for _, p := range r.Problems {
			if _, ok := r.Index.Lookup(p.Name); ok || !slices.Contains(r.Touched, p.Name) {
				t.Errorf("%v has an entry, or is not touched", p.Name)
			}
		}
		if r = scanImage(t, b, changesOf(b, b, 4096, nil), r.Index); r.Full {
			t.Errorf("full: %s", r.Why)
		}
	}
}

// A stopper stops the scan that reads it.
type stopper struct {
	b     []byte
	reads atomic.Int64
	stop  func()
}

func (s *stopper) ReadAt(p []byte, off int64) (int, error) {
	if s.reads.Add(1) == 100 {
		s.stop()
	}
	return bytes.NewReader(s.b).ReadAt(p, off)
}

// TestDamage: a scan of a damaged image ends, misses nothing silently, and after each damage an incremental scan finds what a full one
// does.
func TestDamage(t *testing.T) {
	tree := makeTree(t)
	image := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-I", "256", "-d", tree, image, "8M")
	good := load(t, image)
	first := scanImage(t, good, nil, nil)
	was := entriesOf(first.Index)
	f, err := ext4.Open(bytes.NewReader(good), int64(len(good)), ext4.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var places []int64 // of inodes, directories and trees
	for e, err := range f.Walk() {
		if err != nil {
			t.Fatal(err)
		}
		places = append(places, e.Inode.Offset())
		for x, err := range e.Inode.Extents() {
			if err == nil && (x.Kind == ext4.Metadata || e.Inode.Type() == unix.S_IFDIR) {
				places = append(places, x.Offset)
			}
		}
	}
	rounds := 150
	if soak() {
		rounds = 10_000
	}
	r := rand.New(rand.NewPCG(5, 5))
	problems := 0
	for round := range rounds {
		b := bytes.Clone(good)
		for range 1 + r.IntN(3) {
			b[places[r.IntN(len(places))]+r.Int64N(200)] ^= 1 << r.IntN(8)
		}
		c := changesOf(good, b, 4096, nil)
		got, want := scanImage(t, b, c, first.Index), scanImage(t, b, nil, nil)
		if fmt.Sprint(names(got.Problems)) != fmt.Sprint(names(want.Problems)) {
			t.Fatalf("round %d: problems %v, not %v", round, got.Problems, want.Problems)
		}
		a, w := entriesOf(got.Index), entriesOf(want.Index)
		for n, e := range w {
			if g, ok := a[n]; !ok || !sameEntry(&g, &e) || len(a) != len(w) {
				t.Fatalf("round %d: %v is %+v, not %+v; %d entries, not %d", round, n, g, e, len(a), len(w))
			}
		}
		for n := range was {
			if _, ok := a[n]; !ok && len(got.Problems) == 0 {
				t.Fatalf("round %d: %v is left out silently", round, n)
			}
		}
		if len(got.Problems) > 0 {
			problems++
			again := scanImage(t, b, changesOf(b, b, 4096, nil), got.Index)
			if fmt.Sprint(names(again.Problems)) != fmt.Sprint(names(got.Problems)) {
				t.Fatalf("round %d: problems %v are forgotten: %v", round, got.Problems, again.Problems)
			}
		}
	}
	if problems < rounds/4 {
		t.Errorf("only %d of %d damaged images have problems", problems, rounds)
	}
}
