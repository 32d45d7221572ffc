package fat

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"
	"sync"
)

// A Reader reads a file's contents. It is an [io.ReaderAt], which several goroutines may use, and an [io.WriterTo].
type Reader struct {
	file *File

	mu      sync.Mutex
	index   int64 // which of the file's clusters the next one is
	cluster uint32
}

// Open returns a reader of a file's contents.
func (f *File) Open() (*Reader, error) {
	if f.Dir {
		return nil, fmt.Errorf("%s: a directory", f.Name)
	}
	return &Reader{file: f, cluster: f.cluster}, nil
}

// Size is the contents' length in bytes.
func (r *Reader) Size() int64 { return r.file.Size }

// at is the file's cluster of a number, and as how many after it follow each other on the device, up to most.
func (r *Reader) at(index, most int64) (cluster uint32, count int64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if index < r.index {
		r.index, r.cluster = 0, r.file.cluster
	}
	for ; r.index < index; r.index++ {
		if err := r.step(); err != nil {
			return 0, 0, err
		}
	}
	cluster = r.cluster
	for count = 1; count < most; count++ {
		if err := r.step(); err != nil {
			return 0, 0, err
		}
		r.index++
		if r.cluster != cluster+uint32(count) {
			break
		}
	}
	return cluster, count, nil
}

// step goes to the next cluster, which there must be. It needs mu.
func (r *Reader) step() error {
	next, err := r.file.fs.next(r.cluster)
	if err == nil && next == 0 {
		err = at(r.file.fs.table+r.file.fs.entryAt(r.cluster), ErrCorrupt, "%d bytes, but its clusters end before", r.file.Size)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", r.file.Name, err)
	}
	r.cluster = next
	return nil
}

// ReadAt implements io.ReaderAt.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	size := r.file.Size
	if off < 0 {
		return 0, fmt.Errorf("%s: read at %d", r.file.Name, off)
	}
	if off >= size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > size-off {
		p, end = p[:size-off], io.EOF
	}
	unit := r.file.fs.cluster
	done := 0
	for done < len(p) {
		here := off + int64(done)
		within := here % unit
		cluster, count, err := r.at(here/unit, (within+int64(len(p)-done)+unit-1)/unit)
		if err != nil {
			return done, err
		}
		n := min(int64(len(p)-done), count*unit-within)
		if err := readFull(r.file.fs.r, p[done:][:n], r.file.fs.offset(cluster)+within); err != nil {
			return done, err
		}
		done += int(n)
	}
	return done, end
}

// WriteTo implements io.WriterTo.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	buf := make([]byte, min(r.file.Size, 256<<10))
	done := int64(0)
	for done < r.file.Size {
		n, err := r.ReadAt(buf, done)
		if err != nil && !errors.Is(err, io.EOF) {
			return done, err
		}
		n, err = w.Write(buf[:n])
		done += int64(n)
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// A Run is a stretch of a file on the device.
type Run struct {
	Metadata bool  // an entry of a directory, or of the table
	Logical  int64 // in the file, -1 for metadata
	Range
}

// Runs yields where a file is: its entries in the directory, and its clusters, each run after its entries in the table. If none of
// these places changed, neither did the file. An error ends it.
func (f *File) Runs() iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		for _, e := range f.entries {
			if !yield(Run{true, -1, e}, nil) {
				return
			}
		}
		if f.Dir {
			for area, err := range f.areas() {
				if !yield(Run{false, 0, area}, err) || err != nil {
					return
				}
			}
			return
		}
		r := Reader{file: f, cluster: f.cluster}
		unit := f.fs.cluster
		total := (f.Size + unit - 1) / unit
		for index := int64(0); index < total; {
			cluster, count, err := r.at(index, total-index)
			if err != nil {
				yield(Run{}, err)
				return
			}
			from, to := f.fs.entryAt(cluster), f.fs.entryAt(cluster+uint32(count))
			if !yield(Run{true, -1, Range{f.fs.table + from, to - from + 1}}, nil) ||
				!yield(Run{false, index * unit, Range{f.fs.offset(cluster), count * unit}}, nil) {
				return
			}
			index += count
		}
	}
}

// Lookup finds a file by its path from the root; names are not case-sensitive. What does not exist is [fs.ErrNotExist].
func (f *FS) Lookup(path string) (*File, error) {
	here := f.Root()
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." {
			continue
		}
		next, err := here.child(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		here = next
	}
	return here, nil
}

func (f *File) child(name string) (*File, error) {
	if !f.Dir {
		return nil, fs.ErrNotExist
	}
	var damaged error
	for c, err := range f.ReadDir() {
		if err != nil {
			damaged = err
		} else if strings.EqualFold(c.Name, name) {
			return c, nil
		}
	}
	if damaged != nil {
		return nil, damaged
	}
	return nil, fs.ErrNotExist
}
