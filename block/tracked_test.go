package block

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"redoubt.dev/redoubt/memfd"
)

func memory(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := memfd.New("test", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// A rig is a tracked image with the memory that outlives its process.
type rig struct {
	path, base  string // base is empty for a raw image
	size        int64
	scratch     int64
	dirty, snap *os.File
}

func newRig(t testing.TB, overlay bool, scratch int64) (r rig, contents []byte) {
	r = rig{size: oddSize, scratch: scratch}
	r.base, contents = newBase(t, r.size, 11)
	r.path = r.base
	if overlay {
		r.path = newOverlay(t, r.base)
	} else {
		r.base = ""
	}
	r.dirty = memory(t, ChangesSize(r.size))
	r.snap = memory(t, SnapshotSize(scratch))
	return r, contents
}

func (r rig) open(t testing.TB, snapshot bool) *Tracked {
	t.Helper()
	img, err := r.tryOpen(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func (r rig) tryOpen(snapshot bool) (*Tracked, error) {
	c, err := OpenChanges(r.dirty, r.size)
	if err != nil {
		return nil, err
	}
	var s *Snapshot
	if snapshot {
		if s, err = OpenSnapshot(r.snap, r.size, r.scratch); err != nil {
			return nil, err
		}
	}
	var img Image
	if r.base != "" {
		img, err = tryOverlay(r.path, r.base, false)
	} else {
		img, err = Open(r.path, false)
	}
	if err != nil {
		return nil, err
	}
	return NewTracked(img, c, s), nil
}

func (r rig) begin(t testing.TB, img *Tracked, validated bool) {
	t.Helper()
	s, err := OpenSnapshot(r.snap, r.size, r.scratch)
	if err != nil {
		t.Fatal(err)
	}
	img.Hold()
	defer img.Release()
	if err := img.Begin(s, validated); err != nil {
		t.Fatal(err)
	}
}

func (r rig) view(t testing.TB) *View {
	t.Helper()
	open := func(path string) *os.File {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	var base *os.File
	if r.base != "" {
		base = open(r.base)
	}
	img, err := NewReader(open(r.path), base)
	if err != nil {
		t.Fatal(err)
	}
	ro, err := memfd.ReadOnly(r.snap)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	v, err := NewView(img, ro, r.scratch)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// frozen are the blocks of the map that the last snapshot ended.
func (r rig) frozen(t testing.TB) map[int64]bool {
	t.Helper()
	granule, bits, err := Frozen(r.dirty, r.size)
	if err != nil || granule != OverlayBlock {
		t.Fatal(granule, err)
	}
	all := map[int64]bool{}
	for i := range int64(len(bits)) * 64 {
		if bits[i/64]&(1<<(i%64)) != 0 {
			all[i] = true
		}
	}
	return all
}

// change makes a random change of the image and of its model.
func change(t testing.TB, random *rand.Rand, img *Tracked, model []byte, changed map[int64]bool) {
	off := random.Int64N(int64(len(model)))
	n := random.Int64N(min(int64(len(model))-off, []int64{512, 4 << 10, 9000, 150 << 10}[random.IntN(4)])) + 1
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(random.Uint32())
	}
	var err error
	switch random.IntN(4) {
	case 0:
		clear(p)
		err = img.Discard(off, n)
	case 1:
		_, err = img.WriteAt(p, off)
	default:
		half := n / 2
		err = img.WriteVector([][]byte{p[:half], p[half:]}, off)
	}
	if err != nil {
		t.Fatal(err)
	}
	copy(model[off:], p)
	for b := off / OverlayBlock; b*OverlayBlock < off+n; b++ {
		changed[b] = true
	}
}

// TestSnapshotModel: a view shows the disk as it was at its snapshot, while the disk changes and is read as before; the map
// has what changed since the last validated snapshot, and where that was abandoned, since the one before.
func TestSnapshotModel(t *testing.T) {
	for _, overlay := range []bool{false, true} {
		for seed := range uint64(6) {
			t.Run(fmt.Sprintf("overlay=%v/%d", overlay, seed), func(t *testing.T) {
				t.Parallel()
				r, model := newRig(t, overlay, MinScratch+64*OverlayBlock)
				img := r.open(t, false)
				random := rand.New(rand.NewPCG(seed, 2))
				since, validated := map[int64]bool{}, true
				for round := range 6 {
					before := map[int64]bool{}
					for range random.IntN(20) {
						change(t, random, img, model, before)
					}
					if !validated {
						for b := range since {
							before[b] = true
						}
					}
					since = before
					r.snap = memory(t, SnapshotSize(r.scratch))
					r.begin(t, img, validated)
					was := slices.Clone(model)
					for n := range 20 {
						if n == 10 { // the process is replaced, and the image is opened by a reader at any moment
							if err := img.Close(); err != nil {
								t.Fatal(err)
							}
							img = r.open(t, true)
						}
						v := r.view(t)
						got := make([]byte, r.size)
						if _, err := v.ReadAt(got, 0); err != nil {
							t.Fatal(err)
						}
						if i := firstDifference(got, was); i >= 0 {
							t.Fatalf("round %d: the view has changed at %d", round, i)
						}
						at := random.Int64N(r.size)
						part := make([]byte, random.Int64N(10000))
						if k, _ := v.ReadAt(part, at); !bytes.Equal(part[:k], was[at:at+int64(k)]) {
							t.Fatalf("round %d: %d bytes at %d are not the snapshot's", round, k, at)
						}
						if err := v.Close(); err != nil {
							t.Fatal(err)
						}
						change(t, random, img, model, map[int64]bool{})
						sameAsModel(t, img, model, 0, r.size)
					}
					if got := r.frozen(t); len(got) != len(since) {
						t.Fatalf("round %d: %d blocks have changed, the map has %d", round, len(since), len(got))
					} else {
						for b := range since {
							if !got[b] {
								t.Fatalf("round %d: block %d is not in the map", round, b)
							}
						}
					}
					// What changed during the snapshot counts for the next map.
					since, validated = r.frozen(t), random.IntN(2) == 0
					if err := img.Drop(); err != nil {
						t.Fatal(err)
					}
					// The model of the next round has them in what it finds in the running map.
					next := map[int64]bool{}
					for i := range model {
						if model[i] != was[i] {
							next[int64(i)/OverlayBlock] = true
						}
					}
					r.snap = memory(t, SnapshotSize(r.scratch))
					r.begin(t, img, validated)
					got := r.frozen(t)
					for b := range next {
						if !got[b] {
							t.Fatalf("round %d: block %d changed during the snapshot and is not in the next map", round, b)
						}
					}
					if !validated {
						for b := range since {
							if !got[b] {
								t.Fatalf("round %d: block %d of a validation that was abandoned is lost", round, b)
							}
						}
					}
					if err := img.Drop(); err != nil {
						t.Fatal(err)
					}
					since, validated = map[int64]bool{}, true
				}
				if err := img.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// TestSnapshotTogether: readers of a view and writers of its disk at once.
func TestSnapshotTogether(t *testing.T) {
	r, model := newRig(t, false, 4<<20)
	img := r.open(t, false)
	r.begin(t, img, true)
	v := r.view(t)
	defer func() { _ = v.Close() }()
	var writers, readers sync.WaitGroup
	done := make(chan struct{})
	for w := range uint64(3) {
		writers.Go(func() {
			random := rand.New(rand.NewPCG(w, 9))
			p := make([]byte, 12<<10)
			for range 400 {
				off := random.Int64N(r.size - int64(len(p)))
				p[0]++
				for i := range p {
					p[i] = byte(random.Uint32())
				}
				if _, err := img.WriteAt(p, off); err != nil {
					t.Error(err)
				}
			}
		})
		readers.Go(func() {
			random := rand.New(rand.NewPCG(w, 10))
			p := make([]byte, 20<<10)
			for {
				select {
				case <-done:
					return
				default:
				}
				off := random.Int64N(r.size)
				n, _ := v.ReadAt(p, off)
				if !bytes.Equal(p[:n], model[off:off+int64(n)]) {
					t.Errorf("%d bytes at %d are not the snapshot's", n, off)
					return
				}
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()
	if v.Lost() {
		t.Error("lost")
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotLost: what there is no room for costs the snapshot, not the write.
func TestSnapshotLost(t *testing.T) {
	r, model := newRig(t, false, MinScratch)
	img := r.open(t, false)
	r.begin(t, img, true)
	v := r.view(t)
	defer func() { _ = v.Close() }()
	p := bytes.Repeat([]byte{7}, 100<<10)
	for off := int64(0); off < r.size; off += int64(len(p)) {
		part := p[:min(int64(len(p)), r.size-off)]
		if _, err := img.WriteAt(part, off); err != nil {
			t.Fatal(err)
		}
		copy(model[off:], part)
	}
	sameAsModel(t, img, model, 0, r.size)
	if _, err := v.ReadAt(make([]byte, 10), 0); !errors.Is(err, ErrSnapshotLost) || !v.Lost() {
		t.Errorf("%v, though %d bytes were overwritten with room for %d", err, r.size, r.scratch)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFreezeKilled: a process that is killed within Freeze loses no change if its successor is told that nothing was validated.
func TestFreezeKilled(t *testing.T) {
	const size = 1 << 30
	for name, until := range map[string]func(c *Changes){
		"before": func(*Changes) {},
		"merged": func(c *Changes) { c.Mark(5*OverlayBlock, 1); c.Mark(700<<20, 1) }, // what the other one has
		"cleared": func(c *Changes) {
			c.Mark(5*OverlayBlock, 1)
			c.Mark(700<<20, 1)
			clear(c.bits(c.words[wordCurrent] ^ 1))
		},
	} {
		f := memory(t, ChangesSize(size))
		c, err := OpenChanges(f, size)
		if err != nil {
			t.Fatal(err)
		}
		c.Mark(5*OverlayBlock, 1)
		c.Mark(700<<20, 1)
		c.Freeze(true)
		c.Mark(size-1, 1)
		until(c)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if c, err = OpenChanges(f, size); err != nil {
			t.Fatal(err)
		}
		c.Freeze(false)
		_, bits, err := Frozen(f, size)
		if err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{5 * OverlayBlock, 700 << 20, size - 1} {
			if b := off / OverlayBlock; bits[b/64]&(1<<(b%64)) == 0 {
				t.Errorf("%s: the change at %d is lost", name, off)
			}
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestChangesRefused: memory that is not this disk's map or snapshot, or can shrink.
func TestChangesRefused(t *testing.T) {
	f := memory(t, ChangesSize(1<<20))
	if _, err := OpenChanges(f, 1<<30); err == nil {
		t.Error("a map of another size")
	}
	c, err := OpenChanges(f, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	c.words[wordCurrent] = 2
	if _, err := OpenChanges(f, 1<<20); !errors.Is(err, ErrChanges) {
		t.Error(err)
	}
	if _, _, err := Frozen(f, 1<<20); !errors.Is(err, ErrChanges) {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/map"
	if err := os.WriteFile(path, make([]byte, ChangesSize(1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	plain, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, err := OpenChanges(plain, 1<<20); err == nil {
		t.Error("a file that can shrink was mapped")
	}
	s := memory(t, SnapshotSize(MinScratch))
	snap, err := OpenSnapshot(s, 1<<20, MinScratch)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = snap.Close() }()
	if _, err := OpenSnapshot(s, 2<<20, MinScratch); !errors.Is(err, ErrSnapshot) {
		t.Error(err)
	}
}

// TestSnapshotLies: a table that was filled with nonsense ends searches, for the reader and for the writer.
func TestSnapshotLies(t *testing.T) {
	r, _ := newRig(t, false, MinScratch)
	img := r.open(t, false)
	r.begin(t, img, true)
	random := rand.New(rand.NewPCG(1, 1))
	for i := range img.snapshot.table {
		img.snapshot.table[i] = random.Uint64() | 1
	}
	v := r.view(t)
	defer func() { _ = v.Close() }()
	if _, err := v.ReadAt(make([]byte, 100<<10), 0); err != nil {
		t.Error(err)
	}
	if _, err := img.WriteAt(make([]byte, 100<<10), 0); err != nil {
		t.Error(err)
	}
	if !v.Lost() {
		t.Error("a table that is full of lies holds a snapshot")
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}
