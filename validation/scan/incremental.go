package scan

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
)

// How a change may have reached an inode.
const (
	hitInode uint8 = 1 << iota // its own block, its attributes or its tree
	hitData                    // its contents
)

type hit struct {
	index int // in the base's inodes
	how   uint8
}

// incremental finds what differs from the base. Any error but the context's means that the volume has to be read in full.
func (u *update) incremental(changes *Changes) error {
	u.memory.Add(-int64(len(u.base.encoded)))
	if err := u.base.tree(); err != nil {
		return err
	}
	if u.base.nameCount() == 0 {
		return errors.New("the last scan found no names")
	}
	c := newChanged(changes, u.offset, func(yield func(ext4.Range) bool) {
		for r := range rangesOf(u.base.replayed) {
			if !yield(r) {
				return
			}
		}
		for r := range rangesOf(u.replayed) {
			if !yield(r) {
				return
			}
		}
	})
	if err := u.reload(u.hits(c)); err != nil {
		return err
	}
	if len(u.records) == 0 {
		return nil
	}
	reread, names, err := u.reached()
	if err != nil {
		return err
	}
	if err := u.readDirs(reread, false); err != nil {
		return err
	}
	added := u.differ(reread)
	for _, d := range reread {
		if err := u.listErrs[d]; err != nil && !u.floating[d] {
			return err
		}
	}
	if err := u.survivors(names); err != nil {
		return err
	}
	items := added[:0]
	for _, it := range added {
		if !u.floating[it.dir] { // else it is looked at if its directory has a place again
			it.path, it.evaluate = join(u.dirPath(it.dir), it.letters), true
			items = append(items, it)
		}
	}
	return u.levels(items)
}

// hits are the inodes that a change may have reached, and those that could not be read last time.
func (u *update) hits(c *changed) []hit {
	v := u.base
	n := v.inodeCount()
	pieces := make([][]hit, (n+hitPiece-1)/hitPiece)
	_ = u.parallel(n, hitPiece, func(_ *reader, from, to int) error { // the context's error is found later
		pieces[from/hitPiece] = u.hitsOf(c, from, to)
		return nil
	})
	return slices.Concat(pieces...)
}

const hitPiece = 8192

func (u *update) hitsOf(c *changed, from, to int) (all []hit) {
	v, bs := u.base, u.blockSize
	some := c.any(ext4.Range{Offset: 0, Length: u.size})
	for i := from; i < to; i++ {
		in := v.inode(i)
		how := uint8(0)
		if in.state()&bad != 0 || in.state()&unmapped != 0 && some {
			how = hitInode | hitData
		}
		if some && c.any(u.layout.Inode(in.number())) {
			how |= hitInode
		}
		first, count := in.extents()
		for k := first; some && k < first+count; k++ {
			e := v.extent(k)
			if !c.any(ext4.Range{Offset: int64(e.place) * bs, Length: int64(e.count) * bs}) {
				continue
			}
			if e.kind == ext4.Metadata {
				how |= hitInode
			} else {
				how |= hitData
			}
		}
		if how != 0 {
			all = append(all, hit{i, how})
		}
	}
	return all
}

// reload reads the inodes that were hit, and keeps those that are not as they were. Contents are not read yet: whether anybody
// still wants them will be seen.
func (u *update) reload(hits []hit) error {
	records := make([]*record, len(hits))
	near := len(hits) > u.base.inodeCount()/8
	err := u.parallel(len(hits), chunk, func(r *reader, from, to int) error {
		for i := from; i < to; i++ {
			records[i] = r.again(hits[i], near)
		}
		return u.run.ctx.Err()
	})
	if err != nil {
		return err
	}
	for _, rec := range records {
		if rec != nil {
			u.records[rec.number] = rec
		}
	}
	return nil
}

// again reads an inode again; nil: all of it is as it was, contents included. One that cannot be read is a record without a mode:
// nobody may have a name of it.
func (r *reader) again(h hit, near bool) *record {
	old := r.u.base.record(h.index)
	if h.how == hitData && old.mode&unix.S_IFMT != unix.S_IFLNK {
		old.state &^= hasDigest
		old.fresh = true
		return old
	}
	rec, in, err := r.load(old.number, near)
	if err != nil {
		return &record{number: old.number, err: err}
	}
	rec.fresh = h.how&hitData != 0 || old.reads(rec)
	if !rec.fresh && old.state&hasDigest != 0 {
		rec.digest = old.digest
		rec.state |= hasDigest
	}
	if old.state&hasXattrs != 0 {
		r.u.attributes(rec, in)
	}
	if !rec.fresh && rec.state == old.state && rec.state&bad == 0 && rec.links == old.links && rec.mode == old.mode && rec.uid == old.uid && rec.gid == old.gid &&
		rec.digest == old.digest && rec.target == old.target && slices.Equal(rec.xattrs, old.xattrs) && slices.Equal(rec.extents, old.extents) {
		return nil
	}
	return rec
}

// reads reports whether reading the contents may give something else than it did, as far as the inode and its map say. Flags and
// generation count because checksums depend on them.
func (r *record) reads(now *record) bool {
	if r.mode&unix.S_IFMT != now.mode&unix.S_IFMT || r.size != now.size || r.flags != now.flags || r.generation != now.generation ||
		(r.state|now.state)&(unmapped|isInline) != 0 {
		return true
	}
	i, k := 0, 0
	for {
		for i < len(r.extents) && r.extents[i].kind == ext4.Metadata {
			i++
		}
		for k < len(now.extents) && now.extents[k].kind == ext4.Metadata {
			k++
		}
		if i == len(r.extents) || k == len(now.extents) {
			return i != len(r.extents) || k != len(now.extents)
		}
		if r.extents[i] != now.extents[k] {
			return true
		}
		i, k = i+1, k+1
	}
}

