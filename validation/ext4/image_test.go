package ext4

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A shape is a way to make a file system.
type shape struct {
	kind     string // ext2, ext3 or ext4
	block    int
	inode    int
	features string // besides the kind's
	extended string // -E
	many     int
	hashed   bool // directories become hash trees
}

func (s shape) String() string {
	name := fmt.Sprintf("%s-%d-%d", s.kind, s.block, s.inode)
	if s.features != "" {
		name += "-" + s.features
	}
	if s.hashed {
		name += "-hashed"
	}
	return name
}

func (s shape) args() []string {
	args := []string{"-t", s.kind, "-b", fmt.Sprint(s.block), "-I", fmt.Sprint(s.inode)}
	if s.features != "" {
		args = append(args, "-O", s.features)
	}
	if s.extended != "" {
		args = append(args, "-E", s.extended)
	}
	return args
}

func (s shape) check(t *testing.T) {
	many, value := max(s.many, 120), s.block/2-100
	if strings.Contains(s.features, "ea_inode") {
		value = s.block // as much as debugfs sets
	}
	tr := standard(t, s.block, many, value, soak() || s.kind == "ext2" && !s.hashed || s.hashed && s.many > 0)
	image := tr.image(t, "80M", s.args()...)
	if s.hashed {
		repair(t, image, "-D")
	} else if strings.Contains(s.features, "ea_inode") || strings.Contains(s.features, "quota") {
		repair(t, image) // debugfs does not count for these
	}
	fsck(t, image)
	f := open(t, image)
	if s.hashed && many > 700 && s.block == 1024 {
		if levels := hashLevels(t, f, "/many"); levels == 0 {
			t.Error("the hash tree has one level only")
		}
	}
	tr.verify(t, f)
	compareWithDebugfs(t, f, image)
	noProblems(t, f)
	sameInodes(t, f)
}

// hashLevels is how many levels of nodes are between the root of a directory's hash tree and its leaves.
func hashLevels(t *testing.T, f *FS, path string) byte {
	t.Helper()
	e, err := f.Lookup(path)
	if err != nil || e.Inode.Flags&flagIndex == 0 {
		t.Fatalf("%s: no hash tree: %v", path, err)
	}
	r, err := e.Inode.Open()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 0x20)
	if _, err := r.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b[0x1e]
}

// TestFeatures reads file systems of many shapes.
func TestFeatures(t *testing.T) {
	for _, s := range []shape{
		{kind: "ext2", block: 1024, inode: 128, hashed: true},
		{kind: "ext2", block: 1024, inode: 128, features: "^filetype,^sparse_super,^dir_index,^resize_inode"},
		{kind: "ext2", block: 4096, inode: 256},
		{kind: "ext3", block: 2048, inode: 256, hashed: true},
		{kind: "ext4", block: 1024, inode: 256, many: 1100, hashed: true},
		{kind: "ext4", block: 4096, inode: 256, hashed: true},
		{kind: "ext4", block: 4096, inode: 512, features: "inline_data", hashed: true},
		{kind: "ext4", block: 1024, inode: 256, features: "inline_data"},
		{kind: "ext4", block: 4096, inode: 256, features: "^metadata_csum,uninit_bg", hashed: true},
		{kind: "ext4", block: 1024, inode: 128, features: "^64bit,^metadata_csum"},
		{kind: "ext4", block: 1024, inode: 128, features: "meta_bg,^resize_inode"},
		{kind: "ext4", block: 1024, inode: 256, features: "^64bit,meta_bg,^resize_inode,^flex_bg"},
		{kind: "ext4", block: 2048, inode: 256, features: "bigalloc,^resize_inode"},
		{kind: "ext4", block: 4096, inode: 256, features: "ea_inode,large_dir,quota,project"},
		{kind: "ext4", block: 4096, inode: 256, features: "metadata_csum_seed,orphan_file,fast_commit,verity"},
		{kind: "ext4", block: 4096, inode: 256, features: "sparse_super2", extended: "num_backup_sb=2"},
		{kind: "ext4", block: 4096, inode: 1024, features: "inline_data,^has_journal,^extent,^64bit"},
	} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			s.check(t)
		})
	}
}

