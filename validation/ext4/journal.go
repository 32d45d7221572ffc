package ext4

import (
	"encoding/binary"
	"fmt"
)

// The journal ("Journal (jbd2)"); all of it is big-endian.
const (
	journalMagic = 0xc03b3998

	blockDescriptor = 1
	blockCommit     = 2
	blockSuperV1    = 3
	blockSuperV2    = 4
	blockRevoke     = 5

	journalCompatSum  = 0x1
	journalRevoke     = 0x1
	journal64Bit      = 0x2
	journalAsync      = 0x4
	journalSumV2      = 0x8
	journalSumV3      = 0x10
	journalFastCommit = 0x20
	journalKnown      = 0x3f

	tagEscaped  = 1
	tagSameUUID = 2
	tagLast     = 8

	journalHeader      = 12
	leastJournal       = 1024 // blocks that remain before fast commits' (JBD2_MIN_JOURNAL_BLOCKS)
	defaultFastCommits = 256
	fastCommitHead     = 9
)

// A journal is an inode's blocks in the circle [first, last) of which transactions lie.
type journal struct {
	fs               *FS
	in               *Inode
	mapping          mapping
	first, last, end uint64 // end is all blocks', with fast commits'
	start            uint64 // the oldest transaction
	sequence         uint32 // its number
	compat, incompat uint32
	seed             uint32
}

func (j *journal) has(feature uint32) bool { return j.incompat&feature != 0 }
func (j *journal) sums() bool              { return j.has(journalSumV2 | journalSumV3) }

// place is where a block of the journal is on the device.
func (j *journal) place(n uint64) (uint64, error) {
	r, err := j.mapping.at(n)
	if err != nil {
		return 0, fmt.Errorf("journal: %w", err)
	}
	if r.kind != Data {
		return 0, at(j.in.offset, ErrCorrupt, "journal: no block for its block %d", n)
	}
	return r.physical, nil
}

// read reads a block of the journal and says where it is, in bytes.
func (j *journal) read(b []byte, n uint64) (off int64, err error) {
	place, err := j.place(n)
	if err != nil {
		return 0, err
	}
	off = j.fs.sb.offset(place)
	return off, j.fs.readDevice(b, off)
}

// next is the block n further on the circle.
func (j *journal) next(block, n uint64) uint64 {
	return j.first + (block-j.first+n)%(j.last-j.first)
}

// openJournal reads the journal's superblock ("Journal (jbd2)": "Super Block").
func (f *FS) openJournal() (*journal, error) {
	s := f.sb
	switch {
	case s.compat&compatHasJournal == 0:
		return nil, at(superOffset+0x60, ErrCorrupt, "superblock: it needs its journal, and has none")
	case s.journalInode == 0 || s.journalDev != 0:
		return nil, at(superOffset+0xe4, ErrUnsupported, "superblock: it needs its external journal: mount it, or run e2fsck on it, where that is")
	}
	in, err := f.Inode(s.journalInode)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	if !in.mapped() || in.IsDir() || in.Size < 2*s.blockSize {
		return nil, at(in.offset, ErrCorrupt, "journal: inode %d of mode %o with %d bytes", in.Number, in.Mode, in.Size)
	}
	j := &journal{fs: f, in: in, mapping: mapping{in: in}}
	b := make([]byte, s.blockSize)
	off, err := j.read(b, 0)
	if err != nil {
		return nil, err
	}
	return j, j.parseSuper(b[:1024], off)
}

func (j *journal) parseSuper(b []byte, off int64) error {
	be := binary.BigEndian
	kind := be.Uint32(b[4:])
	if be.Uint32(b) != journalMagic || kind != blockSuperV1 && kind != blockSuperV2 {
		return at(off, ErrCorrupt, "journal: superblock without its magic")
	}
	if kind == blockSuperV2 {
		j.compat, j.incompat = be.Uint32(b[0x24:]), be.Uint32(b[0x28:])
	}
	if unknown := j.incompat &^ journalKnown; unknown != 0 {
		return at(off+0x28, ErrUnsupported, "journal: incompatible features %#x", unknown)
	}
	if err := j.checkSums(b, off); err != nil {
		return err
	}
	if size := be.Uint32(b[0xc:]); int64(size) != j.fs.sb.blockSize {
		return at(off+0xc, ErrCorrupt, "journal: blocks of %d bytes", size)
	}
	j.end, j.first = uint64(be.Uint32(b[0x10:])), uint64(be.Uint32(b[0x14:]))
	j.sequence, j.start = be.Uint32(b[0x18:]), uint64(be.Uint32(b[0x1c:]))
	j.last = j.end
	if j.has(journalFastCommit) {
		fast := uint64(be.Uint32(b[0x54:]))
		if fast == 0 {
			fast = defaultFastCommits
		}
		if j.end >= fast+leastJournal {
			j.last = j.end - fast
		}
	}
	if j.end > uint64(j.in.Size/j.fs.sb.blockSize) || j.first == 0 || j.first >= j.last || j.start != 0 && (j.start < j.first || j.start >= j.last) {
		return at(off+0x10, ErrCorrupt, "journal: %d blocks, transactions from %d to %d, the first at %d", j.end, j.first, j.last, j.start)
	}
	return nil
}

