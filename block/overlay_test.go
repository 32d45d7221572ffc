package block

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// oddSize ends within a block.
const oddSize = 1<<20 + 3*SectorSize

// newBase makes a base with contents, some of it zeros, some of it holes, and returns both.
func newBase(t testing.TB, size int64, seed uint64) (path string, contents []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "base.img")
	if err := Create(path, size); err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(seed, 0))
	contents = make([]byte, size)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := int64(0); at < size; at += 16 << 10 {
		part := contents[at:min(at+16<<10, size)]
		switch random.IntN(4) {
		case 0: // a hole
			continue
		case 1: // zeros
		default:
			for i := range part {
				part[i] = byte(random.Uint32())
			}
		}
		if _, err := f.WriteAt(part, at); err != nil {
			t.Fatal(err)
		}
	}
	return path, contents
}

func newOverlay(t testing.TB, base string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "overlay.img")
	size, err := CreateOverlay(path, base)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(base); err != nil || st.Size() != size {
		t.Fatalf("an overlay of %d bytes, %v", size, err)
	}
	return path
}

// tryOverlay opens an overlay over a base.
func tryOverlay(path, base string, readOnly bool) (*Overlay, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	top, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, err
	}
	below, err := os.Open(base)
	if err != nil {
		return nil, errors.Join(err, top.Close())
	}
	return NewOverlay(top, below, readOnly)
}

func openOverlay(t testing.TB, path, base string) *Overlay {
	t.Helper()
	o, err := tryOverlay(path, base, false)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func sum(t testing.TB, path string) [sha256.Size]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// TestOverlayModel: an overlay behaves as a disk in memory that began as the base, and goes on as
// one when another process takes it over without a word from the last.
func TestOverlayModel(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			base, model := newBase(t, oddSize, seed)
			before := sum(t, base)
			path := newOverlay(t, base)
			o := openOverlay(t, path, base)
			random := rand.New(rand.NewPCG(seed, 1))
			for range 600 {
				off := random.Int64N(oddSize)
				n := random.Int64N(min(oddSize-off, []int64{512, 4 << 10, 9000, 200 << 10}[random.IntN(4)]) + 1)
				if random.IntN(2) == 0 { // as guests do
					off -= off % SectorSize
					n = min(n-n%SectorSize+SectorSize, oddSize-off)
				}
				switch random.IntN(12) {
				case 0:
					if err := o.Close(); err != nil {
						t.Fatal(err)
					}
					o = openOverlay(t, path, base)
				case 1:
					if err := o.Flush(); err != nil {
						t.Fatal(err)
					}
				case 2, 3:
					if err := o.Discard(off, n); err != nil {
						t.Fatal(err)
					}
					clear(model[off : off+n])
				case 4, 5, 6, 7:
					p := make([]byte, n)
					for i := range p {
						p[i] = byte(random.Uint32())
					}
					if m, err := o.WriteAt(p, off); err != nil || int64(m) != n {
						t.Fatal(m, err)
					}
					copy(model[off:], p)
				default:
					sameAsModel(t, o, model, off, n)
				}
			}
			sameAsModel(t, o, model, 0, oddSize)
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			o = openOverlay(t, path, base)
			sameAsModel(t, o, model, 0, oddSize)
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			if sum(t, base) != before {
				t.Error("the base was changed")
			}
		})
	}
}

