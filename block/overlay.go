package block

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
)

// OverlayBlock is the unit in bytes in which an overlay holds a disk's contents or its base does.
const OverlayBlock = 4 << 10

// MaxOverlay bounds an overlay's size in bytes: 32 MiB of memory say what is in it.
const MaxOverlay = 1 << 40

const (
	group      = 16 // blocks that are locked together, and written at once at most
	groupBytes = group * OverlayBlock
	locks      = 64
)

// An Overlay is a disk that begins as another, its base, which is only read. What is written goes to a
// sparse file beside it: a block of that file that is allocated is the disk's, a hole shows the
// base's block. The file system's own metadata say which it is, so that no map of ours can disagree
// with the data: after the process died every completed write is there, and after a power loss each
// block is as it was or as it was written, never half the base's. It implements [Image].
//
// A block that was once written stays so: discarding writes zeros, because a hole would show the base.
type Overlay struct {
	top  *Raw
	base *Raw
	size int64

	present []uint64 // a bit a block, set once, atomically; see has
	locks   [locks]sync.Mutex
	buffers sync.Pool // *[]byte of groupBytes
}

// NewOverlay takes over the overlay's file and its base's, open for what readOnly asks and for reading;
// both are closed if they are refused. The overlay must have been made for this base as it is
// ([ErrBase]) by [CreateOverlay], its file system must tell holes from data, and nobody may write
// either of them ([ErrInUse]); readers share the base.
func NewOverlay(overlay, base *os.File, readOnly bool) (*Overlay, error) {
	top, err := New(overlay, readOnly)
	if err != nil {
		return nil, errors.Join(err, base.Close())
	}
	below, err := New(base, true)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("base: %w", err), top.Close())
	}
	return overlayOf(top, below)
}

func overlayOf(top, below *Raw) (*Overlay, error) {
	o := &Overlay{top: top, base: below, size: below.size}
	o.buffers.New = func() any { b := make([]byte, groupBytes); return &b }
	if err := o.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("overlay %s: %w", top.f.Name(), err), o.Close())
	}
	return o, nil
}

// open checks what the overlay says of itself and learns what is in it.
func (o *Overlay) open() error {
	if err := checkOverlaySize(o.size); err != nil {
		return err
	}
	st, err := o.base.f.Stat()
	if err != nil {
		return err
	}
	if err := checkTrailer(o.top.f, o.top.size, recordOf(st)); err != nil {
		return err
	}
	o.present = make([]uint64, (blocksOf(o.size)+63)/64)
	return extents(o.top.f, roundUp(o.size), func(from, to int64) error {
		if from%OverlayBlock != 0 || to%OverlayBlock != 0 {
			return fmt.Errorf("data from %d to %d: %w", from, to, errHoles)
		}
		o.set(from/OverlayBlock, to/OverlayBlock)
		return nil
	})
}

func checkOverlaySize(size int64) error {
	if size > MaxOverlay {
		return fmt.Errorf("base of %d bytes: the most is %d", size, int64(MaxOverlay))
	}
	return nil
}

func blocksOf(size int64) int64 { return (size + OverlayBlock - 1) / OverlayBlock }

func roundUp(size int64) int64 { return blocksOf(size) * OverlayBlock }

func (o *Overlay) has(block int64) bool {
	return atomic.LoadUint64(&o.present[block/64])&(1<<(block%64)) != 0
}

// set says that blocks are in the overlay. They are: their data was written before.
func (o *Overlay) set(from, to int64) {
	for b := from; b < to; {
		n := min(to, (b/64+1)*64) - b
		mask := ^uint64(0) >> (64 - n) << (b % 64)
		atomic.OrUint64(&o.present[b/64], mask)
		b += n
	}
}

// run is how many of the blocks from b on, up to end, are alike, and whether they are in the overlay.
func (o *Overlay) run(b, end int64) (n int64, has bool) {
	has = o.has(b)
	var alike uint64 // a word of such blocks
	if has {
		alike = ^alike
	}
	for n = 1; b+n < end; {
		switch at := b + n; {
		case at%64 == 0 && at+64 <= end && atomic.LoadUint64(&o.present[at/64]) == alike:
			n += 64
		case o.has(at) == has:
			n++
		default:
			return n, has
		}
	}
	return n, has
}

// Size implements Image: the base's.
func (o *Overlay) Size() int64 { return o.size }

// ReadOnly implements Image.
func (o *Overlay) ReadOnly() bool { return o.top.readOnly }

func (o *Overlay) check(off, n int64) error {
	if off < 0 || n < 0 || off > o.size || n > o.size-off {
		return fmt.Errorf("overlay %s: %d bytes at %d: %w (%d bytes)", o.top.f.Name(), n, off, ErrRange, o.size)
	}
	return nil
}

