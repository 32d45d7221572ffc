package volume

import (
	"fmt"
	"io/fs"
	"iter"
	"path"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/ext4"
)

// ext is an ext2, ext3 or ext4 file system as a Volume.
type ext struct{ fs *ext4.FS }

type extFile struct{ *ext4.Inode }

func (f extFile) open() (Contents, error)           { return f.Open() }
func (f extFile) xattrs() ([]Xattr, error)          { return f.Xattrs() }
func (f extFile) extents() iter.Seq2[Extent, error] { return f.Extents() }
func (f extFile) fileMode() fs.FileMode             { return f.FileMode() }

func (v ext) Info() Info {
	i := v.fs.Info()
	u := i.UUID
	return Info{
		Kind: "ext", Label: i.Label, UUID: fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]),
		BlockSize: i.BlockSize, Bytes: int64(i.Blocks) * i.BlockSize, Features: i.Features, Replayed: i.Replayed,
	}
}

// entry makes an entry of an inode; what cannot be read of it is an error, beside what can.
func (v ext) entry(name string, in *ext4.Inode) (*Entry, error) {
	e := &Entry{Path: name, file: unread{}}
	if in == nil {
		return e, nil
	}
	e.Inode, e.Mode, e.UID, e.GID, e.Links = uint64(in.Number), in.Mode, in.UID, in.GID, in.Links
	e.Size, e.Mtime, e.file = in.Size, in.Mtime, extFile{in}
	e.Major, e.Minor = in.Device()
	if in.Type() != unix.S_IFLNK {
		return e, nil
	}
	var err error
	e.Target, err = in.Readlink()
	return e, err
}

func (v ext) Walk() iter.Seq2[*Entry, error] {
	return func(yield func(*Entry, error) bool) {
		for w, err := range v.fs.Walk() {
			e, linkErr := v.entry(w.Path, w.Inode)
			if err == nil {
				err = linkErr
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func (v ext) Lookup(name string, follow bool) (*Entry, error) {
	find := v.fs.Lookup
	if follow {
		find = v.fs.Follow
	}
	found, err := find(name)
	if err != nil {
		return nil, err
	}
	return v.entry(found.Path, found.Inode)
}

func (v ext) ReadDir(dir *Entry) iter.Seq2[*Entry, error] {
	return func(yield func(*Entry, error) bool) {
		in, ok := dir.file.(extFile)
		if !ok {
			yield(dir, fmt.Errorf("%s: cannot be read", dir.Path))
			return
		}
		for d, err := range in.ReadDir() {
			e := &Entry{Path: path.Join(dir.Path, d.Name), file: unread{}}
			var child *ext4.Inode
			if err == nil {
				child, err = v.fs.Inode(d.Inode)
			}
			if err == nil {
				e, err = v.entry(e.Path, child)
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func (v ext) Check() iter.Seq[error] { return v.fs.Check() }

func (v ext) Replayed() iter.Seq[Range] { return v.fs.Replayed() }
