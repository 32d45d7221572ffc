package scan

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
)

// rules want a bit of everything, and more of programs.
type rules struct{}

func (rules) Want(n baseline.Name, mode uint32) baseline.Want {
	switch {
	case n.Path == "/none" || strings.HasPrefix(n.Path, "/none/"):
		return 0
	case strings.HasPrefix(n.Path, "/some"):
		if mode&unix.S_IFMT == unix.S_IFDIR {
			return baseline.Descend
		}
		if mode&0o111 == 0 {
			return 0
		}
	case strings.HasPrefix(n.Path, "/dir1"):
		if mode&unix.S_IFMT != unix.S_IFDIR && mode&0o100 == 0 {
			return baseline.Metadata
		}
	}
	return baseline.Descend | baseline.Metadata | baseline.Content | baseline.Xattrs
}

func random(r *rand.Rand, n int) []byte {
	b := make([]byte, n+8)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b[:n]
}

// scanImage scans a bare file system.
func scanImage(t testing.TB, image []byte, c *Changes, last *Index) *Result {
	t.Helper()
	r, err := Run(context.Background(), []Source{{Reader: bytes.NewReader(image), Size: int64(len(image)), Changed: c}}, [32]byte{1}, rules{}, last, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// changesOf compares two images, and says of some granules that are the same that they may have changed.
func changesOf(a, b []byte, granule int, extra *rand.Rand) *Changes {
	c := &Changes{Granule: int64(granule), Bits: make([]uint64, len(b)/granule/64+1)}
	for off := 0; off < len(b); off += granule {
		end := min(off+granule, len(b))
		if !bytes.Equal(a[off:end], b[off:end]) || extra != nil && extra.IntN(40) == 0 {
			g := off / granule
			c.Bits[g/64] |= 1 << (g % 64)
		}
	}
	return c
}

func entriesOf(x *Index) map[baseline.Name]baseline.Entry {
	all := map[baseline.Name]baseline.Entry{}
	for e := range x.All() {
		all[e.Name] = e
	}
	return all
}

// A trial is an image that changes.
type trial struct {
	t     *testing.T
	r     *rand.Rand
	image string
	dirs  []string
	names []string
	bytes []byte
	last  *Result
	plain bool // only contents were changed
}

var shapes = [][]string{
	{"-t", "ext4", "-b", "1024", "-I", "256"},
	{"-t", "ext4", "-b", "4096", "-I", "256"},
	{"-t", "ext4", "-b", "1024", "-I", "256", "-O", "inline_data"},
	{"-t", "ext3", "-b", "1024"},
	{"-t", "ext2", "-b", "4096", "-I", "128", "-O", "^filetype,^dir_index"},
	{"-t", "ext4", "-b", "4096", "-I", "512", "-O", "inline_data,ea_inode,^has_journal"},
	{"-t", "ext4", "-b", "1024", "-O", "^extent,^64bit,meta_bg,^resize_inode"},
}

// makeTree is what the images begin with.
func makeTree(t testing.TB) string {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(1, 1))
	for d := range 4 {
		for i := range 25 {
			put(t, filepath.Join(dir, fmt.Sprintf("dir%d", d), fmt.Sprintf("f%d", i)), random(r, r.IntN(9000)))
		}
	}
	for _, p := range []string{"none/a", "none/sub/b", "some/c", "some/sub/d", "dir2/sub/e", "dir2/sub/deep/f", "dir2-x", "dir2/sub-x"} {
		put(t, filepath.Join(dir, p), random(r, 3000))
	}
	put(t, filepath.Join(dir, "large"), random(r, 400_000))
	for i := range 150 {
		put(t, filepath.Join(dir, "many", fmt.Sprintf("a-longer-name-than-others-%d", i)), random(r, 100))
	}
	return dir
}

func newTrial(t *testing.T, tree string, seed uint64, shape []string) *trial {
	image := filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", append(append([]string{"-q", "-F", "-d", tree}, shape...), image, "8M")...)
	if !strings.Contains(fmt.Sprint(shape), "ext2") {
		repair(t, image)
	}
	tr := &trial{t: t, r: rand.New(rand.NewPCG(seed, 2)), image: image, bytes: load(t, image)}
	tr.last = scanImage(t, tr.bytes, nil, nil)
	if !tr.last.Full || len(tr.last.Problems) > 0 || len(tr.last.Touched) < 260 {
		t.Fatalf("first scan: %+v", tr.last)
	}
	tr.look()
	return tr
}

// look finds the names that there are.
func (tr *trial) look() {
	tr.dirs, tr.names = []string{"/"}, nil
	f, err := ext4.Open(bytes.NewReader(tr.bytes), int64(len(tr.bytes)), ext4.Options{})
	if err != nil {
		tr.t.Fatal(err)
	}
	for e, err := range f.Walk() {
		if err != nil || strings.HasPrefix(e.Path, "/lost+found") || e.Path == "/" {
			continue
		}
		if e.Inode.IsDir() {
			tr.dirs = append(tr.dirs, e.Path)
		} else {
			tr.names = append(tr.names, e.Path)
		}
	}
	slices.Sort(tr.dirs)
	slices.Sort(tr.names)
}

func (tr *trial) any(all []string) string { return all[tr.r.IntN(len(all))] }

// step makes some changes.
func (tr *trial) step() []string {
	var commands []string
	fresh := func() string { return path.Join(tr.any(tr.dirs), fmt.Sprintf("n%d", tr.r.IntN(60))) }
	in := func(p string, format string) []string {
		return []string{"cd " + path.Dir(p), fmt.Sprintf(format, path.Base(p)), "cd /"}
	}
	tr.plain = tr.r.IntN(4) == 0
	for range 1 + tr.r.IntN(5) {
		name, dir := tr.any(tr.names), tr.any(tr.dirs)
		op := tr.r.IntN(17)
		if tr.plain {
			op = 0
		}
		switch op {
		case 0, 1:
			tr.overwrite(name)
		case 2, 3:
			file := filepath.Join(tr.t.TempDir(), "data")
			put(tr.t, file, random(tr.r, []int{0, 30, 130, 2000, 70_000}[tr.r.IntN(5)]))
			commands = append(commands, in(fresh(), "write "+file+" %s")...)
		case 4:
			commands = append(commands, "rm "+name)
		case 5:
			commands = append(commands, "mkdir "+fresh())
		case 6:
			commands = append(commands, "sif "+name+" mode "+tr.any([]string{"0100644", "0100755", "0104755", "0100600"}))
		case 7:
			commands = append(commands, fmt.Sprintf("sif %s uid %d", tr.any(append(tr.dirs[1:], tr.names...)), tr.r.IntN(3)))
		case 8:
			commands = append(commands, fmt.Sprintf("ea_set %s %s %x", name, tr.any([]string{"security.ima", "user.x", "security.selinux"}), random(tr.r, 1+tr.r.IntN(60))))
		case 9: // a second name
			p := fresh()
			commands = append(commands, "ln "+name+" "+p, "sif "+name+" links_count 2")
		case 10: // elsewhere
			commands = append(commands, "ln "+name+" "+fresh(), "unlink "+name)
		case 11: // a directory elsewhere, but not in itself
			if to := fresh(); dir != "/" && !strings.HasPrefix(to, dir+"/") {
				commands = append(commands, "ln "+dir+" "+to, "unlink "+dir)
				tr.dirs = slices.DeleteFunc(tr.dirs, func(d string) bool { return d == dir || strings.HasPrefix(d, dir+"/") })
				tr.names = slices.DeleteFunc(tr.names, func(d string) bool { return strings.HasPrefix(d, dir+"/") })
			}
		case 12:
			commands = append(commands, in(fresh(), "symlink %s "+strings.Repeat("t", []int{5, 59, 60, 200}[tr.r.IntN(4)]))...)
		case 13:
			commands = append(commands, in(fresh(), fmt.Sprintf("mknod %%s c %d %d", tr.r.IntN(300), tr.r.IntN(300)))...)
		case 14: // another file of the same name, and of another type
			commands = append(commands, append([]string{"rm " + name}, in(name, tr.any([]string{"mkdir %s", "mknod %s p", "symlink %s x"}))...)...)
		case 15:
			commands = append(commands, "sif "+name+" size "+fmt.Sprint(tr.r.IntN(6000)))
		case 16:
			commands = append(commands, "punch "+name+" 0 1", "rmdir "+dir)
		}
	}
	return commands
}

// overwrite changes a byte of a file where it lies.
func (tr *trial) overwrite(name string) {
	b := load(tr.t, tr.image)
	f, err := ext4.Open(bytes.NewReader(b), int64(len(b)), ext4.Options{})
	if err != nil {
		tr.t.Fatal(err)
	}
	e, err := f.Lookup(name)
	if err != nil {
		return
	}
	for x, err := range e.Inode.Extents() {
		if err != nil || x.Kind != ext4.Data || e.Inode.Size == 0 {
			continue
		}
		b[x.Offset+tr.r.Int64N(min(x.Length, e.Inode.Size-x.Logical))]++
		put(tr.t, tr.image, b)
		return
	}
}

// check scans what the image is now, and holds it to a full scan.
func (tr *trial) check(what string) {
	t := tr.t
	t.Helper()
	before, now := tr.bytes, load(t, tr.image)
	granule := []int{4096, 4096, 16384}[tr.r.IntN(3)]
	var extra *rand.Rand
	if !tr.plain && tr.r.IntN(2) == 0 {
		extra = tr.r
	}
	c := changesOf(before, now, granule, extra)
	last, err := Open(tr.last.Index.Bytes())
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	got, want := scanImage(t, now, c, last), scanImage(t, now, nil, nil)
	a, b := slices.Collect(got.Index.All()), slices.Collect(want.Index.All())
	was := entriesOf(tr.last.Index)
	same := len(a) == len(b)
	for i := 0; same && i < len(a); i++ {
		same = a[i].Name == b[i].Name && sameEntry(&a[i], &b[i])
	}
	if !same {
		for n, e := range entriesOf(want.Index) {
			if g, ok := entriesOf(got.Index)[n]; !ok || !sameEntry(&g, &e) {
				t.Errorf("%s: %v is\n%+v, not\n%+v", what, n, g, e)
			}
		}
		t.Fatalf("%s: %d entries, not %d", what, len(a), len(b))
	}
	if fmt.Sprint(names(got.Problems)) != fmt.Sprint(names(want.Problems)) {
		t.Errorf("%s: problems %v, not %v", what, got.Problems, want.Problems)
	}
	touched := map[baseline.Name]bool{}
	for i, n := range got.Touched {
		touched[n] = true
		if i > 0 && n.Compare(got.Touched[i-1]) <= 0 {
			t.Errorf("%s: %v after %v", what, n, got.Touched[i-1])
		}
	}
	differ := 0
	for n, e := range entriesOf(got.Index) {
		if o, ok := was[n]; !ok || !sameEntry(&o, &e) {
			differ++
			if !touched[n] {
				t.Errorf("%s: %v is not touched, and is %+v, was %+v", what, n, e, o)
			}
		}
		delete(was, n)
		if l, ok := got.Index.Lookup(n); !ok || !sameEntry(&l, &e) {
			t.Errorf("%s: %v is not found", what, n)
		}
	}
	for n := range was {
		if differ++; !touched[n] {
			t.Errorf("%s: %v is not touched, and is gone", what, n)
		}
	}
	if tr.plain && (got.Full || len(got.Touched) > differ+len(got.Problems) || got.Stats.Files > 120) {
		t.Errorf("%s: full: %s; %d of %d touched names differ; %+v", what, got.Why, differ, len(got.Touched), got.Stats)
	}
	tr.last, tr.bytes = got, now
	tr.look()
}

func names(all []Problem) (names []string) {
	for _, p := range all {
		names = append(names, p.Name.String())
	}
	return names
}

// TestIncrementalEqualsFull: whatever was done to a file system, a scan of what changed finds what a full one finds.
func TestIncrementalEqualsFull(t *testing.T) {
	tree := makeTree(t)
	seeds, steps := uint64(2), 5
	if soak() {
		seeds, steps = 15, 25
	}
	full, all := 0, 0
	for i, shape := range shapes {
		for seed := range seeds {
			t.Run(fmt.Sprint(shape, seed), func(t *testing.T) {
				tr := newTrial(t, tree, seed*100+uint64(i), shape)
				for step := range steps {
					commands := tr.step()
					if len(commands) > 0 {
						debugfs(t, tr.image, commands...)
					}
					if !tr.plain && tr.r.IntN(3) == 0 {
						repair(t, tr.image)
					}
					tr.check(fmt.Sprintf("step %d: %q", step, commands))
					if all++; tr.last.Full {
						full++
						t.Logf("full: %s", tr.last.Why)
					}
					if t.Failed() {
						return
					}
				}
			})
		}
	}
	if full*2 > all {
		t.Errorf("%d of %d scans were full", full, all)
	}
	t.Logf("%d of %d scans were full", full, all)
}

// TestIncrementalJournal: what a journal holds, and no longer holds, counts as changed.
func TestIncrementalJournal(t *testing.T) {
	tree := makeTree(t)
	for i, shape := range [][]string{shapes[0], shapes[1], shapes[3]} {
		t.Run(fmt.Sprint(shape), func(t *testing.T) {
			tr := newTrial(t, tree, uint64(i), shape)
			for round := range 3 {
				first := load(t, tr.image)
				tr.plain = false
				commands := tr.step()
				put(t, tr.image, first)
				if debugfs(t, tr.image, append(commands, "sif /large uid 7", fmt.Sprintf("mkdir /round%d", round))...); len(commands) == 0 {
					continue
				}
				repair(t, tr.image)
				last := load(t, tr.image)
				put(t, tr.image, first)
				journal(t, tr.image, first, last)
				tr.plain = false
				tr.check(fmt.Sprintf("round %d, journal: %q", round, commands))
				if e, ok := tr.last.Index.Lookup(baseline.Name{Volume: "disk0", Path: "/large"}); !ok || e.UID != 7 {
					t.Fatalf("the journal was not replayed: %+v", e)
				}
				left := load(t, tr.image)
				put(t, tr.image, first) // what was in the journal only is as it was, and no byte outside of it changed
				tr.check(fmt.Sprintf("round %d, journal discarded: %q", round, commands))
				put(t, tr.image, left)
				tr.check(fmt.Sprintf("round %d, journal again: %q", round, commands))
				repair(t, tr.image)
				tr.check(fmt.Sprintf("round %d, replayed: %q", round, commands))
			}
		})
	}
}

// journal leaves in an image's journal what differs from it.
func journal(t testing.TB, image string, first, last []byte) {
	t.Helper()
	f, err := ext4.Open(bytes.NewReader(first), int64(len(first)), ext4.Options{})
	if err != nil {
		t.Fatal(err)
	}
	in, err := f.Inode(8)
	if err != nil {
		t.Fatal(err)
	}
	bs := int(f.Info().BlockSize)
	skip := map[int]bool{}
	for e, err := range in.Extents() {
		if err != nil {
			t.Fatal(err)
		}
		for b := e.Offset; e.Kind == ext4.Data && b < e.Offset+e.Length; b += int64(bs) {
			skip[int(b)/bs] = true
		}
	}
	blocks := map[int]bool{}
	for n := range len(last) / bs {
		if !skip[n] && !bytes.Equal(first[n*bs:][:bs], last[n*bs:][:bs]) {
			blocks[n] = true
		}
	}
	var list []string
	var data []byte
	for _, n := range slices.Sorted(maps.Keys(blocks)) {
		list, data = append(list, fmt.Sprint(n)), append(data, last[n*bs:][:bs]...)
	}
	file := filepath.Join(t.TempDir(), "blocks")
	put(t, file, data)
	if said := debugfs(t, image, "jo", fmt.Sprintf("jw -b %s %s", strings.Join(list, ","), file), "jc"); said != "" {
		t.Fatal(said)
	}
	_ = os.Remove(file)
}
