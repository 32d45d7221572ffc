// Package volume opens a file system of any kind that is read here, and shows its files in one way: their names, what
// they are, their contents, and where on the device they lie.
//
// What it reads may be a hostile guest's: the packages below promise bounded time and memory, and errors that name places.
package volume

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"time"

	"redoubt.dev/redoubt/validation/ext4"
	"redoubt.dev/redoubt/validation/partition"
	"redoubt.dev/redoubt/validation/volume/fat"
)

// A Volume is an open file system. Its methods may be called by several goroutines.
type Volume interface {
	// Info is what the file system says of itself.
	Info() Info
	// Walk yields every name, the root's first and then in an order that reads the device forwards, all names of a file
	// after each other. An error is one of the entry's path, and the walk goes on; see [ext4.FS.Walk].
	Walk() iter.Seq2[*Entry, error]
	// Lookup finds a file by its path from the root; the entry's path is one without links. Symbolic links on the way are
	// followed, and the last name's if follow says so. What does not exist is [fs.ErrNotExist].
	Lookup(path string, follow bool) (*Entry, error)
	// ReadDir yields what is in a directory, in its own order.
	ReadDir(dir *Entry) iter.Seq2[*Entry, error]
	// Check yields what is wrong with the structure.
	Check() iter.Seq[error]
	// Replayed yields the places that are not read as they are on the device; see [ext4.FS.Replayed].
	Replayed() iter.Seq[Range]
}

// Info is what a file system says of itself.
type Info struct {
	Kind      string   `json:"kind"` // "ext" or "fat"
	Label     string   `json:"label,omitempty"`
	UUID      string   `json:"uuid,omitempty"`
	BlockSize int64    `json:"blockSize"`
	Bytes     int64    `json:"bytes"`
	Features  []string `json:"features,omitempty"`
	Replayed  int      `json:"replayed,omitempty"` // blocks that are taken from the journal
}

// An Entry is a name, and the file it is for.
type Entry struct {
	Path         string
	Inode        uint64
	Mode         uint32 // as of stat(2): type and permissions
	UID, GID     uint32
	Links        uint32
	Size         int64 // in bytes
	Mtime        time.Time
	Major, Minor uint32 // of a device node
	Target       string // of a symbolic link
	file         file
}

// A Range is a range of bytes of the device, an Extent one that matters to a file, a Kind what it holds, an Xattr an
// extended attribute.
type (
	Range  = ext4.Range
	Extent = ext4.Extent
	Kind   = ext4.Kind
	Xattr  = ext4.Xattr
)

// Contents read a file's: all of it through WriterTo is the fastest.
type Contents interface {
	io.ReaderAt
	io.WriterTo
	Size() int64
}

// A file is what each kind of file system has its own way of.
type file interface {
	open() (Contents, error)
	xattrs() ([]Xattr, error)
	extents() iter.Seq2[Extent, error]
	fileMode() fs.FileMode
}

// errUnread is what an entry says that came with an error: there is only its path.
var errUnread = errors.New("its inode cannot be read")

// unread is the file of such an entry.
type unread struct{}

func (unread) open() (Contents, error)  { return nil, errUnread }
func (unread) xattrs() ([]Xattr, error) { return nil, errUnread }
func (unread) extents() iter.Seq2[Extent, error] {
	return func(y func(Extent, error) bool) { y(Extent{}, errUnread) }
}
func (unread) fileMode() fs.FileMode { return fs.ModeIrregular }

// Open returns a reader of the contents of a regular file.
func (e *Entry) Open() (Contents, error) { return e.file.open() }

// Xattrs returns all extended attributes, sorted by name.
func (e *Entry) Xattrs() ([]Xattr, error) { return e.file.xattrs() }

// Extents yields where on the device the file is; see [ext4.Inode.Extents].
func (e *Entry) Extents() iter.Seq2[Extent, error] { return e.file.extents() }

// FileMode is the mode as Go's packages have it.
func (e *Entry) FileMode() fs.FileMode { return e.file.fileMode() }

// Options bound what reading may take.
type Options struct {
	// MaxMemory is [ext4.Options.MaxMemory].
	MaxMemory int64
}

// Open opens the file system on a device of size bytes. What is recognised and not read is a [partition.ErrRefused].
func Open(r io.ReaderAt, size int64, o Options) (Volume, error) {
	content, err := partition.Identify(r, size)
	if err != nil {
		return nil, err
	}
	if err := content.Refusal(); err != nil {
		return nil, err
	}
	switch content {
	case partition.Ext:
		f, err := ext4.Open(r, size, ext4.Options{MaxMemory: o.MaxMemory})
		if err != nil {
			return nil, err
		}
		return ext{f}, nil
	case partition.FAT:
		f, err := fat.Open(r, size)
		if err != nil {
			return nil, err
		}
		return fatVolume{f}, nil
	default:
		return nil, fmt.Errorf("%w: it is %s", partition.ErrRefused, content)
	}
}

// OpenPartition opens the file system on a partition of a disk.
func OpenPartition(r io.ReaderAt, p *partition.Partition, o Options) (Volume, error) {
	return Open(io.NewSectionReader(r, p.Offset, p.Bytes), p.Bytes, o)
}
