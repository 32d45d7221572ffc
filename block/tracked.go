package block

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// A Tracked image is another one whose changes are noted in a map, and which can be held for an instant to begin a snapshot.
// It implements [Vectored].
type Tracked struct {
	Vectored
	changes *Changes // nil: nothing is noted
	written atomic.Uint64
	every   uint64
	tell    func(written uint64)

	mu       sync.RWMutex // read: a change is made; written: none is
	snapshot *Snapshot    // nil while there is none
	closed   bool
}

// NewTracked takes over image, changes, which may be nil, and a snapshot that another process began, which mostly is nil.
func NewTracked(image Image, changes *Changes, snapshot *Snapshot) *Tracked {
	return &Tracked{Vectored: AsVectored(image), changes: changes, snapshot: snapshot}
}

// OnWritten has tell called, by whoever writes, with the number of bytes that were written or discarded since the image was
// opened, whenever so many more were. It is called before anything is written, and must not wait.
func (t *Tracked) OnWritten(every uint64, tell func(written uint64)) { t.every, t.tell = every, tell }

// Hold waits for the changes that are being made and lets none begin until Release.
func (t *Tracked) Hold() { t.mu.Lock() }

// Release ends a hold.
func (t *Tracked) Release() { t.mu.Unlock() }

// Begin begins a snapshot, which it takes over, and another map of changes; validated is for [Changes.Freeze]. The image is held.
func (t *Tracked) Begin(s *Snapshot, validated bool) error {
	if t.closed {
		return errors.Join(fmt.Errorf("%w: the image is closed", ErrSnapshot), s.Close())
	}
	err := t.drop()
	if t.changes != nil {
		t.changes.Freeze(validated)
	}
	t.snapshot = s
	return err
}

// Drop ends the snapshot, if there is one.
func (t *Tracked) Drop() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.drop()
}

func (t *Tracked) drop() error {
	s := t.snapshot
	if s == nil {
		return nil
	}
	t.snapshot = nil
	return s.Close()
}

// change makes a change of a range, once it is noted and what was there is copied.
func (t *Tracked) change(off, n int64, do func() error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if off >= 0 && n > 0 && off < t.Size() && n <= t.Size()-off { // else it is refused below
		if t.changes != nil {
			t.changes.Mark(off, n)
		}
		if t.snapshot != nil {
			t.snapshot.save(t.Vectored, off, n)
		}
	}
	err := do()
	if t.tell != nil && err == nil {
		if sum := t.written.Add(uint64(n)); sum/t.every != (sum-uint64(n))/t.every {
			t.tell(sum)
		}
	}
	return err
}

// WriteAt implements Image.
func (t *Tracked) WriteAt(p []byte, off int64) (n int, err error) {
	err = t.change(off, int64(len(p)), func() (err error) {
		n, err = t.Vectored.WriteAt(p, off)
		return err
	})
	return n, err
}

// Discard implements Image.
func (t *Tracked) Discard(off, n int64) error {
	return t.change(off, n, func() error { return t.Vectored.Discard(off, n) })
}

// WriteVector implements Vectored.
func (t *Tracked) WriteVector(p [][]byte, off int64) error {
	var n int64
	for _, s := range p {
		n += int64(len(s))
	}
	return t.change(off, n, func() error { return t.Vectored.WriteVector(p, off) })
}

// Close implements Image: a snapshot's memory and the map stay.
func (t *Tracked) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	err := t.drop()
	if t.changes != nil {
		err = errors.Join(err, t.changes.Close())
		t.changes = nil
	}
	return errors.Join(err, t.Vectored.Close())
}
