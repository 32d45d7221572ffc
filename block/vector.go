package block

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// maxVector is how many buffers the kernel takes in one call (IOV_MAX).
const maxVector = 1024

// ReadVector implements [Vectored].
func (r *Raw) ReadVector(p [][]byte, off int64) error {
	if err := r.check(off, length(p)); err != nil {
		return err
	}
	if err := r.vector(p, off, unix.Preadv); err != nil {
		return fmt.Errorf("image %s: read at %d: %w", r.f.Name(), off, err)
	}
	return nil
}

// WriteVector implements [Vectored].
func (r *Raw) WriteVector(p [][]byte, off int64) error {
	if err := r.checkChange(off, length(p)); err != nil {
		return err
	}
	if err := r.vector(p, off, unix.Pwritev); err != nil {
		return fmt.Errorf("image %s: write at %d: %w", r.f.Name(), off, err)
	}
	return nil
}

// vector moves all of p, in as many calls as it takes. One that moves nothing is the file's end:
// somebody cut it.
func (r *Raw) vector(p [][]byte, off int64, move func(int, [][]byte, int64) (int, error)) error {
	fd := int(r.f.Fd())
	for len(p) > 0 {
		n, err := move(fd, p[:min(len(p), maxVector)], off)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		off += int64(n)
		p = behind(p, n)
	}
	return nil
}

// ReadCached implements [Vectored], by preadv2(2), RWF_NOWAIT.
func (r *Raw) ReadCached(p [][]byte, off int64) bool {
	total := length(p)
	if r.patient.Load() || len(p) > maxVector || r.check(off, total) != nil {
		return false
	}
	n, err := unix.Preadv2(int(r.f.Fd()), p, off, unix.RWF_NOWAIT)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		r.patient.Store(true)
	}
	return err == nil && int64(n) == total
}

func length(p [][]byte) (n int64) {
	for _, b := range p {
		n += int64(len(b))
	}
	return n
}

// behind is what of p follows its first n bytes. It changes neither p nor what p holds.
func behind(p [][]byte, n int) [][]byte {
	for len(p) > 0 && n >= len(p[0]) {
		n -= len(p[0])
		p = p[1:]
	}
	if n > 0 {
		p = append([][]byte{p[0][n:]}, p[1:]...)
	}
	return p
}

// AsVectored is the image itself where it is one, else one that moves a buffer after another.
func AsVectored(image Image) Vectored {
	if v, ok := image.(Vectored); ok {
		return v
	}
	return oneByOne{image}
}

// oneByOne makes an image of single buffers a Vectored one.
type oneByOne struct{ Image }

// ReadVector implements Vectored.
func (o oneByOne) ReadVector(p [][]byte, off int64) error { return each(p, off, o.ReadAt) }

// WriteVector implements Vectored.
func (o oneByOne) WriteVector(p [][]byte, off int64) error { return each(p, off, o.WriteAt) }

// ReadCached implements Vectored: nobody knows.
func (oneByOne) ReadCached([][]byte, int64) bool { return false }

func each(p [][]byte, off int64, move func([]byte, int64) (int, error)) error {
	for _, s := range p {
		if _, err := move(s, off); err != nil {
			return err
		}
		off += int64(len(s))
	}
	return nil
}
