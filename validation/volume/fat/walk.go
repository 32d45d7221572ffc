package fat

import "iter"

// maxDepth is how deep a walk goes: no path of 4 KiB is deeper.
const maxDepth = 2048

// An Entry is a file that was found on a walk.
type Entry struct {
	Path string // from the root, beginning with a slash
	File *File  // nil where it cannot be read
}

// Walk yields every file with its path, a directory before what is in it. An error is one of the path's, and the walk goes
// on; a directory that is met a second time is one. An [ErrEffort] ends it.
func (f *FS) Walk() iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		root := f.Root()
		w := &walk{fs: f, known: map[uint32]bool{root.cluster: true}, left: f.Info().Bytes, yield: yield}
		if yield(Entry{"/", root}, nil) {
			w.dir("", root, 0)
		}
	}
}

type walk struct {
	fs    *FS
	known map[uint32]bool // directories, by their first cluster
	left  int64           // bytes of directories that can still be
	yield func(Entry, error) bool
}

// dir goes through a directory and reports whether to go on.
func (w *walk) dir(path string, d *File, depth int) bool {
	for c, err := range d.ReadDir() {
		if err != nil {
			if !w.yield(Entry{path + "/", nil}, err) {
				return false
			}
			continue
		}
		e := Entry{path + "/" + c.Name, c}
		if !w.yield(e, nil) {
			return false
		}
		if !c.Dir || c.cluster == 0 {
			continue
		}
		where := w.fs.offset(c.cluster)
		if w.known[c.cluster] || depth == maxDepth {
			if !w.yield(e, at(where, ErrCorrupt, "%s: a second name of a directory, or too deep", c.Name)) {
				return false
			}
			continue
		}
		w.known[c.cluster] = true
		for area, err := range c.areas() {
			if err == nil {
				w.left -= area.Length
			}
		}
		if w.left < 0 {
			w.yield(e, at(where, ErrEffort, "directories of more bytes than the file system"))
			return false
		}
		if !w.dir(e.Path, c, depth+1) {
			return false
		}
	}
	return true
}

const maxProblems = 1000

// Check yields what is wrong with the structure, at most a thousand findings: what Walk finds, clusters with two
// owners, and chains that are longer or shorter than their file. Lost clusters and the table's copies are not looked at.
func (f *FS) Check() iter.Seq[error] {
	return func(yield func(error) bool) {
		owned := make([]byte, f.clusters/8+1)
		left := maxProblems
		say := func(err error) bool {
			left--
			return err == nil || yield(err) && left > 0
		}
		for e, err := range f.Walk() {
			if err == nil && e.File != nil {
				err = e.File.claim(owned)
			}
			if err != nil && !say(err) {
				return
			}
		}
	}
}

// claim marks a file's clusters as its own.
func (f *File) claim(owned []byte) error {
	count := int64(0)
	for c := f.cluster; c != 0; count++ {
		if owned[c/8]&(1<<(c%8)) != 0 {
			return at(f.fs.offset(c), ErrCorrupt, "%s: cluster %d has another owner too", f.Name, c)
		}
		owned[c/8] |= 1 << (c % 8)
		next, err := f.fs.next(c)
		if err != nil {
			return err
		}
		c = next
	}
	if want := (f.Size + f.fs.cluster - 1) / f.fs.cluster; !f.Dir && count != want {
		return at(f.fs.table, ErrCorrupt, "%s: %d clusters for %d bytes", f.Name, count, f.Size)
	}
	return nil
}
