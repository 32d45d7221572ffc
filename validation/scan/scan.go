// Package scan reads the disks of a guest into an [Index]: what its files are, by name, and where they lie, so that the
// next scan reads only what a change may have reached.
//
// The disks may be a hostile guest's, and the last index anybody's. The readers below check every place; what a scan
// keeps and hashes is bounded by [Options]; a name that cannot be read is a [Problem], never left out silently. Whatever
// an incremental scan does not expect, damage above all, makes it read that volume in full, so that it has only the plain
// cases to get right.
//
// A scan is incremental by what ext4 says of places: the block of an inode, those of its attributes and its tree, and
// those of its contents. What may have changed is what the caller says, and what the journal holds now or held at the last
// scan. An inode in such a place is read again, and what follows from it: a directory's names if its blocks or its map
// changed, a file's contents if its size, its map or a block of them did. FAT volumes are small: they are read in full if
// any of their bytes may have changed.
package scan

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
	"redoubt.dev/redoubt/validation/partition"
	files "redoubt.dev/redoubt/validation/volume"
)

// A Selector says what is wanted of which file; baseline.Rules is one.
type Selector interface {
	// Want says what is to be read of a name whose file has the mode, as of stat(2). Of a directory [baseline.Descend]
	// alone is enough for what is in it to be asked for; without it nobody looks into it. The answer must depend on
	// nothing else, and may be asked for by several goroutines.
	Want(n baseline.Name, mode uint32) baseline.Want
}

// A Source is a disk, which must not change while it is read.
type Source struct {
	Disk    int // its number: volumes are "disk0" or "disk0p1"
	Reader  io.ReaderAt
	Size    int64    // bytes
	Changed *Changes // since the scan that made the last index; nil: all of it may have changed
}

// Options bound a scan. The zero value is right for most.
type Options struct {
	// MaxMemory bounds in bytes, about, what each volume's scan keeps; 0 is 1 GiB, enough for some two million files. A volume
	// with more is a problem.
	MaxMemory int64
	// MaxFile is how many bytes a file may have whose contents are hashed; 0: as many as its volume. Only sparse files
	// have more, and hashing takes as long for their holes.
	MaxFile int64
	// MaxBytes bounds in bytes what a scan hashes in all; 0 is twice the size of the disks and 1 GiB. Files beyond are problems.
	MaxBytes int64
	// Workers is how many goroutines read and hash; 0: as many as there are processors.
	Workers int
}

// ErrEffort says that something is bigger than [Options] allow.
var ErrEffort = errors.New("more than a scan may take")

// A Problem is a name that could not be read: its inode, its contents, its attributes or, of a directory, some of its names. That
// of a whole volume or disk has the path "/".
type Problem struct {
	Name baseline.Name
	Err  error
}

// Stats say what a scan did.
type Stats struct {
	Names   int   // in the index, of all volumes
	Inodes  int64 // that were read
	Files   int64 // whose contents were hashed
	Bytes   int64 // that were hashed, holes included
	Opening time.Duration
	Elapsed time.Duration
}

// A Result is what a scan found.
type Result struct {
	Index *Index
	// Full says that at least one volume was read from its beginning because there was nothing to build on, and Why.
	Full bool
	Why  string
	// Touched are the names, sorted, that were added or removed, or whose entry may differ from the last index's. Of a volume that
	// was read in full they are all, those it had last among them.
	Touched  []baseline.Name
	Problems []Problem // sorted by name
	Stats    Stats
}

// Run scans the sources. The rules identify what the selector answers: an index of others is of no use. With a last index, and for
// sources that say what changed since, the scan is incremental; its index has the same entries as that of a full one.
// An error is the caller's or the context's.
func Run(ctx context.Context, sources []Source, rules [32]byte, sel Selector, last *Index, o Options) (*Result, error) {
	start := time.Now()
	r := &run{ctx: ctx, sel: sel, last: last, o: o, rules: rules, result: &Result{}}
	if err := r.prepare(sources); err != nil {
		return nil, err
	}
	for i := range sources {
		if err := r.disk(&sources[i]); err != nil {
			return nil, err
		}
	}
	r.finish()
	r.result.Stats.Inodes, r.result.Stats.Files, r.result.Stats.Bytes = r.inodes.Load(), r.files.Load(), r.hashed.Load()
	r.result.Stats.Elapsed = time.Since(start)
	return r.result, nil
}

// A run is a scan in hand.
type run struct {
	ctx     context.Context
	sel     Selector
	rules   [32]byte
	last    *Index
	o       Options
	result  *Result
	why     []string
	volumes []found
	left    atomic.Int64 // bytes to hash

	readers sync.Pool // of those that a volume's scan left

	inodes, files, hashed atomic.Int64
}