func (j *journal) checkSums(b []byte, off int64) error {
	be := binary.BigEndian
	if j.has(journalSumV2) && j.has(journalSumV3) || j.sums() && j.compat&journalCompatSum != 0 {
		return at(off+0x24, ErrCorrupt, "journal: checksums of several versions")
	}
	if !j.sums() {
		return nil
	}
	if b[0x50] != 4 {
		return at(off+0x50, ErrUnsupported, "journal: checksums of type %d, not crc32c", b[0x50])
	}
	if crc32c(crc32c(crc32c(^uint32(0), b[:0xfc]), zeros[:]), b[0x100:1024]) != be.Uint32(b[0xfc:]) {
		return at(off, ErrChecksum, "journal: superblock")
	}
	j.seed = crc32c(^uint32(0), b[0x30:0x40])
	return nil
}

// A tag says which block of the device one that follows a descriptor is ("Descriptor Block").
type tag struct {
	block   uint64
	sum     uint32
	escaped bool // its first four bytes are the journal's magic, and zeros in the journal
}

func (j *journal) tagSize() int {
	switch {
	case j.has(journalSumV3):
		return 16
	case j.has(journalSumV2) && j.has(journal64Bit):
		return 14
	case j.has(journalSumV2):
		return 10
	case j.has(journal64Bit):
		return 12
	}
	return 8
}

// tags reads a descriptor.
func (j *journal) tags(b []byte) []tag {
	be := binary.BigEndian
	end, size := len(b), j.tagSize()
	if j.sums() {
		end -= 4
	}
	var all []tag
	for pos := journalHeader; pos+size <= end; {
		e := b[pos:]
		t := tag{block: uint64(be.Uint32(e))}
		var flags uint32
		if j.has(journalSumV3) {
			flags, t.sum = be.Uint32(e[4:]), be.Uint32(e[12:])
		} else {
			flags, t.sum = uint32(be.Uint16(e[6:])), uint32(be.Uint16(e[4:]))
		}
		if j.has(journal64Bit) {
			t.block |= uint64(be.Uint32(e[8:])) << 32
		}
		t.escaped = flags&tagEscaped != 0
		all = append(all, t)
		if pos += size; flags&tagSameUUID == 0 {
			pos += 16
		}
		if flags&tagLast != 0 {
			break
		}
	}
	return all
}

// revoked yields the blocks that a revocation block names ("Revocation Block"); false: it is damaged.
func (j *journal) revoked(b []byte) (blocks []uint64, ok bool) {
	be := binary.BigEndian
	end, size := len(b), 4
	if j.sums() {
		end -= 4
	}
	if j.has(journal64Bit) {
		size = 8
	}
	used := uint64(be.Uint32(b[journalHeader:]))
	if used < journalHeader+4 || used > uint64(end) {
		return nil, false
	}
	for pos := journalHeader + 4; pos+size <= int(used); pos += size {
		if size == 8 {
			blocks = append(blocks, be.Uint64(b[pos:]))
		} else {
			blocks = append(blocks, uint64(be.Uint32(b[pos:])))
		}
	}
	return blocks, true
}

// whole reports whether a descriptor's or a revocation block's checksum, at its end, is right.
func (j *journal) whole(b []byte) bool {
	if !j.sums() {
		return true
	}
	tail := len(b) - 4
	return crc32c(crc32c(j.seed, b[:tail]), zeros[:]) == binary.BigEndian.Uint32(b[tail:])
}

// committed reports whether a commit block's checksum is right ("Commit Block"); data is the first version's, of all that
// the transaction holds.
func (j *journal) committed(b []byte, data uint32) bool {
	sum := binary.BigEndian.Uint32(b[0x10:])
	switch {
	case j.sums():
		return crc32c(crc32c(crc32c(j.seed, b[:0x10]), zeros[:]), b[0x14:]) == sum
	case j.compat&journalCompatSum != 0:
		const crc32Type, crc32Size = 1, 4
		return b[0xc] == crc32Type && b[0xd] == crc32Size && sum == data || b[0xc] == 0 && b[0xd] == 0 && sum == 0
	}
	return true
}

// matches reports whether a block that belongs to a transaction is the one that its tag means.
func (j *journal) matches(b []byte, r replayed) bool {
	var sequence [4]byte
	binary.BigEndian.PutUint32(sequence[:], r.sequence)
	sum := crc32c(crc32c(j.seed, sequence[:]), b)
	return j.has(journalSumV3) && sum == r.sum || j.has(journalSumV2) && sum&0xffff == r.sum || !j.sums()
}
