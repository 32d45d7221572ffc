package ext4

import (
	"encoding/binary"
	"slices"
)

// Kind is what a stretch of a file, or of the device, holds.
type Kind uint8

// Kinds.
const (
	Hole      Kind = iota // no block: it reads as zeros
	Data                  // contents
	Unwritten             // blocks are reserved, but read as zeros
	Metadata              // what leads to the contents, or says something else of the file
)

// String is the kind's name.
func (k Kind) String() string {
	return [...]string{"hole", "data", "unwritten", "metadata"}[k&3]
}

// A run is blocks of a file that follow each other on the device too, or are not there at all.
type run struct {
	logical, count uint64
	physical       uint64
	kind           Kind
}

// maxLogical is the number of blocks that a file can have.
const maxLogical = 1 << 32

// A mapping tells where a file's blocks are. It holds what one leaf of the extent tree, or one block of the block
// map, says, so that whoever goes through a file reads each of them once, and never more than one at a time.
type mapping struct {
	in       *Inode
	runs     []run    // in order, without gaps, holes too
	from, to uint64   // the logical blocks they are
	nodes    []uint64 // blocks that lead to them, from the inode on
	loads    uint64   // how many such blocks were read
}

// at is the run that begins with a file's block n: as far as what is in hand says.
func (m *mapping) at(n uint64) (run, error) {
	if n < m.from || n >= m.to {
		if err := m.load(n); err != nil {
			return run{}, err
		}
	}
	i, ok := slices.BinarySearchFunc(m.runs, n, func(r run, n uint64) int { return int(int64(r.logical) - int64(n)) })
	if !ok {
		i--
	}
	r := m.runs[i]
	skip := n - r.logical
	r.logical, r.count = n, r.count-skip
	if r.kind != Hole {
		r.physical += skip
	}
	return r, nil
}

func (m *mapping) load(n uint64) error {
	m.runs, m.nodes, m.from, m.to = m.runs[:0], m.nodes[:0], 0, 0
	if n >= maxLogical {
		return at(m.in.offset, ErrCorrupt, "inode %d: block %d of it", m.in.Number, n)
	}
	if m.in.Flags&flagExtents != 0 {
		return m.loadExtents(n)
	}
	return m.loadMap(n)
}

// fill sets the runs for a range from those in it that are no holes.
func (m *mapping) fill(from, to uint64) {
	some := m.runs
	m.runs = make([]run, 0, 2*len(some)+1)
	next := from
	for _, r := range some {
		if r.logical > next {
			m.runs = append(m.runs, run{logical: next, count: r.logical - next})
		}
		m.runs = append(m.runs, r)
		next = r.logical + r.count
	}
	if next < to {
		m.runs = append(m.runs, run{logical: next, count: to - next})
	}
	m.from, m.to = from, to
}

// node reads a block of the way to the contents.
func (m *mapping) node(block uint64, what string) ([]byte, error) {
	f := m.in.fs
	if !f.sb.valid(block, 1) {
		return nil, at(m.in.offset, ErrCorrupt, "inode %d: %s at block %d of %d", m.in.Number, what, block, f.sb.blocks)
	}
	m.nodes = append(m.nodes, block)
	m.loads++
	return f.block(block)
}

// Extent trees: "Block and Inode Allocation Policy", "Extent Tree".
const (
	extentMagic    = 0xf30a
	extentMaxDepth = 5
	extentUnit     = 12 // bytes of a header, and of an entry
	extentWritten  = 1 << 15
)

// loadExtents follows the extent tree to the leaf for block n. Each node must keep to the range that the one above
// gave it, so that no tree can lead to the same block twice, nor around.
func (m *mapping) loadExtents(n uint64) error {
	node, off := m.in.blockField(), m.in.offset+blockFieldAt
	from, to := uint64(0), uint64(maxLogical)
	for depth := -1; ; depth-- {
		entries, got, err := m.extentNode(node, off, depth)
		if err != nil {
			return err
		}
		if depth = got; depth == 0 {
			return m.leaf(entries, off, from, to)
		}
		var child uint64
		if child, from, to, err = m.descend(entries, off, n, from, to); err != nil {
			return err
		}
		if child == 0 { // before the first of them
			m.fill(from, to)
			return nil
		}
		if node, err = m.node(child, "extent block"); err != nil {
			return err
		}
		off = m.in.fs.sb.offset(child)
	}
}

// extentNode checks a node's header and checksum and returns its entries; a depth of -1 is the root, of any depth.
func (m *mapping) extentNode(b []byte, off int64, depth int) (entries []byte, got int, err error) {
	le := binary.LittleEndian
	count, most, got := int(le.Uint16(b[2:])), int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	switch {
	case le.Uint16(b) != extentMagic:
		return nil, 0, at(off, ErrCorrupt, "inode %d: extent node without its magic", m.in.Number)
	case count > most || most > (len(b)-extentUnit)/extentUnit || got > extentMaxDepth || depth >= 0 && got != depth || got > 0 && count == 0:
		return nil, 0, at(off, ErrCorrupt, "inode %d: extent node of depth %d with %d entries of %d", m.in.Number, got, count, most)
	}
	if depth >= 0 && m.in.fs.sb.metadataSum() {
		tail := extentUnit * (1 + most)
		if tail+4 > len(b) || crc32c(m.in.seed, b[:tail]) != le.Uint32(b[tail:]) {
			return nil, 0, at(off, ErrChecksum, "inode %d: extent block", m.in.Number)
		}
	}
	return b[extentUnit:][:count*extentUnit], got, nil
}

