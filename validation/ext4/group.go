package ext4

import (
	"encoding/binary"
)

const (
	groupInodeUninit = 0x1 // no inode of it is used, and its bitmap was never written
	groupBlockUninit = 0x2
)

// A group is a block group's descriptor ("Block Group Descriptors").
type group struct {
	number                          uint32
	blockBitmap, inodeBitmap, table uint64 // blocks
	blockSum, inodeSum              uint32 // of the bitmaps
	wide                            bool   // the sums have 32 bits, not 16
	flags                           uint16
	unused                          uint32 // inodes at the table's end that never were used
	offset                          int64
}

// group reads a descriptor and verifies it.
func (f *FS) group(n uint32) (*group, error) {
	s := f.sb
	off := s.descriptorAt(n)
	block, err := f.block(uint64(off / s.blockSize))
	if err != nil {
		return nil, err
	}
	b := block[off%s.blockSize:][:s.descSize]
	if err := s.checkDescriptor(b, n, off); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	g := &group{
		number: n, offset: off, flags: le.Uint16(b[0x12:]), unused: uint32(le.Uint16(b[0x1c:])),
		blockBitmap: uint64(le.Uint32(b)), inodeBitmap: uint64(le.Uint32(b[4:])), table: uint64(le.Uint32(b[8:])),
		blockSum: uint32(le.Uint16(b[0x18:])), inodeSum: uint32(le.Uint16(b[0x1a:])),
	}
	if s.descSize >= 64 {
		g.wide = true
		g.blockBitmap |= uint64(le.Uint32(b[0x20:])) << 32
		g.inodeBitmap |= uint64(le.Uint32(b[0x24:])) << 32
		g.table |= uint64(le.Uint32(b[0x28:])) << 32
		g.unused |= uint32(le.Uint16(b[0x32:])) << 16
		g.blockSum |= uint32(le.Uint16(b[0x38:])) << 16
		g.inodeSum |= uint32(le.Uint16(b[0x3a:])) << 16
	}
	if s.ro&(roGroupSum|roMetadataSum) == 0 { // then nobody keeps these
		g.flags, g.unused = 0, 0
	}
	if !s.valid(g.table, s.tableBlocks()) || !s.valid(g.blockBitmap, 1) || !s.valid(g.inodeBitmap, 1) || g.unused > s.inodesPerGroup {
		return nil, at(off, ErrCorrupt, "group %d: bitmaps at blocks %d and %d, inodes at %d, %d of them unused", n, g.blockBitmap, g.inodeBitmap, g.table, g.unused)
	}
	return g, nil
}

func (s *super) tableBlocks() uint64 {
	return (uint64(s.inodesPerGroup)*uint64(s.inodeSize) + uint64(s.blockSize) - 1) / uint64(s.blockSize)
}

func (s *super) checkDescriptor(b []byte, n uint32, off int64) error {
	const sumAt = 0x1e
	var number [4]byte
	binary.LittleEndian.PutUint32(number[:], n)
	var sum uint16
	switch {
	case s.metadataSum():
		c := crc32c(crc32c(s.seed, number[:]), b[:sumAt])
		sum = uint16(crc32c(crc32c(c, zeros[:2]), b[sumAt+2:]))
	case s.ro&roGroupSum != 0:
		sum = crc16(crc16(crc16(^uint16(0), s.uuid[:]), number[:]), b[:sumAt])
		sum = crc16(sum, b[sumAt+2:])
	default:
		return nil
	}
	if sum != binary.LittleEndian.Uint16(b[sumAt:]) {
		return at(off, ErrChecksum, "group %d: descriptor", n)
	}
	return nil
}

// A bitmap says what is used: bit i of it, the lowest of a byte first.
type bitmap []byte

func (b bitmap) has(i uint32) bool { return b[i/8]&(1<<(i%8)) != 0 }

// inodeBitmap reads which of a group's inodes are used, and verifies it; nil: none.
func (f *FS) inodeBitmap(g *group) (bitmap, error) {
	if g.flags&groupInodeUninit != 0 {
		return nil, nil
	}
	return f.bitmap(g, "inode", g.inodeBitmap, g.inodeSum, f.sb.inodesPerGroup)
}

// blockBitmap reads which of a group's clusters are used, and verifies it; nil: it was never written.
func (f *FS) blockBitmap(g *group) (bitmap, error) {
	if g.flags&groupBlockUninit != 0 {
		return nil, nil
	}
	return f.bitmap(g, "block", g.blockBitmap, g.blockSum, f.sb.blocksPerGroup/f.sb.clusterRatio)
}

func (f *FS) bitmap(g *group, what string, block uint64, want, bits uint32) (bitmap, error) {
	b, err := f.block(block)
	if err != nil {
		return nil, err
	}
	if f.sb.metadataSum() {
		sum := crc32c(f.sb.seed, b[:bits/8])
		if !g.wide {
			sum &= 0xffff
		}
		if sum != want {
			return nil, at(f.sb.offset(block), ErrChecksum, "group %d: %s bitmap", g.number, what)
		}
	}
	return b, nil
}
