package ext4

import (
	"cmp"
	"fmt"
	"iter"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	maxPath    = 64 << 10 // bytes; nobody can open a longer one than 4 KiB in one go, but make it
	walkWindow = 1024     // inodes that are put in the order of their contents
	nameBytes  = 48       // that a walk keeps for a name, about, beside its letters
)

// An Entry is a name of a file.
type Entry struct {
	Path  string // from the root, beginning with a slash
	Inode *Inode // nil where it cannot be read
}

// Walk yields every name in the file system: first the directories are read, each once, then the inodes in their order,
// and among near ones in the order of their contents, so that reading these goes through the device forwards. All names of a
// file follow each other.
//
// It goes by what directories say, as the kernel does, not by the bitmaps of what is used. An error is one of the entry's
// path, and what follows it is yielded all the same: a name whose inode cannot be read, a directory with a damaged
// block, a second name of a directory (which is not entered twice), an entry that lies about the type. An ErrEffort ends
// the walk.
func (f *FS) Walk() iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		root, err := f.Inode(RootInode)
		if err == nil && !root.IsDir() {
			err = at(root.offset, ErrCorrupt, "inode %d: the root is not a directory", RootInode)
		}
		if !yield(Entry{"/", root}, err) || err != nil {
			return
		}
		w := &walk{fs: f, table: table{fs: f}, known: map[uint32]uint32{RootInode: 0}, dirs: []walkDir{{RootInode, noName}}, yield: yield}
		queue := []uint32{0}
		for len(queue) > 0 {
			first := len(w.names)
			if !w.readDirs(queue) {
				return
			}
			if queue = w.yieldNames(first); queue == nil {
				return
			}
		}
	}
}

const noName = ^uint32(0)

// A walk keeps every name that it found. Their letters are in one place, and numbers stand for directories: there may be
// millions.
type walk struct {
	fs      *FS
	table   table
	names   []walkName
	letters []byte
	dirs    []walkDir
	known   map[uint32]uint32 // directories by their inodes
	blocks  uint64            // of directories, that were read
	yield   func(Entry, error) bool
}

type walkName struct {
	inode   uint32
	dir     uint32 // that it is in
	letters uint32 // where they begin
	length  uint8
	kind    uint8 // the type that the entry says, by its four bits in a mode
}

type walkDir struct {
	inode uint32
	name  uint32 // one of names
}

// readDirs reads directories, and those in them, level by level.
func (w *walk) readDirs(queue []uint32) bool {
	for len(queue) > 0 {
		slices.SortFunc(queue, func(a, b uint32) int { return cmp.Compare(w.dirs[a].inode, w.dirs[b].inode) })
		var below []uint32
		for _, d := range queue {
			var ok bool
			if below, ok = w.readDir(d, below); !ok {
				return false
			}
		}
		queue = below
	}
	return true
}

// readDir reads one directory and adds those in it to below.
func (w *walk) readDir(d uint32, below []uint32) ([]uint32, bool) {
	in, err := w.table.inode(w.dirs[d].inode)
	if err != nil || !in.IsDir() {
		return below, true // what is wrong is said with its name
	}
	if in.mapped() {
		w.blocks += in.mapEnd()
	}
	if w.blocks > w.fs.sb.blocks {
		w.yield(w.entry(w.dirs[d].name, in), at(in.offset, ErrEffort, "directories of more blocks than the file system"))
		return nil, false
	}
	for e, err := range in.ReadDir() {
		if err != nil {
			if !w.yield(w.entry(w.dirs[d].name, in), err) {
				return nil, false
			}
			continue
		}
		if int64(len(w.names)+1)*nameBytes+int64(len(w.letters)+len(e.Name)) > w.fs.memory {
			w.yield(w.entry(w.dirs[d].name, in), at(in.offset, ErrEffort, "%d names", len(w.names)))
			return nil, false
		}
		w.names = append(w.names, walkName{e.Inode, d, uint32(len(w.letters)), uint8(len(e.Name)), uint8(e.Type >> 12)})
		w.letters = append(w.letters, e.Name...)
		if e.Type == unix.S_IFDIR {
			below = w.add(uint32(len(w.names)-1), below)
		}
	}
	return below, true
}

// add makes a directory of a name, if it is the first one of it.
func (w *walk) add(name uint32, queue []uint32) []uint32 {
	n := w.names[name].inode
	if _, ok := w.known[n]; ok {
		return queue
	}
	d := uint32(len(w.dirs))
	w.known[n] = d
	w.dirs = append(w.dirs, walkDir{n, name})
	return append(queue, d)
}