// A found volume is one of the new index: to encode, or as it was.
type found struct {
	old *volume
	new *update
}

func (f *found) name() string {
	if f.new != nil {
		return f.new.name
	}
	return f.old.name
}

func (r *run) prepare(sources []Source) error {
	total, disks := int64(0), map[int]bool{}
	for _, s := range sources {
		if s.Disk < 0 || disks[s.Disk] || s.Size < 0 || s.Reader == nil {
			return fmt.Errorf("disk %d: twice, or of %d bytes", s.Disk, s.Size)
		}
		disks[s.Disk] = true
		if s.Changed != nil && s.Size > 0 {
			if err := s.Changed.check(s.Size); err != nil {
				return fmt.Errorf("disk %d: %w", s.Disk, err)
			}
		}
		total += s.Size
	}
	if r.o.MaxMemory <= 0 {
		r.o.MaxMemory = 1 << 30
	}
	if r.o.MaxBytes <= 0 {
		r.o.MaxBytes = 2*total + 1<<30
	}
	if r.o.Workers <= 0 {
		r.o.Workers = runtime.GOMAXPROCS(0)
	}
	r.left.Store(r.o.MaxBytes)
	return r.ctx.Err()
}

// disk scans one disk. What is wrong with it is a problem of it.
func (r *run) disk(s *Source) error {
	name := fmt.Sprintf("disk%d", s.Disk)
	table, err := partition.Read(s.Reader, s.Size, partition.Options{})
	if errors.Is(err, partition.ErrNone) {
		return nil
	}
	if err != nil {
		r.problem(name, "/", err)
		return nil
	}
	for i := range table.Partitions {
		p := &table.Partitions[i]
		v := volumeName(s, table, p)
		if len(r.volumes) == maxVolumes {
			r.problem(v, "/", fmt.Errorf("%w: more than %d volumes", ErrEffort, maxVolumes))
			return nil
		}
		if err := r.partition(s, p, v); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) partition(s *Source, p *partition.Partition, name string) error {
	switch p.Content {
	case partition.Swap, partition.Unknown:
		return nil
	case partition.Ext:
		return r.ext(s, p, name)
	case partition.FAT:
		return r.fat(s, p, name)
	}
	err := p.Content.Refusal()
	if err == nil {
		err = fmt.Errorf("%w: it is %s", partition.ErrRefused, p.Content)
	}
	r.problem(name, "/", err)
	return nil
}

func (r *run) problem(volume, path string, err error) {
	r.result.Problems = append(r.result.Problems, Problem{baseline.Name{Volume: volume, Path: path}, err})
}

// base is what the last index has of a volume, or why that is of no use.
func (r *run) base(s *Source, name string, k kind, offset, size int64) (v *volume, why string) {
	switch v = r.last.volume(name); {
	case r.last == nil:
		return nil, "there is no last index"
	case r.last.rules != r.rules:
		return nil, "the rules are others"
	case v == nil:
		return nil, "it is new"
	case s.Changed == nil:
		return nil, "all may have changed"
	case v.kind != k || v.offset != offset || v.size != size:
		return nil, "it is another, or lies elsewhere"
	}
	return v, ""
}

// full notes that a volume is read from its beginning.
func (r *run) full(name, why string) {
	r.result.Full = true
	r.why = append(r.why, name+": "+why)
}

func (r *run) ext(s *Source, p *partition.Partition, name string) error {
	opening := time.Now()
	fs, err := ext4.Open(io.NewSectionReader(s.Reader, p.Offset, p.Bytes), p.Bytes, ext4.Options{MaxMemory: r.o.MaxMemory})
	var layout *ext4.Layout
	if err == nil {
		layout, err = fs.Layout()
	}
	if err != nil {
		r.problem(name, "/", err)
		return nil
	}
	r.result.Stats.Opening += time.Since(opening)
	base, why := r.base(s, name, kindExt, p.Offset, p.Bytes)
	switch {
	case base == nil:
	case base.fingerprint != layout.Fingerprint:
		base, why = nil, "the file system's layout is another"
	case base.damaged:
		base, why = nil, "it was damaged"
	}
	u := r.newUpdate(name, kindExt, p)
	u.fs, u.layout, u.fingerprint = fs, layout, layout.Fingerprint
	u.setReplayed(fs.Replayed())
	if base != nil {
		u.base = base
		if err := u.incremental(s.Changed); err == nil {
			r.keep(u)
			return nil
		} else if r.ctx.Err() != nil {
			return err
		} else {
			why = err.Error()
		}
		fresh := r.newUpdate(name, kindExt, p)
		fresh.fs, fresh.layout, fresh.fingerprint = fs, layout, layout.Fingerprint
		fresh.setReplayed(fs.Replayed())
		u = fresh
	}
	r.full(name, why)
	u.full = true
	if err := u.whole(); err != nil {
		return err
	}
	r.keep(u)
	return nil
}

func (r *run) fat(s *Source, p *partition.Partition, name string) error {
	base, why := r.base(s, name, kindFAT, p.Offset, p.Bytes)
	if base != nil && !base.damaged {
		c := newChanged(s.Changed, p.Offset, func(func(ext4.Range) bool) {})
		if !c.any(ext4.Range{Offset: 0, Length: p.Bytes}) {
			r.volumes = append(r.volumes, found{old: base})
			return nil
		}
	}
	if base == nil {
		r.full(name, why)
	}
	v, err := files.OpenPartition(s.Reader, p, files.Options{MaxMemory: r.o.MaxMemory})
	if err != nil {
		r.problem(name, "/", err)
		return nil
	}
	u := r.newUpdate(name, kindFAT, p)
	u.full = base == nil
	if err := u.walk(v); err != nil {
		return err
	}
	r.keep(u)
	return nil
}

// keep takes a volume's part of the result.
func (r *run) keep(u *update) {
	for _, path := range u.touched {
		r.result.Touched = append(r.result.Touched, baseline.Name{Volume: u.name, Path: path})
	}
	r.result.Problems = append(r.result.Problems, u.problems...)
	if u.unchanged() {
		r.volumes = append(r.volumes, found{old: u.base})
		return
	}
	r.volumes = append(r.volumes, found{new: u})
}

// finish encodes the index, and says what became of volumes that are no more.
func (r *run) finish() {
	slices.SortFunc(r.volumes, func(a, b found) int { return cmp.Compare(a.name(), b.name()) })
	x := &Index{rules: r.rules}
	size := headerSize
	for _, f := range r.volumes {
		if f.new != nil {
			size += f.new.estimate()
		} else {
			size += len(f.old.encoded)
		}
	}
	b := append(make([]byte, 0, size), magic...)
	b = append(b, r.rules[:]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.volumes)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	var starts []int
	for _, f := range r.volumes {
		starts = append(starts, len(b))
		if f.new != nil {
			b = f.new.encode(b)
		} else {
			b = append(b, f.old.encoded...)
		}
	}
	x.b = b
	for _, start := range starts {
		v, err := sectionsOf(b[start:])
		if err != nil {
			panic("what was just encoded is no volume: " + err.Error())
		}
		x.volumes = append(x.volumes, v)
		r.result.Stats.Names += v.nameCount()
	}
	r.result.Index, r.result.Why = x, strings.Join(r.why, "; ")
	r.compare(x)
	slices.SortFunc(r.result.Touched, baseline.Name.Compare)
	r.result.Touched = slices.Compact(r.result.Touched)
	slices.SortStableFunc(r.result.Problems, func(a, b Problem) int { return a.Name.Compare(b.Name) })
}

// compare finds what is touched of the volumes that were read from their beginning, and of those that are no more.
func (r *run) compare(x *Index) {
	touch := func(v *volume, path []byte) {
		r.result.Touched = append(r.result.Touched, baseline.Name{Volume: v.name, Path: string(path)})
	}
	for i, f := range r.volumes {
		if f.new == nil || f.new.base != nil {
			continue
		}
		v, old := x.volumes[i], r.last.volume(x.volumes[i].name)
		v.each(func(path []byte, i int) bool {
			if e, ok := v.entry(i); old == nil || f.new.full || !old.same(string(path), &e, ok) {
				touch(v, path)
			}
			return true
		})
		if old != nil {
			old.each(func(path []byte, _ int) bool {
				if _, ok := v.lookup(string(path)); !ok {
					touch(old, path)
				}
				return true
			})
		}
	}
	if r.last == nil {
		return
	}
	for _, old := range r.last.volumes {
		if x.volume(old.name) == nil {
			old.each(func(path []byte, _ int) bool {
				touch(old, path)
				return true
			})
		}
	}
}

// same reports whether the volume has the entry, if ok, or none.
func (v *volume) same(path string, e *baseline.Entry, ok bool) bool {
	i, has := v.lookup(path)
	if !has {
		return false
	}
	mine, has := v.entry(i)
	return has == ok && sameEntry(&mine, e)
}
