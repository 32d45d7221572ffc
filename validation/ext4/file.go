package ext4

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// A File reads an inode's contents. It is an [io.ReaderAt] of [Inode.Size] bytes, which several goroutines may use, and an
// [io.WriterTo], the fastest way through all of them; holes read as zeros. A hostile file may be terabytes of
// holes: whoever reads it all bounds that by [Inode.Size].
type File struct {
	in     *Inode
	inline []byte

	mu      sync.Mutex
	mapping mapping
}

// Open returns a reader of a regular file's contents, a symbolic link's target or a directory's blocks.
func (i *Inode) Open() (*File, error) {
	switch i.Type() {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
	default:
		return nil, fmt.Errorf("inode %d: it has no contents", i.Number)
	}
	f := &File{in: i, mapping: mapping{in: i}}
	switch {
	case i.Flags&flagInline != 0:
		b, err := i.inlineData()
		if err != nil {
			return nil, err
		}
		f.inline = b
	case i.fastLink():
		target, err := i.Readlink()
		if err != nil {
			return nil, err
		}
		f.inline = []byte(target)
	}
	return f, nil
}

// Size is the contents' length in bytes.
func (f *File) Size() int64 { return f.in.Size }

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("inode %d: read at %d", f.in.Number, off)
	}
	if off >= f.in.Size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > f.in.Size-off {
		p, end = p[:f.in.Size-off], io.EOF
	}
	if f.in.Flags&flagInline != 0 || f.inline != nil {
		// As the kernel has it, a file that is longer than its inline data goes on with zeros.
		n := copy(p, f.inline[min(off, int64(len(f.inline))):])
		clear(p[n:])
		return len(p), end
	}
	done := 0
	for done < len(p) {
		n, err := f.stretch(p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, end
}

// stretch reads as much as follows each other on the device.
func (f *File) stretch(p []byte, off int64) (int, error) {
	bs := f.in.fs.sb.blockSize
	f.mu.Lock()
	r, err := f.mapping.at(uint64(off / bs))
	f.mu.Unlock()
	if err != nil {
		return 0, err
	}
	within := off % bs
	n := int(min(int64(len(p)), int64(r.count)*bs-within))
	if r.kind != Data {
		clear(p[:n])
		return n, nil
	}
	return n, f.in.fs.read(p[:n], f.in.fs.sb.offset(r.physical)+within)
}

const pieceSize = 256 << 10

var pieces = sync.Pool{New: func() any { b := make([]byte, pieceSize); return &b }}

// WriteTo implements io.WriterTo: all contents, from the beginning.
func (f *File) WriteTo(w io.Writer) (int64, error) {
	buf := pieces.Get().(*[]byte)
	defer pieces.Put(buf)
	done := int64(0)
	for done < f.in.Size {
		n, err := f.ReadAt(*buf, done)
		if n > 0 {
			written, err := w.Write((*buf)[:n])
			done += int64(written)
			if err != nil {
				return done, err
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return done, err
		}
	}
	return done, nil
}
