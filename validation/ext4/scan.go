package ext4

import (
	"fmt"
	"io/fs"
	"iter"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// tablePiece is how much of an inode table is read at once, in bytes.
const tablePiece = 64 << 10

// A table reads inodes whose numbers ascend, in large pieces and beside the cache.
type table struct {
	fs       *FS
	group    *group
	buf      []byte
	from, to int64 // what is in buf, on the device
}

func (t *table) inode(n uint32) (*Inode, error) {
	s := t.fs.sb
	if n == 0 || n > s.inodes {
		return nil, at(superOffset, ErrCorrupt, "inode %d of %d", n, s.inodes)
	}
	if want := (n - 1) / s.inodesPerGroup; t.group == nil || t.group.number != want {
		g, err := t.fs.group(want)
		if err != nil {
			return nil, err
		}
		t.group = g
	}
	off := s.offset(t.group.table) + int64((n-1)%s.inodesPerGroup)*s.inodeSize
	if off < t.from || off+s.inodeSize > t.to {
		if err := t.fill(off); err != nil {
			return nil, err
		}
	}
	return t.fs.parseInode(n, t.buf[off-t.from:][:s.inodeSize], off)
}

func (t *table) fill(off int64) error {
	s := t.fs.sb
	if t.buf == nil {
		t.buf = make([]byte, max(tablePiece, s.blockSize))
	}
	from := off / s.blockSize * s.blockSize
	to := min(from+int64(len(t.buf)), s.offset(t.group.table+s.tableBlocks()))
	t.from, t.to = 0, 0
	if err := t.fs.read(t.buf[:to-from], from); err != nil {
		return err
	}
	t.from, t.to = from, to
	return nil
}

// Inodes yields all inodes that are used, as the inodes' bitmaps have it, in the order of their numbers. What cannot be
// read is an error of one inode or of one group, and the next one follows.
func (f *FS) Inodes() iter.Seq2[*Inode, error] {
	return func(yield func(*Inode, error) bool) {
		t := table{fs: f}
		for n := range f.sb.groups {
			g, err := f.group(n)
			if err != nil {
				if !yield(nil, err) {
					return
				}
				continue
			}
			if !f.inodesOf(g, &t, yield) {
				return
			}
		}
	}
}

func (f *FS) inodesOf(g *group, t *table, yield func(*Inode, error) bool) bool {
	used, err := f.inodeBitmap(g)
	if err != nil {
		return yield(nil, err)
	}
	if used == nil {
		return true
	}
	first := uint64(g.number)*uint64(f.sb.inodesPerGroup) + 1
	for i := range f.sb.inodesPerGroup - g.unused {
		n := first + uint64(i)
		if n > uint64(f.sb.inodes) {
			break
		}
		if !used.has(i) {
			continue
		}
		in, err := t.inode(uint32(n))
		if in != nil && n < uint64(f.sb.firstInode) && in.Mode == 0 || err != nil && t.blank(g, i) {
			continue // reserved, and not used for anything
		}
		if !yield(in, err) {
			return false
		}
	}
	return true
}

// blank reports whether an inode that is reserved was never written.
func (t *table) blank(g *group, i uint32) bool {
	off := t.fs.sb.offset(g.table) + int64(i)*t.fs.sb.inodeSize
	if g.number != 0 || i+1 >= t.fs.sb.firstInode || off < t.from || off+t.fs.sb.inodeSize > t.to {
		return false
	}
	return !slices.ContainsFunc(t.buf[off-t.from:][:t.fs.sb.inodeSize], func(c byte) bool { return c != 0 })
}

const maxLinks = 40 // symbolic links on the way of one name, as in the kernel

// Lookup finds a file by its path from the root, and says what that path is without links. Symbolic links on the way are
// followed inside the file system, the last name's is not. What does not exist is [fs.ErrNotExist].
func (f *FS) Lookup(path string) (Entry, error) { return f.find(path, false) }

// Follow is Lookup that follows the last name's link too.
func (f *FS) Follow(path string) (Entry, error) { return f.find(path, true) }

func (f *FS) find(path string, follow bool) (Entry, error) {
	root, err := f.Inode(RootInode)
	if err != nil {
		return Entry{}, err
	}
	way := []Entry{{"", root}} // to where we are
	rest := strings.Split(path, "/")
	for links := 0; len(rest) > 0; {
		name, here := rest[0], way[len(way)-1]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			way = way[:max(1, len(way)-1)]
			continue
		}
		in, err := here.Inode.child(name)
		if err != nil {
			return Entry{}, fmt.Errorf("%s: %w", path, err)
		}
		if in.Type() != unix.S_IFLNK || len(rest) == 0 && !follow {
			way = append(way, Entry{here.Path + "/" + name, in})
			continue
		}
		target, err := in.Readlink()
		if err != nil {
			return Entry{}, fmt.Errorf("%s: %w", path, err)
		}
		if links++; links > maxLinks {
			return Entry{}, fmt.Errorf("%s: %w", path, unix.ELOOP)
		}
		if strings.HasPrefix(target, "/") {
			way = way[:1]
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	if len(way) == 1 {
		way[0].Path = "/"
	}
	return way[len(way)-1], nil
}

// child finds a name in a directory.
func (i *Inode) child(name string) (*Inode, error) {
	if !i.IsDir() {
		return nil, fmt.Errorf("%w: inode %d is not a directory", fs.ErrNotExist, i.Number)
	}
	var damaged error
	for d, err := range i.ReadDir() {
		if err != nil {
			damaged = err
		} else if d.Name == name {
			return i.fs.Inode(d.Inode)
		}
	}
	if damaged != nil {
		return nil, damaged
	}
	return nil, fs.ErrNotExist
}