// TestSoakFeatures reads file systems of all features by all sizes.
func TestSoakFeatures(t *testing.T) {
	if !soak() {
		t.Skip("hundreds of images: needs REDOUBT_SOAK=1, as `make soak` sets it; `make test` has TestFeatures")
	}
	for _, kind := range []string{"ext2", "ext3", "ext4"} {
		many := shape{kind: kind, block: 1024, inode: 256, many: 5000, hashed: true}
		t.Run(many.String()+"-5000", many.check)
		guarded := shape{kind: kind, block: 2048, inode: 256, features: "mmp"} // each program that opens it waits for seconds
		t.Run(guarded.String(), guarded.check)
		features := []string{"", "^dir_index", "^filetype", "^sparse_super,^resize_inode", "meta_bg,^resize_inode"}
		if kind == "ext4" {
			features = append(features, "^metadata_csum,uninit_bg", "^metadata_csum", "^64bit", "inline_data", "inline_data,^64bit", "bigalloc,^resize_inode",
				"ea_inode,large_dir", "quota,project", "metadata_csum_seed,orphan_file", "^flex_bg", "^extent,^64bit", "^huge_file,^extra_isize", "sparse_super2",
				"^64bit,meta_bg,^resize_inode,^flex_bg", "inline_data,ea_inode,fast_commit")
		}
		for _, block := range []int{1024, 2048, 4096} {
			for _, inode := range []int{128, 256, 512} {
				for _, feature := range features {
					if inode == 128 && strings.Contains(feature, "inline_data") || inode == 128 && strings.Contains(feature, "project") {
						continue // they need larger inodes
					}
					for _, hashed := range []bool{false, true} {
						s := shape{kind: kind, block: block, inode: inode, features: feature, hashed: hashed, many: 600}
						t.Run(s.String(), func(t *testing.T) { s.check(t) })
					}
				}
			}
		}
	}
}

func noProblems(t testing.TB, f *FS) {
	t.Helper()
	for err := range f.Check() {
		t.Errorf("check: %v", err)
	}
}

// sameInodes: what has a name is used, and what is used has a name or needs none.
func sameInodes(t testing.TB, f *FS) {
	t.Helper()
	named := map[uint32]bool{}
	for e, err := range f.Walk() {
		if err == nil {
			named[e.Inode.Number] = true
		}
	}
	last := uint32(0)
	for in, err := range f.Inodes() {
		if err != nil {
			t.Error(err)
			continue
		}
		if in.Number <= last {
			t.Errorf("inode %d after %d", in.Number, last)
		}
		last = in.Number
		if in.Links > 0 && !named[in.Number] && in.Number >= f.sb.firstInode && in.Flags&flagEAInode == 0 && in.Number != f.sb.orphanInode &&
			!slices.Contains(f.sb.quotaInodes[:], in.Number) {
			t.Errorf("inode %d has no name", in.Number)
		}
		delete(named, in.Number)
	}
	for n := range named {
		t.Errorf("inode %d is not used", n)
	}
}

var (
	statFirst  = regexp.MustCompile(`(?m)^Inode: (\d+) +Type: ([A-Za-z ]+?) +Mode: +(\d+) +Flags: 0x([0-9a-f]+)`)
	statNext   = regexp.MustCompile(`(?m)^Generation: (\d+)`)
	statOwner  = regexp.MustCompile(`(?m)^User: +(\d+) +Group: +(\d+)(?: +Project: +(\d+))? +Size: (\d+)`)
	statLinks  = regexp.MustCompile(`(?m)^Links: (\d+) +Blockcount: (\d+)`)
	statMtime  = regexp.MustCompile(`(?m)^ *mtime: 0x([0-9a-f]+)(?::([0-9a-f]+))?`)
	statCrtime = regexp.MustCompile(`(?m)^crtime: 0x([0-9a-f]+):([0-9a-f]+)`)
)

