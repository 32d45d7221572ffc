package block

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A snapshot is what a disk was at one moment: where the disk is not changed since, its image; where it is, a copy of the
// block that was made before the change. Copies and the table of them are in memory of bounded size, and when that is used
// up the snapshot is lost, not the write.
//
// The writer copies a block, then puts it into the table, then changes the image. A reader reads the image, then looks
// whether the block is in the table: if it is, what was read may be anything and the copy counts; if it is not, the change
// came later than the reading. Neither waits for the other.

const (
	snapshotMagic = 0x3150414e53544452 // "RDTSNAP1"
	wordState     = 1                  // one of the states below
	wordDiskSize  = 2
	wordSlots     = 3
	wordUsed      = 4 // slots; the writer's
	stateOpen     = 1
	stateLost     = 2

	slotBits = 20
	maxSlots = 1 << slotBits
)

// Bounds of the memory for copies, in bytes.
const (
	MinScratch = 1 << 20
	MaxScratch = maxSlots * OverlayBlock
)

var (
	// ErrSnapshot says that memory is no snapshot of this disk.
	ErrSnapshot = errors.New("snapshot")
	// ErrSnapshotLost says that the guest changed more of its disk than there was memory for copies.
	ErrSnapshotLost = errors.New("the snapshot is lost: the guest changed more meanwhile than there is scratch memory for")
)

// slotsOf is how many copies fit into scratch bytes, and how many words their table has: at most half are used, so that a
// search ends soon.
func slotsOf(scratch int64) (slots, table int64) {
	slots = scratch / OverlayBlock
	return slots, int64(1) << bits.Len64(uint64(2*slots-1))
}

// SnapshotSize is how much memory a snapshot with scratch bytes for copies takes, in bytes.
func SnapshotSize(scratch int64) int64 {
	slots, table := slotsOf(scratch)
	return 8*(headerWords+(table+wordsPerPage-1)/wordsPerPage*wordsPerPage) + slots*OverlayBlock
}

func checkScratch(scratch int64) error {
	if scratch < MinScratch || scratch > MaxScratch || scratch%OverlayBlock != 0 {
		return fmt.Errorf("%w: scratch of %d bytes: from %d to %d, in blocks of %d", ErrSnapshot, scratch, MinScratch, int64(MaxScratch), OverlayBlock)
	}
	return nil
}

// A Snapshot is the side of it that a disk's writer has.
type Snapshot struct {
	mem   []byte
	words []uint64
	table []uint64
	data  []byte

	mu   sync.Mutex // over what is put into the table
	size int64
}

// OpenSnapshot maps the memory of f, which stays the caller's, to make a snapshot of a disk of size bytes in it, or to go on
// with one that another process began.
func OpenSnapshot(f *os.File, size, scratch int64) (*Snapshot, error) {
	s, err := mapSnapshot(f, size, scratch, true)
	if err != nil {
		return nil, err
	}
	if s.words[wordMagic] == 0 {
		slots, _ := slotsOf(scratch)
		s.words[wordDiskSize], s.words[wordSlots] = uint64(size), uint64(slots)
		atomic.StoreUint64(&s.words[wordState], stateOpen)
		atomic.StoreUint64(&s.words[wordMagic], snapshotMagic)
	}
	return s, s.checkOr()
}

func mapSnapshot(f *os.File, size, scratch int64, writable bool) (*Snapshot, error) {
	if err := checkScratch(scratch); err != nil {
		return nil, err
	}
	mem, err := mapShared(f, SnapshotSize(scratch), writable)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSnapshot, err)
	}
	slots, table := slotsOf(scratch)
	s := &Snapshot{mem: mem, words: wordsOf(mem), size: size, data: mem[int64(len(mem))-slots*OverlayBlock:]}
	s.table = s.words[headerWords:][:table]
	return s, nil
}

// checkOr closes a snapshot whose header is not of this disk.
func (s *Snapshot) checkOr() error {
	slots := uint64(len(s.data) / OverlayBlock)
	for _, w := range []struct {
		what string
		at   int
		want uint64
	}{{"magic", wordMagic, snapshotMagic}, {"disk's size", wordDiskSize, uint64(s.size)}, {"slots", wordSlots, slots}} {
		if v := atomic.LoadUint64(&s.words[w.at]); v != w.want {
			return errors.Join(fmt.Errorf("%w: %s %#x at offset %d, not %#x", ErrSnapshot, w.what, v, 8*w.at, w.want), s.Close())
		}
	}
	return nil
}

// Close gives the mapping back; the memory stays.
func (s *Snapshot) Close() error { return unix.Munmap(s.mem) }

