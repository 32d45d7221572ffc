package scan

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
	"redoubt.dev/redoubt/validation/partition"
)

// An update is what a scan finds of one volume: all, or what differs from its base.
type update struct {
	run          *run
	name         string
	kind         kind
	offset, size int64
	full         bool // every name counts as touched
	fs           *ext4.FS
	layout       *ext4.Layout
	fingerprint  [32]byte
	replayed     []byte
	blockSize    int64

	base     *volume               // nil: there is none
	records  map[uint32]*record    // inodes that are new, or not as they were
	lists    map[uint32][]*item    // names in directories that are new, elsewhere, or not as they were; 0 has the root's
	listErrs map[uint32]error      // why there is no list of a directory that was to be read
	places   map[uint32]*item      // directories that are new or elsewhere, by their inodes
	paths    map[uint32]string     // of directories
	floating map[uint32]bool       // directories of the base that are no longer where they were
	wants    map[int]baseline.Want // of names of the base that are where they were

	touched  []string
	problems []Problem
	damaged  bool

	memory  atomic.Int64 // that can still be kept
	extents atomic.Int64 // that can still be looked at
	blocks  atomic.Int64 // of directories, that can still be read
}

// An item is a name.
type item struct {
	dir      uint32
	inode    uint32
	letters  string
	path     string
	said     uint32 // the type that the directory says
	want     baseline.Want
	base     int  // its place in the base's names, -1: none
	evaluate bool // what is wanted of it has to be asked for
	bad      bool // it leads to nothing that can be read
}

func (r *run) newUpdate(name string, k kind, p *partition.Partition) *update {
	u := &update{
		run: r, name: name, kind: k, offset: p.Offset, size: p.Bytes, blockSize: 512,
		records: map[uint32]*record{}, lists: map[uint32][]*item{}, listErrs: map[uint32]error{}, places: map[uint32]*item{},
		paths: map[uint32]string{}, floating: map[uint32]bool{}, wants: map[int]baseline.Want{},
	}
	u.memory.Store(min(r.o.MaxMemory, 4<<30-1)) // no section of an index may be longer
	return u
}

// setReplayed notes the places whose contents come from the journal, put together.
func (u *update) setReplayed(all iter.Seq[ext4.Range]) {
	i := u.fs.Info()
	u.blockSize = i.BlockSize
	u.extents.Store(2*int64(i.Blocks) + 1<<20)
	u.blocks.Store(int64(i.Blocks))
	var last ext4.Range
	flush := func() {
		if last.Length > 0 {
			u.replayed = binary.LittleEndian.AppendUint64(u.replayed, uint64(last.Offset))
			u.replayed = binary.LittleEndian.AppendUint64(u.replayed, uint64(last.Length))
		}
	}
	for r := range all {
		if r.Offset == last.Offset+last.Length {
			last.Length += r.Length
			continue
		}
		flush()
		last = r
	}
	flush()
}

func rangesOf(b []byte) iter.Seq[ext4.Range] {
	return func(yield func(ext4.Range) bool) {
		for ; len(b) >= rangeSize; b = b[rangeSize:] {
			if !yield(ext4.Range{Offset: int64(binary.LittleEndian.Uint64(b)), Length: int64(binary.LittleEndian.Uint64(b[8:]))}) {
				return
			}
		}
	}
}

// need takes some of the memory.
func (u *update) need(n int64) error {
	if u.memory.Add(-n) < 0 {
		return fmt.Errorf("%w: the volume's names and what is known of them take more than %d bytes", ErrEffort, u.run.o.MaxMemory)
	}
	return nil
}

// wrong notes that something of the structure is wrong at a path. An incremental scan ends with it.
func (u *update) wrong(path string, err error) error {
	if u.base != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	u.damaged = true
	u.problem(path, err)
	return nil
}

func (u *update) problem(path string, err error) {
	u.problems = append(u.problems, Problem{baseline.Name{Volume: u.name, Path: path}, err})
}

// touch notes that a name is not as it was. What is touched in a full scan is told at its end.
func (u *update) touch(path string) {
	if u.base != nil {
		u.touched = append(u.touched, path)
	}
}

// whole reads all of the volume.
func (u *update) whole() error {
	root := &item{inode: rootInode, path: "/", base: -1, evaluate: true}
	u.lists[0] = []*item{root}
	return u.levels(u.lists[0])
}

// levels reads what names lead to, and the directories among it, level by level.
func (u *update) levels(items []*item) error {
	for len(items) > 0 {
		if err := u.read(items, true); err != nil {
			return err
		}
		dirs, err := u.settle(items)
		if err != nil {
			return err
		}
		if err := u.list(dirs); err != nil {
			return err
		}
		items = items[:0:0]
		for _, d := range dirs {
			if err := u.listErrs[d]; err != nil {
				return u.wrong(u.paths[d], err)
			}
			for _, it := range u.lists[d] {
				it.path, it.evaluate, it.base = join(u.paths[d], it.letters), true, -1
				if len(it.path) > maxPath {
					it.bad = true
					if err := u.wrong(u.paths[d], fmt.Errorf("%w: a path of more than %d bytes", ErrEffort, maxPath)); err != nil {
						return err
					}
					continue
				}
				items = append(items, it)
			}
		}
	}
	return nil
}