// descend picks the entry of an index node for block n, and the range it is for; child 0: there is none.
func (m *mapping) descend(entries []byte, off int64, n, from, to uint64) (child, start, end uint64, err error) {
	le := binary.LittleEndian
	start, end = from, to
	last := int64(-1)
	for e := entries; len(e) > 0; e = e[extentUnit:] {
		first := uint64(le.Uint32(e))
		if int64(first) <= last || first < from || first >= to {
			return 0, 0, 0, at(off, ErrCorrupt, "inode %d: extent index for block %d after %d, of %d to %d", m.in.Number, first, last, from, to)
		}
		last = int64(first)
		if first > n {
			end = min(end, first)
			continue
		}
		start = first
		if child = uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32; child == 0 {
			return 0, 0, 0, at(off, ErrCorrupt, "inode %d: extent index without a block", m.in.Number)
		}
	}
	return child, start, end, nil
}

func (m *mapping) leaf(entries []byte, off int64, from, to uint64) error {
	le := binary.LittleEndian
	next := from
	for e := entries; len(e) > 0; e = e[extentUnit:] {
		r := run{
			logical: uint64(le.Uint32(e)), count: uint64(le.Uint16(e[4:])), kind: Data,
			physical: uint64(le.Uint32(e[8:])) | uint64(le.Uint16(e[6:]))<<32,
		}
		if r.count > extentWritten {
			r.count, r.kind = r.count-extentWritten, Unwritten
		}
		if r.count == 0 || r.logical < next || r.logical+r.count > to || !m.in.fs.sb.valid(r.physical, r.count) {
			return at(off, ErrCorrupt, "inode %d: extent of %d blocks at %d for its block %d, of %d to %d", m.in.Number, r.count, r.physical, r.logical, next, to)
		}
		m.runs = append(m.runs, r)
		next = r.logical + r.count
	}
	m.fill(from, to)
	return nil
}

// Block maps: "Direct/Indirect Block Addressing".
const directBlocks = 12

// loadMap follows the block map to the leaf for block n.
func (m *mapping) loadMap(n uint64) error {
	pointers := uint64(m.in.fs.sb.blockSize / 4)
	field := m.in.blockField()
	if n < directBlocks {
		return m.pointers(field[:4*directBlocks], m.in.offset+blockFieldAt, 0)
	}
	start, span := uint64(directBlocks), pointers // of what the inode's next pointer leads to
	for level := range 3 {
		if n < start+span {
			return m.indirect(field[4*(directBlocks+level):][:4], n, start, span)
		}
		start, span = start+span, span*pointers
	}
	return at(m.in.offset, ErrCorrupt, "inode %d: block %d, more than its map can hold", m.in.Number, n)
}

// indirect follows pointers, each for span blocks, the first of them at start, to the one for block n.
func (m *mapping) indirect(b []byte, n, start, span uint64) error {
	pointers := uint64(m.in.fs.sb.blockSize / 4)
	for {
		i := (n - start) / span
		count := uint64(len(b) / 4)
		block := uint64(binary.LittleEndian.Uint32(b[4*i:]))
		if block == 0 {
			end := i + 1
			for end < count && binary.LittleEndian.Uint32(b[4*end:]) == 0 {
				end++
			}
			m.fill(start+i*span, start+end*span)
			return nil
		}
		var err error
		if b, err = m.node(block, "indirect block"); err != nil {
			return err
		}
		start, span = start+i*span, span/pointers
		if span == 1 {
			return m.pointers(b, m.in.fs.sb.offset(block), start)
		}
	}
}

// pointers makes runs of pointers to contents, the first of them to block start.
func (m *mapping) pointers(b []byte, off int64, start uint64) error {
	for i := range uint64(len(b) / 4) {
		block := uint64(binary.LittleEndian.Uint32(b[4*i:]))
		if block == 0 {
			continue
		}
		if !m.in.fs.sb.valid(block, 1) {
			return at(off+int64(4*i), ErrCorrupt, "inode %d: block %d of it at %d, of %d", m.in.Number, start+i, block, m.in.fs.sb.blocks)
		}
		if last := len(m.runs) - 1; last >= 0 && m.runs[last].logical+m.runs[last].count == start+i && m.runs[last].physical+m.runs[last].count == block {
			m.runs[last].count++
		} else {
			m.runs = append(m.runs, run{logical: start + i, count: 1, physical: block, kind: Data})
		}
	}
	m.fill(start, start+uint64(len(b)/4))
	return nil
}
