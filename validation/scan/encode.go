package scan

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"
	"sort"

	"redoubt.dev/redoubt/validation/baseline"
)

// unchanged reports whether the base is the result.
func (u *update) unchanged() bool {
	return u.base != nil && len(u.records) == 0 && len(u.lists) == 0 && len(u.wants) == 0 && len(u.floating) == 0 && bytes.Equal(u.replayed, u.base.replayed)
}

// estimate is about how long the encoded form will be.
func (u *update) estimate() int {
	n := volumeHeader + len(u.replayed)
	if u.base != nil {
		n += len(u.base.encoded)
	}
	for _, r := range u.records {
		n += inodeSize + extentSize*len(r.extents) + len(r.target) + 8
		for _, x := range r.xattrs {
			n += len(x.Name) + len(x.Value) + 8
		}
	}
	for _, list := range u.lists {
		for _, it := range list {
			n += nameSize + len(it.letters)
		}
	}
	return n
}

// An encoder makes a volume's sections of its base's, by copying runs of records that are as they were, and of what is new. What is
// new of the sections without records is put at their end; once that is a third of all, all is laid out anew.
type encoder struct {
	*update
	base    *volume // never nil
	compact bool
	used    []bool            // the base's inodes; nil: all
	moved   []uint32          // the indices that they have now; nil: the same
	indices map[uint32]uint32 // of inodes that are new, by number

	letters, extents, rest []byte            // what is new
	blobs                  map[string]uint32 // where something is in rest
}

func (u *update) encode(b []byte) []byte {
	e := &encoder{update: u, base: u.base, indices: map[uint32]uint32{}, blobs: map[string]uint32{}}
	if e.base == nil {
		e.base = &volume{}
	}
	tail := len(e.base.letters) + len(e.base.extents) + len(e.base.rest)
	e.compact = int(e.base.waste) > 1<<20+tail/3
	start := len(b)
	b = append(b, make([]byte, volumeHeader)...)
	if len(u.lists) > 0 || len(u.floating) > 0 {
		e.mark()
	}
	counts := [6]uint32{}
	b = e.section(b, &counts[0], inodeSize, e.putInodes)
	b = e.section(b, &counts[1], nameSize, e.putNames)
	waste := uint32(len(e.letters) + len(e.extents) + len(e.rest))
	if e.compact || u.base == nil {
		e.base, waste = &volume{}, 0
	} else {
		waste += u.base.waste
	}
	b = e.section(b, &counts[2], 1, func(b []byte) []byte { return append(append(b, e.base.letters...), e.letters...) })
	b = e.section(b, &counts[3], extentSize, func(b []byte) []byte { return append(append(b, e.base.extents...), e.extents...) })
	b = e.section(b, &counts[4], 1, func(b []byte) []byte { return append(append(b, e.base.rest...), e.rest...) })
	b = e.section(b, &counts[5], rangeSize, func(b []byte) []byte { return append(b, u.replayed...) })
	h, le := b[start:], binary.LittleEndian
	h[0] = byte(copy(h[1:32], u.name))
	h[32] = byte(u.kind)
	if u.damaged {
		h[33] = 1
	}
	le.PutUint64(h[40:], uint64(u.offset))
	le.PutUint64(h[48:], uint64(u.size))
	copy(h[56:88], u.fingerprint[:])
	for i, n := range counts {
		le.PutUint32(h[88+4*i:], n)
	}
	le.PutUint32(h[112:], waste)
	return b
}

func (e *encoder) section(b []byte, count *uint32, unit int, put func([]byte) []byte) []byte {
	start := len(b)
	b = put(b)
	*count = uint32((len(b) - start) / unit)
	return b
}

// alive reports whether a directory of the lists is part of the result.
func (e *encoder) alive(d uint32) bool {
	if d == 0 || e.places[d] != nil {
		return true
	}
	_, ok := e.base.dir(d)
	return ok && !e.floating[d]
}

// mark finds the base's inodes that still have a name, and the new ones.
func (e *encoder) mark() {
	e.used = make([]bool, e.base.inodeCount())
	e.runs(func(from, to int) {
		for i := from; i < to; i++ {
			e.used[e.base.nameAt(i).inode()] = true
		}
	}, func(d uint32) {
		for _, it := range e.lists[d] {
			if it.bad {
				continue
			}
			if i, ok := e.base.find(it.inode); ok {
				e.used[i] = true
			} else {
				e.indices[it.inode] = 0
			}
		}
	})
}

// runs goes through the names: runs of the base's, and directories that have a list instead.
func (e *encoder) runs(run func(from, to int), list func(d uint32)) {
	special := slices.Collect(maps.Keys(e.lists))
	special = slices.AppendSeq(special, maps.Keys(e.floating))
	slices.Sort(special)
	next := 0
	for _, d := range slices.Compact(special) {
		from, to := e.base.first(d), e.base.nameCount()
		if d != ^uint32(0) {
			to = e.base.first(d + 1)
		}
		run(next, from)
		next = to
		if _, ok := e.lists[d]; ok && e.alive(d) {
			list(d)
		}
	}
	run(next, e.base.nameCount())
}