// compareWithDebugfs holds all inodes to what debugfs says of them: fields and blocks.
func compareWithDebugfs(t *testing.T, f *FS, image string) {
	t.Helper()
	var commands []string
	var inodes []*Inode
	for e, err := range f.Walk() {
		if err != nil {
			t.Fatalf("%v: %v", e, err)
		}
		if len(inodes) > 0 && inodes[len(inodes)-1] == e.Inode || strings.HasPrefix(e.Path, "/many/") && len(inodes)%16 != 0 && len(inodes) > 200 {
			continue
		}
		inodes = append(inodes, e.Inode)
		commands = append(commands, fmt.Sprintf("stat <%d>", e.Inode.Number))
	}
	for _, in := range inodes {
		commands = append(commands, fmt.Sprintf("blocks <%d>", in.Number))
	}
	parts := regexp.MustCompile(`(?m)^debugfs: .*\n`).Split(ask(t, image, commands...), -1)[1:]
	if len(parts) != 2*len(inodes) {
		t.Fatalf("debugfs answered %d of %d", len(parts), 2*len(inodes))
	}
	for k, in := range inodes {
		compareStat(t, in, parts[k])
		compareBlocks(t, in, parts[len(inodes)+k])
	}
}

func compareStat(t *testing.T, in *Inode, said string) {
	t.Helper()
	number := func(re *regexp.Regexp, group, base int) uint64 {
		m := re.FindStringSubmatch(said)
		if m == nil {
			return 0
		}
		v, _ := strconv.ParseUint(m[group], base, 64)
		return v
	}
	for what, v := range map[string][2]uint64{
		"number":              {uint64(in.Number), number(statFirst, 1, 10)},
		"mode":                {uint64(in.Mode & 0o7777), number(statFirst, 3, 8)},
		"flags":               {uint64(in.Flags), number(statFirst, 4, 16)},
		"generation":          {uint64(in.Generation), number(statNext, 1, 10)},
		"user":                {uint64(in.UID), number(statOwner, 1, 10)},
		"group":               {uint64(in.GID), number(statOwner, 2, 10)},
		"project":             {uint64(in.Project), number(statOwner, 3, 10)},
		"size":                {uint64(in.Size), number(statOwner, 4, 10)},
		"links":               {uint64(in.Links), number(statLinks, 1, 10)},
		"mtime":               {uint64(uint32(in.Mtime.Unix())), number(statMtime, 1, 16)},
		"mtime's nanoseconds": {uint64(in.Mtime.Nanosecond()), number(statMtime, 2, 16) >> 2},
	} {
		if v[0] != v[1] {
			t.Errorf("inode %d: %s is %d, debugfs says %d", in.Number, what, v[0], v[1])
		}
	}
	if sec := number(statCrtime, 1, 16); sec != 0 && uint64(in.Crtime.Unix()) != sec {
		t.Errorf("inode %d: crtime %v, debugfs says %x", in.Number, in.Crtime, sec)
	}
}

// compareBlocks holds the extents to the blocks that debugfs lists, the tree's nodes among them.
func compareBlocks(t *testing.T, in *Inode, said string) {
	t.Helper()
	want := map[uint64]bool{}
	for _, s := range strings.Fields(said) {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("inode %d: debugfs says %.100q", in.Number, said)
		}
		if n != 0 {
			want[n] = true
		}
	}
	got := map[uint64]bool{}
	bs := in.fs.sb.blockSize
	outside, err := in.outside()
	if err != nil {
		t.Errorf("inode %d: %v", in.Number, err)
	}
	skip := len(outside)
	next := int64(0)
	for e, err := range in.Extents() {
		if err != nil {
			t.Errorf("inode %d: %v", in.Number, err)
			return
		}
		if skip--; skip >= 0 {
			continue
		}
		if e.Kind != Metadata {
			if e.Logical != next {
				t.Errorf("inode %d: extent at %d, not %d", in.Number, e.Logical, next)
			}
			next += e.Length
		}
		for b := e.Offset / bs; e.Kind != Hole && b < (e.Offset+e.Length)/bs; b++ {
			got[uint64(b)] = true
		}
	}
	if in.Type() != unix.S_IFREG && in.Type() != unix.S_IFDIR && in.Type() != unix.S_IFLNK || in.Flags&flagInline != 0 || in.fastLink() {
		want = map[uint64]bool{}
	}
	if !maps.Equal(want, got) {
		t.Errorf("inode %d: blocks %v, debugfs says %v", in.Number, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
}
