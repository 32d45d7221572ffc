package ext4

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestReplay: journals of all forms that were left behind are read as e2fsck replays them.
func TestReplay(t *testing.T) {
	for _, args := range [][]string{
		{"-t", "ext4", "-b", "1024"},
		{"-t", "ext4", "-b", "4096"},
		{"-t", "ext3", "-b", "1024", "-J", "size=1"},
	} {
		h := newHistory(t, args...)
		few := !soak() && (args[3] == "4096" || args[1] == "ext3")
		for name, shape := range map[string]journalShape{
			"none":     {0, journalRevoke, 1},
			"wrap":     {0, journalRevoke, 1000},
			"v1":       {journalCompatSum, journalRevoke, 1},
			"v1 wrap":  {journalCompatSum, journalRevoke, 1015},
			"v2":       {0, journalRevoke | journalSumV2, 1},
			"v3":       {0, journalRevoke | journalSumV3, 1},
			"64":       {0, journalRevoke | journal64Bit, 77},
			"v2 64":    {0, journalRevoke | journal64Bit | journalSumV2, 1020},
			"v3 64":    {0, journalRevoke | journal64Bit | journalSumV3, 1010},
			"v3 async": {0, journalRevoke | journalAsync | journalSumV3, 1},
		} {
			if few && !slices.Contains([]string{"none", "v1 wrap", "v2", "v3 64"}, name) {
				continue
			}
			t.Run(fmt.Sprint(args[1], args[3], " ", name), func(t *testing.T) {
				t.Parallel()
				h.shape(t, shape)
			})
		}
	}
}

func (h *history) shape(t *testing.T, shape journalShape) {
	junk := h.junk(8)
	both := []transaction{{blocks: h.steps[0]}, {blocks: h.steps[1], time: 1}}
	image := copyFile(t, h.first)
	writeJournal(t, image, shape, both...)
	h.replays(t, image, h.last)
	if f := open(t, image); !slices.ContainsFunc(slices.Collect(maps.Values(f.replayed)), func(r replayed) bool { return r.escaped }) {
		t.Error("no block was escaped")
	}

	// Revoked blocks, and a transaction without a commit.
	spare := freeBlock(t, h.last)
	image = copyFile(t, h.first)
	junk[spare] = random(1, len(h.steps[1][maxKey(h.steps[1])]))
	writeJournal(t, image, shape, transaction{blocks: junk}, transaction{blocks: both[0].blocks, revoked: slices.Sorted(maps.Keys(without(junk, h.steps[0]))), time: 1},
		transaction{blocks: h.steps[1], time: 2}, transaction{blocks: junk, spoil: "no commit"})
	f := open(t, image)
	if _, ok := f.replayed[spare]; ok {
		t.Errorf("block %d was revoked, and is replayed", spare)
	}
	h.replays(t, image, h.last)

	// What is damaged is refused; damage that an asynchronous commit can leave ends the journal.
	for _, spoil := range []string{"data", "descriptor", "commit"} {
		image = copyFile(t, h.first)
		writeJournal(t, image, shape, transaction{blocks: h.steps[0]}, transaction{blocks: h.steps[1], time: 1, spoil: spoil})
		_, err := openFile(t, image)
		summed := shape.incompat&(journalSumV2|journalSumV3) != 0 || shape.compat != 0
		if shape.incompat&journalAsync != 0 && spoil == "commit" {
			summed = false
		}
		if summed && !isAny(err, ErrChecksum) || !summed && err != nil {
			t.Errorf("%s damaged: %v", spoil, err)
		}
	}
}

// without is m without what also is in n: that a block is revoked in the transaction that writes it would undo that too.
func without(m, n map[uint64][]byte) map[uint64][]byte {
	r := maps.Clone(m)
	for b := range n {
		delete(r, b)
	}
	return r
}

func maxKey(m map[uint64][]byte) uint64 { return slices.Max(slices.Collect(maps.Keys(m))) }

// freeBlock is the last one of an image that is not used.
func freeBlock(t testing.TB, image string) uint64 {
	t.Helper()
	f := open(t, image)
	g, err := f.group(f.sb.groups - 1)
	if err != nil {
		t.Fatal(err)
	}
	b, err := f.blockBitmap(g)
	if err != nil {
		t.Fatal(err)
	}
	for n := f.sb.blocks - 1; ; n-- {
		if b == nil || !b.has(uint32(n-f.sb.groupStart(g.number))) {
			return n
		}
	}
}