// reached finds the names of the inodes that are not as they were, and the directories to read again: those whose contents may
// differ, and those in which a name's inode is of another type, or none, for then the name is another too.
func (u *update) reached() (reread []uint32, names []int, err error) {
	v := u.base
	touched := make([]bool, v.inodeCount())
	again := map[uint32]bool{}
	for n, rec := range u.records {
		i, _ := v.find(n)
		touched[i] = true
		if _, ok := v.dir(n); ok && rec.fresh && rec.isDir() && rec.links > 0 {
			again[n] = true
		}
	}
	for i := range v.nameCount() {
		n := v.nameAt(i)
		if !touched[n.inode()] {
			continue
		}
		in := v.inode(int(n.inode()))
		if rec := u.records[in.number()]; !isFile(rec) || rec.mode&unix.S_IFMT != in.mode()&unix.S_IFMT {
			if n.dir() == 0 {
				return nil, nil, fmt.Errorf("the root is no directory: %w", cmpErr(rec.err, errNoFile))
			}
			if parent, ok := u.records[n.dir()]; !ok || parent.isDir() && parent.links > 0 {
				again[n.dir()] = true
			}
		}
		names = append(names, i)
	}
	return slices.Sorted(maps.Keys(again)), names, nil
}

// differ compares directories that were read again with what they were: names that are gone take what is in them along, and those
// that are new are returned.
func (u *update) differ(dirs []uint32) (added []*item) {
	v := u.base
	for _, d := range dirs {
		list, ok := u.lists[d]
		if !ok {
			continue
		}
		at, _ := v.dir(d)
		i, end := int(v.dirs[at].first), int(v.dirs[at].first+v.dirs[at].count)
		fresh := 0
		for _, it := range list {
			for i < end && string(v.lettersOf(v.nameAt(i))) < it.letters {
				u.remove(i)
				fresh++
				i++
			}
			if i < end && string(v.lettersOf(v.nameAt(i))) == it.letters {
				if u.survives(i, it) {
					it.base, it.want = i, v.nameAt(i).want()
					i++
					continue
				}
				u.remove(i)
				i++
			}
			fresh++
			added = append(added, it)
		}
		for ; i < end; i++ {
			u.remove(i)
			fresh++
		}
		if fresh == 0 {
			delete(u.lists, d) // nothing came or went
		}
	}
	return added
}

// survives reports whether a name of the base still is what the directory says: of the same inode and type.
func (u *update) survives(i int, it *item) bool {
	in := u.base.inode(int(u.base.nameAt(i).inode()))
	if in.number() != it.inode {
		return false
	}
	kind := in.mode() & unix.S_IFMT
	if rec, ok := u.records[it.inode]; ok && (!isFile(rec) || rec.mode&unix.S_IFMT != kind) {
		return false
	}
	return it.said == 0 || it.said == kind
}

// remove takes a name away, and has what is in it float.
func (u *update) remove(i int) {
	v := u.base
	n := v.nameAt(i)
	u.touch(v.path(i))
	if n.want()&baseline.Descend != 0 {
		u.float(v.inode(int(n.inode())).number())
	}
}

func (u *update) float(d uint32) {
	i, ok := u.base.dir(d)
	if !ok || u.floating[d] {
		return
	}
	u.floating[d] = true
	for k := u.base.dirs[i].first; k < u.base.dirs[i].first+u.base.dirs[i].count; k++ {
		u.remove(int(k))
	}
}

// survivors looks at the names that are as they were, but whose inodes are not.
func (u *update) survivors(names []int) error {
	v := u.base
	var items []*item
	for _, i := range names {
		n := v.nameAt(i)
		if _, ok := u.lists[n.dir()]; ok || u.floating[n.dir()] {
			continue
		}
		in := v.inode(int(n.inode()))
		items = append(items, &item{dir: n.dir(), inode: in.number(), letters: string(v.lettersOf(n)), want: n.want(), base: i})
	}
	for d, list := range u.lists {
		for _, it := range list {
			if _, ok := u.records[it.inode]; ok && it.base >= 0 && !u.floating[d] {
				items = append(items, it)
			}
		}
	}
	for _, it := range items {
		in := v.inode(int(v.nameAt(it.base).inode()))
		it.path, it.evaluate = v.path(it.base), u.records[it.inode].mode != in.mode()
	}
	if err := u.read(items, false); err != nil {
		return err
	}
	for _, it := range items {
		want := v.nameAt(it.base).want()
		if (it.want^want)&baseline.Descend != 0 {
			return fmt.Errorf("%s: with another mode, something else in it is wanted", it.path)
		}
		old, had := v.entry(it.base)
		rec := u.records[it.inode]
		now := rec.entry(it.want)
		if has := complete(it.want, rec.state); has != had || has && !sameEntry(&old, &now) || rec.state&bad != 0 {
			u.touch(it.path)
		}
		if it.want != want {
			u.wants[it.base] = it.want
		}
	}
	return nil
}

// dirPath is the path of a directory that is where it was, or has its place.
func (u *update) dirPath(d uint32) string {
	if p, ok := u.paths[d]; ok {
		return p
	}
	i, _ := u.base.dir(d)
	p := u.base.path(int(u.base.dirs[i].name))
	u.paths[d] = p
	return p
}
