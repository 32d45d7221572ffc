package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"path"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/ext4"
	"redoubt.dev/redoubt/validation/volume/fat"
)

// fatVolume is a FAT file system as a Volume: all files are root's, and may be read and run by all.
type fatVolume struct{ fs *fat.FS }

type fatFile struct{ *fat.File }

func (f fatFile) open() (Contents, error)  { return f.Open() }
func (f fatFile) xattrs() ([]Xattr, error) { return nil, nil }
func (f fatFile) fileMode() fs.FileMode {
	m := fs.FileMode(0o755)
	if f.ReadOnly {
		m = 0o555
	}
	if f.Dir {
		m |= fs.ModeDir
	}
	return m
}

func (f fatFile) extents() iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for r, err := range f.Runs() {
			e := Extent{Kind: ext4.Data, Logical: r.Logical, Range: Range(r.Range)}
			if r.Metadata {
				e.Kind = ext4.Metadata
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func (v fatVolume) Info() Info {
	i := v.fs.Info()
	return Info{
		Kind: "fat", Label: i.Label, UUID: fmt.Sprintf("%04X-%04X", i.Serial>>16, i.Serial&0xffff), BlockSize: i.Cluster, Bytes: i.Bytes,
		Features: []string{fmt.Sprintf("FAT%d", i.Bits)},
	}
}

func (v fatVolume) entry(name string, f *fat.File) *Entry {
	if f == nil {
		return &Entry{Path: name, file: unread{}}
	}
	file := fatFile{f}
	e := &Entry{Path: name, Inode: f.Inode, Mode: unix.S_IFREG | uint32(file.fileMode().Perm()), Links: 1, Size: f.Size, Mtime: f.Mtime, file: file}
	if f.Dir {
		e.Mode = unix.S_IFDIR | uint32(file.fileMode().Perm())
	}
	return e
}

func (v fatVolume) Walk() iter.Seq2[*Entry, error] {
	return func(yield func(*Entry, error) bool) {
		for w, err := range v.fs.Walk() {
			if !yield(v.entry(w.Path, w.File), err) {
				return
			}
		}
	}
}

func (v fatVolume) Lookup(name string, _ bool) (*Entry, error) {
	f, err := v.fs.Lookup(name)
	if err != nil {
		return nil, err
	}
	return v.entry(path.Join("/", name), f), nil
}

func (v fatVolume) ReadDir(dir *Entry) iter.Seq2[*Entry, error] {
	return func(yield func(*Entry, error) bool) {
		d, ok := dir.file.(fatFile)
		if !ok {
			yield(dir, errors.New(dir.Path+": cannot be read"))
			return
		}
		for f, err := range d.ReadDir() {
			name := dir.Path
			if f != nil {
				name = path.Join(dir.Path, f.Name)
			}
			if !yield(v.entry(name, f), err) {
				return
			}
		}
	}
}

func (v fatVolume) Check() iter.Seq[error] { return v.fs.Check() }

func (v fatVolume) Replayed() iter.Seq[Range] { return func(func(Range) bool) {} }
