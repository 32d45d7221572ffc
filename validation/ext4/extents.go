package ext4

import (
	"encoding/binary"
	"iter"
	"slices"

	"golang.org/x/sys/unix"
)

// An Extent is a stretch of a file, or of the device, that matters to it.
type Extent struct {
	Kind    Kind
	Logical int64 // in the file, in bytes; -1 for metadata
	Range         // on the device; a hole's offset is -1
}

// Extents yields where a file is: first its metadata outside of the contents' tree (the inode itself, by its block, its
// extended attributes), then its contents in their order, in whole blocks and as far as its size goes, each node of the
// tree before what it leads to. If none of these places changed, neither did the file. An error ends it.
//
// Contents that are in the inode (inline data, short symbolic links) have no extent of their own.
func (i *Inode) Extents() iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		metadata, err := i.outside()
		if err != nil {
			yield(Extent{}, err)
			return
		}
		for _, r := range metadata {
			if !yield(Extent{Metadata, -1, r}, nil) {
				return
			}
		}
		if i.mapped() {
			i.contents(i.mapEnd(), yield)
		}
	}
}

// mapped reports whether the inode's field leads to blocks.
func (i *Inode) mapped() bool {
	switch i.Type() {
	case unix.S_IFREG, unix.S_IFDIR:
		return i.Flags&flagInline == 0
	case unix.S_IFLNK:
		return i.Flags&flagInline == 0 && !i.fastLink()
	}
	return false
}

// outside is the metadata that the tree does not lead to.
func (i *Inode) outside() ([]Range, error) {
	bs := i.fs.sb.blockSize
	all := []Range{{i.offset / bs * bs, bs}}
	if i.acl != 0 {
		all = append(all, Range{i.fs.sb.offset(i.acl), bs})
	}
	values, err := i.eaInodes()
	if err != nil {
		return nil, err
	}
	for _, n := range values {
		v, err := i.fs.Inode(n)
		if err != nil {
			return nil, err
		}
		for e, err := range v.plainExtents() {
			if err != nil {
				return nil, err
			}
			if e.Kind != Hole {
				all = append(all, e.Range)
			}
		}
	}
	return all, nil
}

// plainExtents are those of an inode that has no extended attributes: it holds the value of one.
func (i *Inode) plainExtents() iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		bs := i.fs.sb.blockSize
		if yield(Extent{Metadata, -1, Range{i.offset / bs * bs, bs}}, nil) && i.mapped() {
			i.contents(i.mapEnd(), yield)
		}
	}
}

// contents yields the tree's nodes and what they lead to, up to block end of the file. No file has more blocks than its file system, nor more nodes:
// that ends the maps that lead to the same block over and over.
func (i *Inode) contents(end uint64, yield func(Extent, error) bool) {
	bs := uint64(i.fs.sb.blockSize)
	m := mapping{in: i}
	var nodes []uint64
	blocks := uint64(0)
	for n := uint64(0); n < end; {
		r, err := m.at(n)
		if err == nil && (blocks > i.fs.sb.blocks || m.loads > i.fs.sb.blocks) {
			err = at(i.offset, ErrEffort, "inode %d: it has more blocks than the file system", i.Number)
		}
		if err != nil {
			yield(Extent{}, err)
			return
		}
		for level, b := range m.nodes {
			if level < len(nodes) && nodes[level] == b {
				continue
			}
			if !yield(Extent{Metadata, -1, Range{i.fs.sb.offset(b), int64(bs)}}, nil) {
				return
			}
		}
		nodes = append(nodes[:0], m.nodes...)
		r.count = min(r.count, end-n)
		e := Extent{r.kind, int64(n * bs), Range{-1, int64(r.count * bs)}}
		if r.kind != Hole {
			e.Offset = i.fs.sb.offset(r.physical)
			blocks += r.count
		}
		if !yield(e, nil) {
			return
		}
		n += r.count
	}
}

// mapEnd is how many blocks of a file there are to look at: those of its size.
func (i *Inode) mapEnd() uint64 {
	return uint64((i.Size + i.fs.sb.blockSize - 1) / i.fs.sb.blockSize)
}

// firstBlock is about where the contents begin, told from the inode alone: for reading in the device's order.
func (i *Inode) firstBlock() uint64 {
	if !i.mapped() {
		return 0
	}
	le, b := binary.LittleEndian, i.blockField()
	if i.Flags&flagExtents == 0 {
		return uint64(le.Uint32(b))
	}
	if le.Uint16(b[6:]) == 0 { // a leaf: its first extent
		return uint64(le.Uint32(b[extentUnit+8:])) | uint64(le.Uint16(b[extentUnit+6:]))<<32
	}
	return uint64(le.Uint32(b[extentUnit+4:])) | uint64(le.Uint16(b[extentUnit+8:]))<<32
}

// byPlace sorts inodes by where their contents begin.
func byPlace[T any](all []T, inode func(T) *Inode) {
	slices.SortStableFunc(all, func(a, b T) int {
		return int(int64(inode(a).firstBlock()) - int64(inode(b).firstBlock()))
	})
}