func join(dir, name string) string {
	if dir == "/" {
		return dir + name
	}
	return dir + "/" + name
}

// A job is an inode, and the names that lead to it.
type job struct {
	number uint32
	items  []*item
	record *record
	err    error
}

const chunk = 64 // inodes that are read, and whose contents are put in their order, at once

// read reads what names lead to, and all that is wanted of it.
func (u *update) read(items []*item, near bool) error {
	slices.SortStableFunc(items, func(a, b *item) int { return cmp.Compare(a.inode, b.inode) })
	jobs := make([]job, 0, len(items))
	for i := 0; i < len(items); {
		first := i
		for i++; i < len(items) && items[i].inode == items[first].inode; i++ {
		}
		jobs = append(jobs, job{number: items[first].inode, items: items[first:i]})
	}
	err := u.parallel(len(jobs), chunk, func(r *reader, from, to int) error { return r.chunk(jobs[from:to], near) })
	if err != nil {
		return err
	}
	for i := range jobs {
		j := &jobs[i]
		if j.err == nil {
			u.records[j.number] = j.record
		}
		for _, it := range j.items {
			if err := u.judge(it, j); err != nil {
				return err
			}
		}
	}
	return nil
}

// judge notes what of a name could not be read.
func (u *update) judge(it *item, j *job) error {
	rec := j.record
	switch {
	case j.err != nil:
		it.bad = true
		return u.wrong(it.path, j.err)
	case it.path == "/" && !rec.isDir():
		it.bad = true
		return u.wrong(it.path, fmt.Errorf("%w: the root is no directory", ext4.ErrCorrupt))
	case it.said != 0 && it.said != rec.mode&unix.S_IFMT:
		if err := u.wrong(it.path, fmt.Errorf("%w: inode %d: its name says type %o, the inode %o", ext4.ErrCorrupt, j.number, it.said, rec.mode&unix.S_IFMT)); err != nil {
			return err
		}
	}
	if it.want&^baseline.Descend != 0 && !complete(it.want, rec.state) {
		u.problem(it.path, rec.err)
	}
	return nil
}

// parallel does work in pieces, each with a reader of its own goroutine.
func (u *update) parallel(n, piece int, do func(r *reader, from, to int) error) error {
	pieces := (n + piece - 1) / piece
	workers := min(u.run.o.Workers, pieces)
	errs := make([]error, max(workers, 1))
	var next atomic.Int64
	work := func(w int) {
		r := u.reader()
		defer u.run.readers.Put(r)
		for errs[w] == nil {
			i := int(next.Add(1)) - 1
			if i >= pieces {
				return
			}
			errs[w] = do(r, i*piece, min((i+1)*piece, n))
		}
	}
	var group sync.WaitGroup
	for w := 1; w < workers; w++ {
		group.Go(func() { work(w) })
	}
	if workers > 0 {
		work(0)
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return u.run.ctx.Err()
}

// chunk reads inodes, in their order, and what is wanted of them, in the order of their contents.
func (r *reader) chunk(jobs []job, near bool) error {
	inodes := make([]*ext4.Inode, len(jobs))
	order := make([]int, 0, len(jobs))
	wants := make([]baseline.Want, len(jobs))
	for i := range jobs {
		j := &jobs[i]
		if j.record = r.u.records[j.number]; j.record == nil {
			j.record, inodes[i], j.err = r.known(j.number, near)
		}
		if j.err == nil && !isFile(j.record) {
			j.err = cmp.Or(j.record.err, fmt.Errorf("%w: inode %d: mode %o and %d links: %w", ext4.ErrCorrupt, j.number, j.record.mode, j.record.links, errNoFile))
		}
		if j.err != nil {
			continue
		}
		for _, it := range j.items {
			if it.evaluate {
				it.want = r.u.ask(it.path, j.record.mode)
			}
			wants[i] |= it.want
		}
		order = append(order, i)
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(jobs[a].record.place(), jobs[b].record.place()) })
	for _, i := range order {
		j := &jobs[i]
		if err := r.fill(j.record, inodes[i], wants[i]); err != nil {
			return err
		}
	}
	return nil
}

// known is the record of an inode that is not among those that changed: the base's, or a new one.
func (r *reader) known(n uint32, near bool) (*record, *ext4.Inode, error) {
	if r.u.base != nil {
		if i, ok := r.u.base.find(n); ok {
			return r.u.base.record(i), nil, nil
		}
	}
	rec, in, err := r.load(n, near)
	if err != nil {
		return nil, nil, err
	}
	return rec, in, r.u.need(recordBytes + int64(len(rec.target)+extentSize*len(rec.extents)))
}

func isFile(r *record) bool {
	switch r.mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
		return r.links > 0
	}
	return false
}

