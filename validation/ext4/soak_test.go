package ext4

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSoakReplay replays journals whose transactions are cut and laid anyhow.
func TestSoakReplay(t *testing.T) {
	if !soak() {
		t.Skip("hundreds of random journals: needs REDOUBT_SOAK=1, as `make soak` sets it; `make test` has TestReplay")
	}
	for _, args := range [][]string{{"-t", "ext4", "-b", "1024"}, {"-t", "ext4", "-b", "2048", "-O", "bigalloc,^resize_inode"}, {"-t", "ext4", "-b", "4096", "-O", "inline_data", "-I", "512"}, {"-t", "ext3", "-b", "1024"}} {
		h := newHistory(t, args...)
		for seed := range uint64(50) {
			t.Run(fmt.Sprint(args, seed), func(t *testing.T) { h.random(t, rand.New(rand.NewPCG(seed, 2))) })
		}
	}
}

// random spreads the history over transactions, with some before them that must not count.
func (h *history) random(t *testing.T, r *rand.Rand) {
	sums := []journalShape{{}, {compat: journalCompatSum}, {incompat: journalSumV2}, {incompat: journalSumV3}}[r.IntN(4)]
	sums.incompat |= journalRevoke | journal64Bit*uint32(r.IntN(2))
	sums.start = 1 + uint64(r.IntN(1000))
	all := []transaction{{blocks: h.junk(1 + r.IntN(10))}}
	for _, step := range h.steps {
		parts := make([]transaction, 1+r.IntN(4))
		for b, p := range step {
			k := r.IntN(len(parts))
			if parts[k].blocks == nil {
				parts[k].blocks = map[uint64][]byte{}
			}
			parts[k].blocks[b] = p
		}
		all = append(all, parts...)
	}
	for b := range all[0].blocks { // what is written later must not be revoked by then
		if r.IntN(2) == 0 {
			all[0].revoked = append(all[0].revoked, b)
		}
	}
	for i := range all {
		all[i].time = uint64(i)
	}
	if r.IntN(2) == 0 {
		all = append(all, transaction{blocks: h.junk(5), spoil: "no commit"})
	}
	image := copyFile(t, h.first)
	writeJournal(t, image, sums, all...)
	h.replays(t, image, h.last)
}

// TestSoakKernel reads file systems that the kernel has mounted and is writing to, as they would be if the machine
// stopped now, and holds them to what e2fsck makes of them.
func TestSoakKernel(t *testing.T) {
	if !soak() || os.Geteuid() != 0 {
		t.Skip("mounts file systems: needs REDOUBT_SOAK=1 and root, as `make soak` has; `make test` has TestReplay")
	}
	for _, c := range []struct {
		args    []string
		options string
	}{
		{[]string{"-t", "ext4", "-b", "1024"}, "defaults"},
		{[]string{"-t", "ext4", "-b", "4096"}, "defaults"},
		{[]string{"-t", "ext4", "-b", "4096", "-J", "size=4"}, "data=journal"},
		{[]string{"-t", "ext4", "-b", "4096"}, "journal_async_commit,data=writeback"},
		{[]string{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^64bit"}, "journal_checksum"},
		{[]string{"-t", "ext3", "-b", "1024"}, "defaults"},
		{[]string{"-t", "ext4", "-b", "2048", "-O", "inline_data,ea_inode,large_dir", "-I", "512"}, "defaults"},
		{[]string{"-t", "ext4", "-b", "4096", "-O", "bigalloc,^resize_inode"}, "defaults"},
		{[]string{"-t", "ext4", "-b", "4096", "-O", "fast_commit"}, "defaults"},
	} {
		t.Run(fmt.Sprint(c.args, c.options), func(t *testing.T) { kernel(t, c.options, c.args...) })
	}
}

func kernel(t *testing.T, options string, args ...string) {
	dir, image := t.TempDir(), filepath.Join(t.TempDir(), "fs.img")
	must(t, "mke2fs", append(append([]string{"-q", "-F"}, args...), image, "64M")...)
	if out, err := exec.Command("mount", "-o", "loop,"+options, image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	replayed, refused := 0, 0
	fast := strings.Contains(fmt.Sprint(args), "fast_commit")
	for round := range 12 {
		work(t, dir, round)
		left := copyFile(t, image)
		f, err := openFile(t, left)
		if fast && isAny(err, ErrUnsupported) {
			refused++
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		replayed += len(f.replayed)
		got := summary(t, f)
		repair(t, left)
		sameSummary(t, "as e2fsck mends it", got, summary(t, open(t, left)))
		noProblems(t, f)
	}
	if replayed == 0 && !fast || refused == 0 && fast {
		t.Error("nothing had to be replayed, or refused")
	}
	t.Logf("%d blocks replayed, %d times refused", replayed, refused)
}

// work changes files, and has the last change reach the journal.
func work(t *testing.T, dir string, round int) {
	t.Helper()
	r := rand.New(rand.NewPCG(uint64(round), 3))
	for i := range 60 {
		path := filepath.Join(dir, fmt.Sprintf("d%d", r.IntN(6)), fmt.Sprintf("file-%d-%s", r.IntN(80), strings.Repeat("n", r.IntN(60))))
		switch r.IntN(6) {
		case 0:
			_ = os.RemoveAll(filepath.Dir(path))
		case 1:
			_ = os.Symlink(strings.Repeat("t", 1+r.IntN(200)), path)
		case 2:
			_ = os.Remove(path)
		default:
			write(t, path, random(uint64(i), r.IntN(100_000)))
		}
	}
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("round-%d", round)))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 { // the second one is a fast commit, where there are any
		if _, err := f.WriteString("done"); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
}