func sameAsModel(t testing.TB, o Image, model []byte, off, n int64) {
	t.Helper()
	got := make([]byte, n)
	if m, err := o.ReadAt(got, off); err != nil || int64(m) != n {
		t.Fatal(m, err)
	}
	if i := firstDifference(got, model[off:off+n]); i >= 0 {
		t.Fatalf("byte %d of %d at %d is not what was written", i, n, off)
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestOverlayTogether: writers of different sectors of the same blocks lose nothing of each other, and
// nothing of the base.
func TestOverlayTogether(t *testing.T) {
	const size, writers = 256 << 10, 8
	for seed := range uint64(10) {
		base, model := newBase(t, size, seed)
		o := openOverlay(t, newOverlay(t, base), base)
		var all sync.WaitGroup
		for w := range int64(writers) {
			all.Go(func() { // sector w of each block, and the blocks in an order of its own
				random := rand.New(rand.NewPCG(seed, uint64(w)))
				for _, b := range random.Perm(size / OverlayBlock) {
					off := int64(b)*OverlayBlock + w*SectorSize
					p := bytes.Repeat([]byte{byte(w + 1), byte(b)}, SectorSize/2)
					if random.IntN(8) == 0 {
						continue // the base's stays
					}
					if _, err := o.WriteAt(p, off); err != nil {
						t.Error(err)
					}
					copy(model[off:], p)
					got := make([]byte, SectorSize)
					if _, err := o.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
						t.Errorf("sector %d of block %d is not what was written (%v)", w, b, err)
					}
				}
			})
		}
		all.Wait()
		sameAsModel(t, o, model, 0, size)
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// An overlay takes space for what was written only, and discarding what is zeros takes none.
func TestOverlaySpace(t *testing.T) {
	base := create(t)
	path := newOverlay(t, base)
	if n := blocks(t, path); n > 2*OverlayBlock/512 {
		t.Errorf("a new overlay takes %d blocks", n)
	}
	o := openOverlay(t, path, base)
	defer func() { _ = o.Close() }()
	if o.Size() != size || o.ReadOnly() {
		t.Fatalf("%d, %v", o.Size(), o.ReadOnly())
	}
	if err := o.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt([]byte{1}, 5*OverlayBlock+17); err != nil {
		t.Fatal(err)
	}
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	if n := blocks(t, path); n > 4*OverlayBlock/512 {
		t.Errorf("with one byte written it takes %d blocks", n)
	}
}

func TestOverlayRange(t *testing.T) {
	base, _ := newBase(t, oddSize, 1)
	path := newOverlay(t, base)
	o := openOverlay(t, path, base)
	p := make([]byte, 1024)
	for _, off := range []int64{-1, oddSize - 1023, oddSize, 1 << 62} {
		if n, err := o.ReadAt(p, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("read at %d: %d, %v", off, n, err)
		}
		if n, err := o.WriteAt(p, off); n != 0 || !errors.Is(err, ErrRange) {
			t.Errorf("write at %d: %d, %v", off, n, err)
		}
		if err := o.Discard(off, 1024); !errors.Is(err, ErrRange) {
			t.Errorf("discard at %d: %v", off, err)
		}
	}
	if _, err := tryOverlay(path, base, false); !errors.Is(err, ErrInUse) {
		t.Errorf("a second one: %v", err)
	}
	if _, err := Open(base, false); !errors.Is(err, ErrInUse) {
		t.Errorf("a writer of the base: %v", err)
	}
	other := openOverlay(t, newOverlay(t, base), base) // the base is shared
	if err := errors.Join(o.Close(), other.Close()); err != nil {
		t.Fatal(err)
	}
	ro, err := tryOverlay(path, base, true)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ro.Close() }()
	if _, err := ro.WriteAt(p, 0); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	if err := ro.Discard(0, 512); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
}

// TestOverlayKilled: a process that writes to an overlay is killed at random instants. What it was
// told was written is there; every other block is whole as it was or whole as it was to be.
func TestOverlayKilled(t *testing.T) {
	if os.Getenv("BLOCK_TEST_OVERLAY") != "" {
		writeForever(os.Getenv("BLOCK_TEST_OVERLAY"), os.Getenv("BLOCK_TEST_BASE"))
	}
	base, contents := newBase(t, size, 3)
	before := sum(t, base)
	path := newOverlay(t, base)
	model := map[int64]uint64{} // the last write of each block that was found on it
	wrote := 0
	for round := range uint64(25) {
		all := writeAndKill(t, path, base, round)
		o := openOverlay(t, path, base)
		for b := range int64(size / OverlayBlock) {
			got := make([]byte, OverlayBlock)
			if _, err := o.ReadAt(got, b*OverlayBlock); err != nil {
				t.Fatal(err)
			}
			w := all[b]
			if w == nil {
				w = &written{}
			}
			may := w.may
			if w.must {
				wrote++
			} else if n, ok := model[b]; ok {
				may = append(may, n)
			} else if bytes.Equal(got, contents[b*OverlayBlock:][:OverlayBlock]) {
				continue
			}
			found := false
			for _, n := range may {
				if bytes.Equal(got, stamped(contents, b, n)) {
					model[b], found = n, true
				}
			}
			if !found {
				t.Fatalf("block %d is none of the writes %v, nor the base's", b, may)
			}
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d blocks with acknowledged writes", wrote)
	if sum(t, base) != before {
		t.Error("the base was changed")
	}
}

// stamped is a block that is the base's but for what write n put into its middle.
func stamped(contents []byte, b int64, n uint64) []byte {
	p := bytes.Clone(contents[b*OverlayBlock:][:OverlayBlock])
	copy(p[SectorSize:], stamp(n))
	return p
}

func stamp(n uint64) []byte {
	p := make([]byte, OverlayBlock-2*SectorSize)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n*0x9e3779b97f4a7c15+uint64(i))
	}
	return p
}

// TestOverlayCopied: cp makes holes of zeros, so its copy of an overlay is refused; ours is another
// overlay. A base may be copied with its times.
func TestOverlayCopied(t *testing.T) {
	base, model := newBase(t, oddSize, 4)
	path := newOverlay(t, base)
	o := openOverlay(t, path, base)
	for _, b := range []int64{3, 40, 41, 42} {
		p := bytes.Repeat([]byte{byte(b % 3)}, OverlayBlock)
		if _, err := o.WriteAt(p, b*OverlayBlock); err != nil {
			t.Fatal(err)
		}
		copy(model[b*OverlayBlock:], p)
	}
	if _, err := CopyOverlay(t.Context(), path+"2", path, false); !errors.Is(err, ErrInUse) {
		t.Errorf("one that is written: %v", err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{path, path + "cp"}, {"-p", base, base + "2"}} {
		if out, err := exec.Command("cp", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if _, err := tryOverlay(path+"cp", base, false); !errors.Is(err, ErrCopied) {
		t.Errorf("a copy of cp's: %v", err)
	}
	if _, err := CopyOverlay(t.Context(), path+"2", path+"cp", false); !errors.Is(err, ErrCopied) {
		t.Errorf("a copy of that: %v", err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := CopyOverlay(ended, path+"2", path, false); !errors.Is(err, context.Canceled) {
		t.Errorf("one that is called off: %v", err)
	}
	if _, err := os.Stat(path + "2"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is left: %v", err)
	}
	for i, from := range []string{path, path + "cp"} {
		to := fmt.Sprintf("%s%d", path, i)
		if n, err := CopyOverlay(t.Context(), to, from, i == 1); err != nil || n != oddSize {
			t.Fatal(n, err)
		}
		o = openOverlay(t, to, base+"2")
		if i == 0 {
			sameAsModel(t, o, model, 0, oddSize)
		}
		if _, err := o.WriteAt([]byte("another"), 0); err != nil { // of its own
			t.Fatal(err)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
	o = openOverlay(t, path, base)
	sameAsModel(t, o, model, 0, oddSize)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
}