// place is where the contents begin.
func (r *record) place() uint64 {
	for _, e := range r.extents {
		if e.kind == ext4.Data {
			return e.place
		}
	}
	return 0
}

// ask asks for what is wanted, as far as it means something.
func (u *update) ask(path string, mode uint32) baseline.Want {
	want := u.run.sel.Want(baseline.Name{Volume: u.name, Path: path}, mode) & wantKnown
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return want &^ baseline.Content
	case unix.S_IFREG:
		return want &^ baseline.Descend
	}
	return want &^ (baseline.Descend | baseline.Content)
}

// settle gives the directories among names that are new or elsewhere their places, and returns them, by their inodes.
func (u *update) settle(items []*item) (dirs []uint32, err error) {
	for _, it := range items {
		u.touch(it.path)
		if it.bad || it.want&baseline.Descend == 0 {
			continue
		}
		there, ok := u.places[it.inode]
		if !ok && u.base != nil && !u.floating[it.inode] {
			_, ok = u.base.dir(it.inode)
		}
		if ok {
			it.want &^= baseline.Descend
			other := "another name"
			if there != nil {
				other = there.path
			}
			if err := u.wrong(it.path, fmt.Errorf("%w: inode %d: a second name of a directory: it is %s", ext4.ErrCorrupt, it.inode, other)); err != nil {
				return nil, err
			}
			continue
		}
		u.places[it.inode], u.paths[it.inode] = it, it.path
		dirs = append(dirs, it.inode)
	}
	return dirs, nil
}

// list has lists of directories that have a place: as they were read, as the base has them, or read now.
func (u *update) list(dirs []uint32) error {
	var unread []uint32
	for _, d := range dirs {
		if _, ok := u.lists[d]; ok || u.listErrs[d] != nil {
			continue
		}
		if u.base != nil {
			if i, ok := u.base.dir(d); ok {
				u.lists[d] = u.base.items(i)
				continue
			}
		}
		unread = append(unread, d)
	}
	return u.readDirs(unread, true)
}

// items are the names in a directory of the base.
func (v *volume) items(d int) (all []*item) {
	for i := v.dirs[d].first; i < v.dirs[d].first+v.dirs[d].count; i++ {
		n := v.nameAt(int(i))
		in := v.inode(int(n.inode()))
		all = append(all, &item{dir: v.dirs[d].inode, inode: in.number(), letters: string(v.lettersOf(n)), said: in.mode() & unix.S_IFMT, want: n.want(), base: -1})
	}
	return all
}

// A listing is what a directory says.
type listing struct {
	items []*item
	errs  []error
}

// readDirs reads directories. What is wrong with one is noted: now, if it has its place, or as the error of its list.
func (u *update) readDirs(dirs []uint32, placed bool) error {
	all := make([]listing, len(dirs))
	err := u.parallel(len(dirs), 16, func(r *reader, from, to int) error {
		for i := from; i < to; i++ {
			all[i].items, all[i].errs = r.dir(dirs[i])
		}
		return u.run.ctx.Err()
	})
	if err != nil {
		return err
	}
	for i, d := range dirs {
		if !placed && len(all[i].errs) > 0 {
			u.listErrs[d] = all[i].errs[0]
			continue
		}
		for _, err := range all[i].errs {
			if err := u.wrong(u.paths[d], err); err != nil {
				return err
			}
		}
		u.lists[d] = all[i].items
	}
	return nil
}

const maxDirErrs = 16 // of a directory

// dir reads a directory's names, by their letters.
func (r *reader) dir(d uint32) (all []*item, errs []error) {
	in, err := r.u.fs.Inode(d)
	if err != nil {
		return nil, []error{err}
	}
	if blocks := in.Size / r.u.blockSize; !in.InlineData() && r.u.blocks.Add(-blocks) < 0 {
		return nil, []error{fmt.Errorf("%w: directories of more blocks than the file system", ErrEffort)}
	}
	for e, err := range in.ReadDir() {
		if err == nil {
			err = r.u.need(recordBytes/4 + int64(len(e.Name)))
		}
		if err != nil {
			if errs = append(errs, err); len(errs) == maxDirErrs {
				break
			}
			continue
		}
		all = append(all, &item{dir: d, inode: e.Inode, letters: e.Name, said: e.Type, base: -1})
	}
	slices.SortStableFunc(all, func(a, b *item) int { return strings.Compare(a.letters, b.letters) })
	return slices.CompactFunc(all, func(a, b *item) bool {
		if a.letters == b.letters && len(errs) < maxDirErrs {
			errs = append(errs, fmt.Errorf("%w: inode %d: name %.40q twice", ext4.ErrCorrupt, d, a.letters))
		}
		return a.letters == b.letters
	}), errs
}

// reader takes a reader that is free, or makes one.
func (u *update) reader() *reader {
	if r, ok := u.run.readers.Get().(*reader); ok && r != nil {
		r.u, r.inodes = u, nil
		if u.fs != nil {
			r.inodes = u.fs.InodeReader()
		}
		return r
	}
	return u.newReader()
}