func (o *Overlay) checkChange(off, n int64) error {
	if o.top.readOnly {
		return fmt.Errorf("overlay %s: %w", o.top.f.Name(), ErrReadOnly)
	}
	return o.check(off, n)
}

// ReadAt implements Image.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if err := o.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	total := len(p)
	for len(p) > 0 {
		b, end := off/OverlayBlock, blocksOf(off+int64(len(p)))
		n, has := o.run(b, end)
		part := p[:min(int64(len(p)), (b+n)*OverlayBlock-off)]
		from := o.base
		if has {
			from = o.top
		}
		if _, err := from.ReadAt(part, off); err != nil {
			return 0, err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return total, nil
}

// WriteAt implements Image.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := o.checkChange(off, int64(len(p))); err != nil {
		return 0, err
	}
	total := len(p)
	for len(p) > 0 {
		// As far as all is in the overlay it is a raw image; a block never leaves it again.
		b, end := off/OverlayBlock, blocksOf(off+int64(len(p)))
		n, has := o.run(b, end)
		last := (b + n) * OverlayBlock
		if !has {
			last = min(last, (b/group+1)*groupBytes)
		}
		part := p[:min(int64(len(p)), last-off)]
		var err error
		if has {
			_, err = o.top.WriteAt(part, off)
		} else {
			err = o.copyUp(part, off)
		}
		if err != nil {
			return 0, err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return total, nil
}

// copyUp writes to blocks of one group of which some are not in the overlay: those are written whole,
// the base's contents around what is new. Under the lock no other write to them is overtaken by what
// was read from the base before it.
func (o *Overlay) copyUp(p []byte, off int64) error {
	lock := &o.locks[off/groupBytes%locks]
	lock.Lock()
	defer lock.Unlock()
	for len(p) > 0 {
		b, end := off/OverlayBlock, blocksOf(off+int64(len(p)))
		n, has := o.run(b, end) // what was not there a moment ago may be now
		part := p[:min(int64(len(p)), (b+n)*OverlayBlock-off)]
		var err error
		if has {
			_, err = o.top.WriteAt(part, off)
		} else {
			err = o.fill(part, off, b, n)
		}
		if err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// fill writes the n blocks from b on, p at off among them, none of which is in the overlay. It
// writes from memory of its own: the guest's could not be there when the kernel copies a page of
// it, and a process that is killed just then would leave a block of zeros.
func (o *Overlay) fill(p []byte, off, b, n int64) error {
	buf := o.buffers.Get().(*[]byte)
	defer o.buffers.Put(buf)
	start, stop := b*OverlayBlock, (b+n)*OverlayBlock
	whole := (*buf)[:stop-start]
	if end := off + int64(len(p)); start < off || end < min(stop, o.size) {
		if _, err := o.base.ReadAt(whole[:min(stop, o.size)-start], start); err != nil {
			return err
		}
	}
	if stop > o.size {
		clear(whole[o.size-start:])
	}
	copy(whole[off-start:], p)
	if _, err := o.top.f.WriteAt(whole, start); err != nil {
		return err
	}
	o.set(b, b+n)
	return nil
}

// Flush implements Image: fdatasync of the overlay.
func (o *Overlay) Flush() error { return o.top.Flush() }

// Discard implements Image: zeros are written, except where the base has them anyway.
func (o *Overlay) Discard(off, n int64) error {
	if err := o.checkChange(off, n); err != nil {
		return err
	}
	for n > 0 {
		part := min(n, groupBytes-off%groupBytes)
		if zero, err := o.zeroBelow(off, part); err != nil {
			return err
		} else if !zero {
			if _, err := o.WriteAt(zeros[:part], off); err != nil {
				return err
			}
		}
		off, n = off+part, n-part
	}
	return nil
}

// zeroBelow reports whether a range, of one group, shows the base, and that holds zeros there.
func (o *Overlay) zeroBelow(off, n int64) (bool, error) {
	b, end := off/OverlayBlock, blocksOf(off+n)
	if alike, has := o.run(b, end); has || b+alike < end {
		return false, nil
	}
	buf := o.buffers.Get().(*[]byte)
	defer o.buffers.Put(buf)
	if _, err := o.base.ReadAt((*buf)[:n], off); err != nil {
		return false, err
	}
	return bytes.Equal((*buf)[:n], zeros[:n]), nil
}

// Close implements Image: it does not flush. The locks end with it.
func (o *Overlay) Close() error { return errors.Join(o.top.Close(), o.base.Close()) }