// TestReplayOfDebugfs replays what e2fsprogs itself writes into journals.
func TestReplayOfDebugfs(t *testing.T) {
	for _, args := range [][]string{{"-t", "ext4", "-b", "1024"}, {"-t", "ext4", "-b", "4096", "-O", "^64bit"}, {"-t", "ext3", "-b", "2048"}} {
		h := newHistory(t, args...)
		for _, begin := range []string{"jo", "jo -c", "jo -c -v 2", "jo -c -v 3"} {
			t.Run(fmt.Sprint(args, begin), func(t *testing.T) {
				t.Parallel()
				image := copyFile(t, h.first)
				commands := []string{begin}
				junk := h.junk(4)
				spare := freeBlock(t, h.last)
				// With the first version of checksums debugfs counts revocations in, the kernel and e2fsck do not.
				revoke := args[1] != "ext3" || begin == "jo"
				if revoke {
					junk[spare] = random(1, len(junk[maxKey(junk)]))
				}
				for i, blocks := range []map[uint64][]byte{junk, h.steps[0], h.steps[1]} {
					list, data := blockList(blocks)
					file := filepath.Join(t.TempDir(), fmt.Sprint(i))
					write(t, file, data)
					commands = append(commands, fmt.Sprintf("jw -b %s %s", list, file))
					if i == 0 && revoke {
						commands = append(commands, fmt.Sprintf("jw -r %d", spare))
					}
				}
				debugfs(t, image, append(commands, "jc")...)
				h.replays(t, image, h.last)
				f := open(t, image)
				if _, ok := f.replayed[spare]; ok || len(f.replayed) == 0 {
					t.Errorf("%d blocks replayed, a revoked one among them: %v", len(f.replayed), ok)
				}
			})
		}
	}
}

// TestScatteredJournal replays a journal that lies in many pieces.
func TestScatteredJournal(t *testing.T) {
	tr := newTree(t)
	for i := range 600 {
		tr.file(t, fmt.Sprintf("/files/%d", i), random(uint64(i), 7000))
	}
	image := tr.image(t, "10M", "-t", "ext4", "-b", "1024", "-O", "^has_journal")
	var remove []string
	for i := 0; i < 600; i += 2 {
		remove = append(remove, fmt.Sprintf("rm /files/%d", i))
	}
	debugfs(t, image, remove...)
	repair(t, image)
	must(t, "tune2fs", "-j", "-J", "size=2", image)
	f := open(t, image)
	j, err := f.Inode(8)
	if err != nil {
		t.Fatal(err)
	}
	pieces := 0
	for e, err := range j.Extents() {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == Data {
			pieces++
		}
	}
	if pieces < 50 {
		t.Fatalf("the journal has %d pieces only", pieces)
	}
	next := copyFile(t, image)
	debugfs(t, next, "rm /files/1", "mkdir /new", "sif /files/3 mode 0100700")
	repair(t, next)
	h := &history{first: image, last: next, steps: []map[uint64][]byte{changes(t, image, next)}}
	left := copyFile(t, image)
	writeJournal(t, left, journalShape{0, journalRevoke | journalSumV3 | journal64Bit, 500}, transaction{blocks: h.steps[0]})
	h.replays(t, left, next)
}

// TestRefusedJournals: journals that cannot be replayed here are refused with the reason.
func TestRefusedJournals(t *testing.T) {
	h := newHistory(t, "-t", "ext4", "-b", "1024", "-O", "fast_commit", "-J", "size=3")
	image := copyFile(t, h.first)
	shape := journalShape{0, journalRevoke | journalSumV3 | journal64Bit | journalFastCommit, 1}
	writeJournal(t, image, shape, transaction{blocks: h.steps[0]}, transaction{blocks: h.steps[1], time: 1})
	h.replays(t, image, h.last) // no fast commits
	f := open(t, image)
	j, err := f.openJournal()
	if err != nil {
		t.Fatal(err)
	}
	if j.last == j.end {
		t.Fatal("no room for fast commits")
	}
	place, err := j.place(j.last + 1)
	if err != nil {
		t.Fatal(err)
	}
	head := binary.LittleEndian.AppendUint16(nil, fastCommitHead)
	head = binary.LittleEndian.AppendUint16(head, 8)
	head = binary.LittleEndian.AppendUint32(head, 0)
	head = binary.LittleEndian.AppendUint32(head, 9) // the number of the next transaction
	patch(t, image, f.sb.offset(place), head)
	if _, err := openFile(t, image); !isAny(err, ErrUnsupported) {
		t.Errorf("fast commits: %v", err)
	}
	external := copyFile(t, h.first)
	changeSuper(t, external, func(b []byte) {
		b[0x60] |= incompatRecover
		binary.LittleEndian.PutUint32(b[0xe0:], 0)
		binary.LittleEndian.PutUint32(b[0xe4:], 0x801)
	})
	if _, err := openFile(t, external); !isAny(err, ErrUnsupported) {
		t.Errorf("external journal: %v", err)
	}
	outside := copyFile(t, h.first)
	writeJournal(t, outside, journalShape{0, journalRevoke, 1}, transaction{blocks: map[uint64][]byte{1 << 30: make([]byte, 1024)}})
	if _, err := openFile(t, outside); !isAny(err, ErrCorrupt) {
		t.Errorf("block behind the end: %v", err)
	}
}

func patch(t testing.TB, image string, off int64, b []byte) {
	t.Helper()
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}
