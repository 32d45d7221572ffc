package block

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestTrackedKilled: a process that writes is killed at moments nobody chose, and another one goes on with its map and its
// snapshot: whatever differs from the beginning is in the map, and the view is the beginning's.
func TestTrackedKilled(t *testing.T) {
	if path := os.Getenv("BLOCK_TEST_TRACKED"); path != "" {
		r := rig{path: path, base: os.Getenv("BLOCK_TEST_BASE"), size: oddSize, scratch: 2 << 20}
		r.dirty, r.snap = os.NewFile(3, "map"), os.NewFile(4, "snapshot")
		img, err := r.tryOpen(true)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = os.Stdout.WriteString("x")
		for w := range uint64(3) {
			go func() {
				random := rand.New(rand.NewPCG(uint64(os.Getpid()), w))
				for {
					p := bytes.Repeat([]byte{byte(random.Uint32())}, 1+random.IntN(30000))
					_, _ = img.WriteAt(p, random.Int64N(oddSize-int64(len(p))))
				}
			}()
		}
		select {}
	}
	for _, overlay := range []bool{false, true} {
		r, was := newRig(t, overlay, 2<<20)
		img := r.open(t, false)
		r.begin(t, img, true)
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		for round := range uint64(10) {
			c := exec.Command("/proc/self/exe", "-test.run=TestTrackedKilled$")
			c.Env = append(os.Environ(), "BLOCK_TEST_TRACKED="+r.path, "BLOCK_TEST_BASE="+r.base)
			c.ExtraFiles = []*os.File{r.dirty, r.snap}
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := out.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			kill := time.AfterFunc(time.Duration(rand.New(rand.NewPCG(round, 7)).Int64N(int64(8*time.Millisecond))), func() { _ = c.Process.Kill() })
			_ = c.Wait() // killed
			kill.Stop()
			v := r.view(t)
			got := make([]byte, r.size)
			if _, err := v.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if i := firstDifference(got, was); i >= 0 {
				t.Fatalf("overlay %v, round %d: the view has changed at %d", overlay, round, i)
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		img = r.open(t, true)
		now := make([]byte, r.size)
		if _, err := img.ReadAt(now, 0); err != nil {
			t.Fatal(err)
		}
		r.snap = memory(t, SnapshotSize(r.scratch))
		r.begin(t, img, false)
		changed, marked := 0, r.frozen(t)
		for b := int64(0); b*OverlayBlock < r.size; b++ {
			end := min((b+1)*OverlayBlock, r.size)
			if !bytes.Equal(now[b*OverlayBlock:end], was[b*OverlayBlock:end]) {
				changed++
				if !marked[b] {
					t.Errorf("overlay %v: block %d changed and is not in the map", overlay, b)
				}
			}
		}
		if changed == 0 {
			t.Error("nothing was written")
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