// first is the first name in a directory, or in one after it.
func (v *volume) first(dir uint32) int {
	return sort.Search(v.nameCount(), func(i int) bool { return v.nameAt(i).dir() >= dir })
}

func (e *encoder) putInodes(b []byte) []byte {
	if e.used == nil && !e.compact {
		start := len(b)
		b = append(b, e.base.inodes...)
		for n, rec := range e.records {
			if i, ok := e.base.find(n); ok {
				copy(b[start+i*inodeSize:], e.putInode(nil, rec, i))
			}
		}
		return b
	}
	changed := make([]*record, e.base.inodeCount())
	for n, rec := range e.records {
		if i, ok := e.base.find(n); ok {
			changed[i] = rec
		}
	}
	fresh := slices.Sorted(maps.Keys(e.indices))
	e.moved = make([]uint32, e.base.inodeCount())
	next := uint32(0)
	insert := func(below uint64) {
		for len(fresh) > 0 && uint64(fresh[0]) < below {
			e.indices[fresh[0]] = next
			b = e.putInode(b, e.records[fresh[0]], -1)
			next++
			fresh = fresh[1:]
		}
	}
	for i := range e.base.inodeCount() {
		in := e.base.inode(i)
		insert(uint64(in.number()))
		if e.used != nil && !e.used[i] {
			continue
		}
		rec := changed[i]
		if rec == nil && e.compact {
			rec = e.base.record(i)
		}
		if rec != nil {
			b = e.putInode(b, rec, i)
		} else {
			b = append(b, in...)
		}
		e.moved[i] = next
		next++
	}
	insert(1 << 32)
	return b
}

// putInode puts a record; i is its index in the base, whose extents and rest it keeps if they are the same.
func (e *encoder) putInode(b []byte, r *record, i int) []byte {
	var extents, rest, restLength uint32
	blob := appendRest(nil, r.target, r.xattrs)
	keptExtents, keptRest := len(r.extents) == 0, len(blob) == 0
	restLength = uint32(len(blob))
	if i >= 0 && !e.compact {
		in := e.base.inode(i)
		if first, count := in.extents(); !keptExtents && int(count) == len(r.extents) && e.base.hasExtents(first, r.extents) {
			extents, keptExtents = first, true
		}
		if off, length := in.rest(); !keptRest && bytes.Equal(e.base.rest[off:][:length], blob) {
			rest, keptRest = off, true
		}
	}
	offset := func(section []byte, added int) uint32 {
		if e.compact {
			return uint32(added)
		}
		return uint32(len(section) + added)
	}
	if !keptExtents {
		extents = offset(e.base.extents, len(e.extents)) / extentSize
		for _, x := range r.extents {
			e.extents = appendExtent(e.extents, x)
		}
	}
	if at, ok := e.blobs[string(blob)]; !keptRest && ok {
		rest = at
	} else if !keptRest {
		rest = offset(e.base.rest, len(e.rest))
		e.rest = append(e.rest, blob...)
		if len(blob) <= maxShared { // labels, which many have
			e.blobs[string(blob)] = rest
		}
	}
	return appendInode(b, r, extents, rest, restLength)
}

func (v *volume) hasExtents(first uint32, all []extent) bool {
	for k, x := range all {
		if v.extent(first+uint32(k)) != x {
			return false
		}
	}
	return true
}

func (e *encoder) putNames(b []byte) []byte {
	e.runs(func(from, to int) {
		if e.moved == nil && !e.compact && len(e.wants) == 0 {
			b = append(b, e.base.names[from*nameSize:to*nameSize]...)
			return
		}
		for i := from; i < to; i++ {
			n := e.base.nameAt(i)
			want, ok := e.wants[i]
			if !ok {
				want = n.want()
			}
			index := n.inode()
			if e.moved != nil {
				index = e.moved[index]
			}
			b = e.putName(b, n.dir(), index, want, i, "")
		}
	}, func(d uint32) {
		for _, it := range e.lists[d] {
			if it.bad {
				continue
			}
			index, ok := e.indices[it.inode]
			if !ok {
				i, _ := e.base.find(it.inode)
				index = e.moved[i]
			}
			b = e.putName(b, d, index, it.want, it.base, it.letters)
		}
	})
	return b
}

// putName puts a name; i is its place in the base, whose letters it keeps.
func (e *encoder) putName(b []byte, dir, index uint32, want baseline.Want, i int, letters string) []byte {
	if i >= 0 && !e.compact {
		n := e.base.nameAt(i)
		return appendName(b, dir, index, n.place(), n[12], want)
	}
	place := uint32(len(e.letters))
	if !e.compact {
		place += uint32(len(e.base.letters))
	}
	if i >= 0 {
		letters = string(e.base.lettersOf(e.base.nameAt(i)))
	}
	e.letters = append(e.letters, letters...)
	return appendName(b, dir, index, place, byte(len(letters)), want)
}

func appendName(b []byte, dir, index, place uint32, length byte, want baseline.Want) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(le.AppendUint32(le.AppendUint32(b, dir), index), place)
	return append(b, length, byte(want), 0, 0)
}