// A named inode has all names of the window's that lead to it.
type named struct {
	inode *Inode
	names []uint32
}

// yieldNames yields the names from one on, and returns the directories among them that no entry told of; nil: stop.
func (w *walk) yieldNames(first int) []uint32 {
	order := make([]uint32, 0, len(w.names)-first)
	for i := first; i < len(w.names); i++ {
		order = append(order, uint32(i))
	}
	slices.SortFunc(order, func(a, b uint32) int {
		return cmp.Or(cmp.Compare(w.names[a].inode, w.names[b].inode), cmp.Compare(a, b))
	})
	late := []uint32{}
	window := make([]named, 0, walkWindow)
	for len(order) > 0 {
		n := w.names[order[0]].inode
		same := 1
		for same < len(order) && w.names[order[same]].inode == n {
			same++
		}
		in, err := w.load(n)
		if err != nil {
			for _, name := range order[:same] {
				if !w.yield(w.entry(name, in), err) {
					return nil
				}
			}
		} else {
			window = append(window, named{in, order[:same]})
		}
		order = order[same:]
		if len(window) == walkWindow || len(order) == 0 {
			var ok bool
			if late, ok = w.yieldWindow(window, late); !ok {
				return nil
			}
			window = window[:0]
		}
	}
	return late
}

// load reads the inode that a name is for.
func (w *walk) load(n uint32) (*Inode, error) {
	in, err := w.table.inode(n)
	if err != nil {
		return nil, err
	}
	if in.Links == 0 || !knownType(in.Type()) {
		return in, at(in.offset, ErrCorrupt, "inode %d: it has names, but mode %o and %d links", n, in.Mode, in.Links)
	}
	return in, nil
}

func knownType(t uint32) bool { return t != 0 && slices.Contains(direntTypes[:], t) }

func (w *walk) yieldWindow(window []named, late []uint32) ([]uint32, bool) {
	byPlace(window, func(n named) *Inode { return n.inode })
	for _, n := range window {
		for _, name := range n.names {
			e := w.entry(name, n.inode)
			if e.Path == "" {
				if !w.yield(w.entry(w.dirs[w.names[name].dir].name, nil), at(n.inode.offset, ErrEffort, "inode %d: a path of more than %d bytes", n.inode.Number, maxPath)) {
					return nil, false
				}
				continue
			}
			if !w.yield(e, nil) {
				return nil, false
			}
			err := w.suspect(name, n.inode)
			if n.inode.IsDir() {
				late = w.add(name, late)
			}
			if err != nil && !w.yield(e, err) {
				return nil, false
			}
		}
	}
	return late, true
}

// suspect says what is wrong with a name whose inode is as it should be.
func (w *walk) suspect(name uint32, in *Inode) error {
	if kind := uint32(w.names[name].kind) << 12; kind != 0 && kind != in.Type() {
		return at(in.offset, ErrCorrupt, "inode %d: its name says type %o, the inode %o", in.Number, kind, in.Type())
	}
	if !in.IsDir() {
		return nil
	}
	if d, ok := w.known[in.Number]; ok && w.dirs[d].name != name {
		return at(in.offset, ErrCorrupt, "inode %d: a second name of a directory: it is %s", in.Number, w.entry(w.dirs[d].name, in).Path)
	}
	return nil
}

// entry makes an entry of a name; the path of one that is too long is empty, of which no other is.
func (w *walk) entry(name uint32, in *Inode) Entry {
	if name == noName {
		return Entry{"/", in}
	}
	length := 0
	for n := name; n != noName; n = w.dirs[w.names[n].dir].name {
		if length += 1 + int(w.names[n].length); length > maxPath {
			return Entry{"", in}
		}
	}
	path := make([]byte, length)
	for n := name; n != noName; n = w.dirs[w.names[n].dir].name {
		v := w.names[n]
		length -= int(v.length)
		copy(path[length:], w.letters[v.letters:][:v.length])
		length--
		path[length] = '/'
	}
	return Entry{string(path), in}
}

// String is the entry's path and inode.
func (e Entry) String() string {
	if e.Inode == nil {
		return e.Path
	}
	return fmt.Sprintf("%s (inode %d)", e.Path, e.Inode.Number)
}