// Lost reports whether the copies did not fit.
func (s *Snapshot) Lost() bool { return atomic.LoadUint64(&s.words[wordState]) != stateOpen }

// Lose gives the snapshot up.
func (s *Snapshot) Lose() { atomic.StoreUint64(&s.words[wordState], stateLost) }

// place is where the search for a block begins.
func (s *Snapshot) place(block uint64) uint64 {
	return block * 0x9e3779b97f4a7c15 >> (64 - bits.Len64(uint64(len(s.table)-1)))
}

// find is where in the table a block is, or where it would be. The table is the writer's, who may lie: a search goes
// through it once.
func (s *Snapshot) find(block int64) (at uint64, slot int, ok bool) {
	mask := uint64(len(s.table) - 1)
	at = s.place(uint64(block))
	for range s.table {
		switch e := atomic.LoadUint64(&s.table[at]); {
		case e == 0:
			return at, 0, false
		case e>>slotBits == uint64(block)+1:
			slot = int(e & (maxSlots - 1))
			return at, slot, slot < len(s.data)/OverlayBlock
		}
		at = (at + 1) & mask
	}
	return at, 0, false
}

func (s *Snapshot) slot(i int) []byte { return s.data[i*OverlayBlock:][:OverlayBlock] }

// save copies the blocks of a range that is about to change, as far as they were not copied before, from the image.
func (s *Snapshot) save(image io.ReaderAt, off, n int64) {
	if s.Lost() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := off / OverlayBlock; b*OverlayBlock < off+n; {
		if _, _, ok := s.find(b); ok {
			b++
			continue
		}
		run := int64(1) // of blocks that have no copy, and whose slots lie side by side
		for ; (b+run)*OverlayBlock < off+n && run < groupBytes/OverlayBlock; run++ {
			if _, _, ok := s.find(b + run); ok {
				break
			}
		}
		if !s.copyRun(image, b, run) {
			s.Lose()
			return
		}
		b += run
	}
}

func (s *Snapshot) copyRun(image io.ReaderAt, b, run int64) bool {
	used := s.words[wordUsed] // a process that was killed has used one more, or not yet put it into the table
	slots := uint64(len(s.data) / OverlayBlock)
	if used > slots || uint64(run) > slots-used {
		return false
	}
	into := s.data[used*OverlayBlock:][:run*OverlayBlock]
	if end := s.size - b*OverlayBlock; int64(len(into)) > end {
		clear(into[end:])
		into = into[:end]
	}
	if _, err := image.ReadAt(into, b*OverlayBlock); err != nil {
		return false
	}
	s.words[wordUsed] = used + uint64(run)
	for i := range run {
		at, _, _ := s.find(b + i)
		if s.table[at] != 0 { // full, which honest slots never make it
			return false
		}
		atomic.StoreUint64(&s.table[at], uint64(b+i+1)<<slotBits|(used+uint64(i)))
	}
	return true
}

// A View reads a disk as it was when its snapshot began, while the disk changes. It implements [io.ReaderAt]; several
// goroutines may use it.
type View struct {
	snapshot *Snapshot
	image    Reader
}

// NewView takes over an image's reader, made after the snapshot began, and maps the memory of f, which stays the caller's.
func NewView(image Reader, f *os.File, scratch int64) (*View, error) {
	s, err := mapSnapshot(f, image.Size(), scratch, false)
	if err == nil {
		err = s.checkOr()
	}
	if err != nil {
		return nil, errors.Join(err, image.Close())
	}
	return &View{s, image}, nil
}

// Size is the disk's, in bytes.
func (v *View) Size() int64 { return v.image.Size() }

// ReadAt implements io.ReaderAt. What it returned before it says ErrSnapshotLost was right.
func (v *View) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off >= v.Size() {
		return 0, io.EOF
	}
	if rest := v.Size() - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	if _, e := v.image.ReadAt(p, off); e != nil {
		return 0, e
	}
	for at := off; at < off+int64(len(p)); {
		b := at / OverlayBlock
		next := min((b+1)*OverlayBlock, off+int64(len(p)))
		if _, slot, ok := v.snapshot.find(b); ok {
			copy(p[at-off:next-off], v.snapshot.slot(slot)[at-b*OverlayBlock:])
		}
		at = next
	}
	if v.snapshot.Lost() { // a change may have come without a copy
		return 0, ErrSnapshotLost
	}
	return len(p), err
}

// Lost reports whether the snapshot was lost: what was made of it is to be thrown away.
func (v *View) Lost() bool { return v.snapshot.Lost() }

// Close gives mapping and image back.
func (v *View) Close() error { return errors.Join(v.snapshot.Close(), v.image.Close()) }
