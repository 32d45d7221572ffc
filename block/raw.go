package block

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// ErrInUse says that another process, or another open of this one, uses the image.
var ErrInUse = errors.New("image is in use")

// ErrRange says that a request is not wholly inside the image.
var ErrRange = errors.New("outside the image")

// ErrReadOnly says that a change was asked of a read-only image.
var ErrReadOnly = errors.New("image is read-only")

// SectorSize is the unit of an image's size in bytes.
const SectorSize = 512

// Locks are taken where QEMU's file driver takes its own (QEMU block/file-posix.c: byte
// 100 + permission held, 200 + permission denied to others), so that an image is never used by
// Redoubt and by QEMU or qemu-img at once. They are open-file-description locks: they belong
// to the descriptor, follow it to another process, and end with it.
const (
	lockHeld     = 100
	lockDenied   = 200
	lockEnd      = 300
	permRead     = 0
	permWrite    = 1
	permResize   = 3
	lockWholeLen = lockEnd - lockHeld
)

// A Raw is a raw image in a regular file. It implements [Image].
type Raw struct {
	f        *os.File
	size     int64
	readOnly bool

	patient atomic.Bool // the file system cannot say whether a read would wait

	mu    sync.Mutex
	solid bool // the file system cannot punch holes
}

// Create makes a new, empty image of size bytes (whole sectors) that takes no space until it is
// written; an existing file is refused.
func Create(path string, size int64) error {
	if err := checkSize(size); err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(size), f.Sync(), f.Close())
	if err != nil {
		return errors.Join(fmt.Errorf("create %s: %w", path, err), os.Remove(path))
	}
	return nil
}

func checkSize(size int64) error {
	if size <= 0 || size%SectorSize != 0 {
		return fmt.Errorf("size of %d bytes: must be whole sectors of %d", size, SectorSize)
	}
	return nil
}

// Open opens the image at path; see New.
func Open(path string, readOnly bool) (*Raw, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, err
	}
	return New(f, readOnly)
}

// New takes over f, open for what readOnly asks; f is closed if it is refused. A writer has the
// image alone ([ErrInUse]); readers share it. A format is never guessed: the bytes of the file
// are the bytes of the disk.
func New(f *os.File, readOnly bool) (*Raw, error) {
	r := &Raw{f: f, readOnly: readOnly}
	err := r.open()
	if err == nil {
		err = r.lockAll()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("image %s: %w", f.Name(), err), f.Close())
	}
	return r, nil
}

func (r *Raw) open() error {
	st, err := r.f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	if err := checkSize(st.Size()); err != nil {
		return err
	}
	r.size = st.Size()
	flags, err := unix.FcntlInt(r.f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("F_GETFL: %w", err)
	}
	if mode := flags & unix.O_ACCMODE; !r.readOnly && mode != unix.O_RDWR {
		return errors.New("descriptor is not open for reading and writing")
	}
	return nil
}

func (r *Raw) lockAll() error {
	if !r.readOnly {
		return r.lock(unix.F_WRLCK, lockHeld, lockWholeLen)
	}
	for _, at := range []int64{lockHeld + permRead, lockDenied + permWrite, lockDenied + permResize} {
		if err := r.lock(unix.F_RDLCK, at, 1); err != nil {
			return err
		}
	}
	return nil
}

func (r *Raw) lock(kind int16, start, n int64) error {
	l := unix.Flock_t{Type: kind, Whence: io.SeekStart, Start: start, Len: n}
	err := eintr.Call(func() error { return unix.FcntlFlock(r.f.Fd(), unix.F_OFD_SETLK, &l) })
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return ErrInUse
	}
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

// Size implements Image.
func (r *Raw) Size() int64 { return r.size }

// ReadOnly implements Image.
func (r *Raw) ReadOnly() bool { return r.readOnly }

func (r *Raw) check(off, n int64) error {
	if off < 0 || n < 0 || off > r.size || n > r.size-off {
		return fmt.Errorf("image %s: %d bytes at %d: %w (%d bytes)", r.f.Name(), n, off, ErrRange, r.size)
	}
	return nil
}

func (r *Raw) checkChange(off, n int64) error {
	if r.readOnly {
		return fmt.Errorf("image %s: %w", r.f.Name(), ErrReadOnly)
	}
	return r.check(off, n)
}

// ReadAt implements Image.
func (r *Raw) ReadAt(p []byte, off int64) (int, error) {
	if err := r.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := r.f.ReadAt(p, off)
	if n < len(p) {
		// Somebody cut the file: half an answer would be taken for data.
		return 0, fmt.Errorf("image %s: read %d of %d bytes at %d: %w", r.f.Name(), n, len(p), off, err)
	}
	return n, nil
}

// WriteAt implements Image.
func (r *Raw) WriteAt(p []byte, off int64) (int, error) {
	if err := r.checkChange(off, int64(len(p))); err != nil {
		return 0, err
	}
	return r.f.WriteAt(p, off)
}

// Flush implements Image: fdatasync.
func (r *Raw) Flush() error {
	if err := eintr.Call(func() error { return unix.Fdatasync(int(r.f.Fd())) }); err != nil {
		return fmt.Errorf("image %s: fdatasync: %w", r.f.Name(), err)
	}
	return nil
}

// Discard implements Image: it punches a hole, or writes zeros where the file system cannot.
func (r *Raw) Discard(off, n int64) error {
	if err := r.checkChange(off, n); err != nil || n == 0 {
		return err
	}
	r.mu.Lock()
	solid := r.solid
	r.mu.Unlock()
	if !solid {
		err := eintr.Call(func() error {
			return unix.Fallocate(int(r.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		})
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("image %s: punch hole of %d bytes at %d: %w", r.f.Name(), n, off, err)
		}
		r.mu.Lock()
		r.solid = true
		r.mu.Unlock()
	}
	return r.zero(off, n)
}

var zeros [256 << 10]byte

func (r *Raw) zero(off, n int64) error {
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if _, err := r.f.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}

// Close implements Image: it does not flush. The lock ends with it.
func (r *Raw) Close() error { return r.f.Close() }
