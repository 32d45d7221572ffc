package ext4

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
)

const (
	superOffset = 1024
	superSize   = 1024
	superMagic  = 0xef53
)

// Features ("Super Block": s_feature_compat, _incompat, _ro_compat) that change how something is read.
const (
	compatHasJournal   = 0x4
	compatDirIndex     = 0x20
	compatSparseSuper2 = 0x200

	incompatRecover    = 0x4
	incompatJournalDev = 0x8
	incompatMetaBG     = 0x10
	incompat64Bit      = 0x80
	incompatEAInode    = 0x400
	incompatSeed       = 0x2000
	incompatLargeDir   = 0x4000
	incompatInlineData = 0x8000

	roSparseSuper  = 0x1
	roHugeFile     = 0x8
	roGroupSum     = 0x10
	roBigalloc     = 0x200
	roMetadataSum  = 0x400
	roSharedBlocks = 0x4000

	// What reads right with this package: filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode,
	// csum_seed, largedir, inline_data.
	incompatKnown = 0x2 | incompatRecover | incompatMetaBG | 0x40 | incompat64Bit | 0x100 | 0x200 |
		incompatEAInode | incompatSeed | incompatLargeDir | incompatInlineData
)

var (
	compatNames = map[int]string{
		0: "dir_prealloc", 1: "imagic_inodes", 2: "has_journal", 3: "ext_attr", 4: "resize_inode", 5: "dir_index", 9: "sparse_super2",
		10: "fast_commit", 11: "stable_inodes", 12: "orphan_file",
	}
	incompatNames = map[int]string{
		0: "compression", 1: "filetype", 2: "needs_recovery", 3: "journal_dev", 4: "meta_bg", 6: "extents", 7: "64bit", 8: "mmp",
		9: "flex_bg", 10: "ea_inode", 12: "dirdata", 13: "metadata_csum_seed", 14: "large_dir", 15: "inline_data", 16: "encrypt", 17: "casefold",
	}
	roNames = map[int]string{
		0: "sparse_super", 1: "large_file", 2: "btree_dir", 3: "huge_file", 4: "uninit_bg", 5: "dir_nlink", 6: "extra_isize", 7: "snapshot",
		8: "quota", 9: "bigalloc", 10: "metadata_csum", 11: "replica", 12: "read-only", 13: "project", 14: "shared_blocks", 15: "verity",
		16: "orphan_present",
	}
)

func featureNames(bits uint32, names map[int]string, word string) []string {
	var all []string
	for i := range 32 {
		if bits&(1<<i) == 0 {
			continue
		}
		if n, ok := names[i]; ok {
			all = append(all, n)
		} else {
			all = append(all, fmt.Sprintf("%s bit %d (%#x)", word, i, uint32(1)<<i))
		}
	}
	return all
}

// A super is what the superblock says, checked: no later sum of its figures overflows.
type super struct {
	blockSize      int64
	blocks         uint64
	firstData      uint64 // block
	clusterRatio   uint32 // blocks
	blocksPerGroup uint32
	groups         uint32

	inodes         uint32
	inodesPerGroup uint32
	inodeSize      int64
	firstInode     uint32 // that is not reserved

	descSize    int64
	firstMetaBG uint32
	backups     [2]uint32 // groups with a superblock, of sparse_super2

	compat, incompat, ro uint32
	uuid                 [16]byte
	label                string
	seed                 uint32 // of checksums

	journalInode, journalDev uint32
	quotaInodes              [3]uint32
	orphanInode              uint32
}

func (s *super) metadataSum() bool { return s.ro&roMetadataSum != 0 }

// parseSuper reads and checks a superblock of a device of size bytes ("Super Block").
func parseSuper(b []byte, size int64) (*super, error) {
	le := binary.LittleEndian
	if le.Uint16(b[0x38:]) != superMagic {
		return nil, at(superOffset+0x38, ErrNotExt, "superblock")
	}
	s := &super{inodeSize: 128, firstInode: 11, descSize: 32}
	if le.Uint32(b[0x4c:]) > 0 { // s_rev_level: the first one had none of these
		s.firstInode, s.inodeSize = le.Uint32(b[0x54:]), int64(le.Uint16(b[0x58:]))
		s.compat, s.incompat, s.ro = le.Uint32(b[0x5c:]), le.Uint32(b[0x60:]), le.Uint32(b[0x64:])
	}
	if err := s.checkFeatures(b); err != nil {
		return nil, err
	}
	copy(s.uuid[:], b[0x68:])
	label, _, _ := bytes.Cut(b[0x78:0x88], []byte{0})
	s.label = string(label)
	s.journalInode, s.journalDev = le.Uint32(b[0xe0:]), le.Uint32(b[0xe4:])
	s.quotaInodes = [3]uint32{le.Uint32(b[0x240:]), le.Uint32(b[0x244:]), le.Uint32(b[0x26c:])}
	s.backups = [2]uint32{le.Uint32(b[0x24c:]), le.Uint32(b[0x250:])}
	s.orphanInode = le.Uint32(b[0x280:])
	s.firstMetaBG = le.Uint32(b[0x104:])
	s.seed = crc32c(^uint32(0), s.uuid[:])
	if s.incompat&incompatSeed != 0 {
		s.seed = le.Uint32(b[0x270:])
	}
	if err := s.parseGeometry(b); err != nil {
		return nil, err
	}
	if s.blocks > uint64(size/s.blockSize) {
		return nil, at(superOffset+4, ErrCorrupt, "superblock: %d blocks of %d bytes on a device of %d: it was cut short", s.blocks, s.blockSize, size)
	}
	return s, nil
}

func (s *super) checkFeatures(b []byte) error {
	le := binary.LittleEndian
	if s.ro&roMetadataSum != 0 {
		if b[0x175] != 1 {
			return at(superOffset+0x175, ErrUnsupported, "superblock: checksums of type %d, not crc32c", b[0x175])
		}
		if crc32c(^uint32(0), b[:0x3fc]) != le.Uint32(b[0x3fc:]) {
			return at(superOffset+0x3fc, ErrChecksum, "superblock")
		}
	}
	if s.incompat&incompatJournalDev != 0 {
		return at(superOffset+0x60, ErrUnsupported, "superblock: this is an external journal, not a file system")
	}
	if unknown := s.incompat &^ incompatKnown; unknown != 0 {
		return at(superOffset+0x60, ErrUnsupported, "superblock: features %s", strings.Join(featureNames(unknown, incompatNames, "incompat"), ", "))
	}
	return nil
}

func (s *super) parseGeometry(b []byte) error {
	le := binary.LittleEndian
	bad := func(where int64, format string, args ...any) error {
		return at(superOffset+where, ErrCorrupt, "superblock: "+format, args...)
	}
	logBlock, logCluster := le.Uint32(b[0x18:]), le.Uint32(b[0x1c:])
	if logBlock > 6 {
		return bad(0x18, "block size of 2^%d bytes", uint64(logBlock)+10)
	}
	s.blockSize = 1024 << logBlock
	s.clusterRatio = 1
	clusters := le.Uint32(b[0x20:])
	if s.ro&roBigalloc != 0 {
		if logCluster < logBlock || logCluster > 20 { // 1 GiB
			return bad(0x1c, "cluster size of 2^%d bytes", uint64(logCluster)+10)
		}
		s.clusterRatio = 1 << (logCluster - logBlock)
		clusters = le.Uint32(b[0x24:])
	}
	bitmap := uint64(8 * s.blockSize)
	s.blocks = uint64(le.Uint32(b[4:]))
	if s.incompat&incompat64Bit != 0 {
		s.blocks |= uint64(le.Uint32(b[0x150:])) << 32
		if s.descSize = int64(le.Uint16(b[0xfe:])); s.descSize < 64 || s.descSize > s.blockSize || s.descSize&(s.descSize-1) != 0 {
			return bad(0xfe, "group descriptors of %d bytes", s.descSize)
		}
	}
	s.firstData = uint64(le.Uint32(b[0x14:]))
	s.blocksPerGroup = le.Uint32(b[0x20:])
	switch {
	case s.blocks >= 1<<48:
		return bad(4, "%d blocks", s.blocks)
	case s.firstData > 1 || s.firstData >= s.blocks:
		return bad(0x14, "first data block %d of %d", s.firstData, s.blocks)
	case clusters == 0 || uint64(clusters) > bitmap || uint64(s.blocksPerGroup) != uint64(clusters)*uint64(s.clusterRatio):
		return bad(0x20, "groups of %d blocks and %d clusters", s.blocksPerGroup, clusters)
	}
	groups := (s.blocks - s.firstData + uint64(s.blocksPerGroup) - 1) / uint64(s.blocksPerGroup)
	s.inodes, s.inodesPerGroup = le.Uint32(b[0:]), le.Uint32(b[0x28:])
	switch {
	case groups > 1<<32-1:
		return bad(4, "%d groups", groups)
	case s.inodeSize < 128 || s.inodeSize > s.blockSize || s.inodeSize&(s.inodeSize-1) != 0:
		return bad(0x58, "inodes of %d bytes", s.inodeSize)
	case int64(s.inodesPerGroup) < s.blockSize/s.inodeSize || uint64(s.inodesPerGroup) > bitmap:
		return bad(0x28, "groups of %d inodes", s.inodesPerGroup)
	case s.inodes < s.firstInode || s.firstInode < 11 || uint64(s.inodes) > groups*uint64(s.inodesPerGroup):
		return bad(0, "%d inodes, the first at %d, in %d groups of %d", s.inodes, s.firstInode, groups, s.inodesPerGroup)
	}
	s.groups = uint32(groups)
	return nil
}

func (s *super) offset(block uint64) int64 { return int64(block) * s.blockSize }

// valid reports whether n blocks from one on can be a file's: they are behind the superblock and inside the file system.
func (s *super) valid(block, n uint64) bool {
	return block > s.firstData && block < s.blocks && n <= s.blocks-block
}

// hasSuper reports whether a group begins with a copy of the superblock ("Layout": sparse_super).
func (s *super) hasSuper(group uint32) bool {
	switch {
	case group == 0:
		return true
	case s.compat&compatSparseSuper2 != 0:
		return group == s.backups[0] || group == s.backups[1]
	case group == 1 || s.ro&roSparseSuper == 0:
		return true
	case group&1 == 0:
		return false
	}
	for _, base := range []uint32{3, 5, 7} {
		n := group
		for n%base == 0 {
			n /= base
		}
		if n == 1 {
			return true
		}
	}
	return false
}

func (s *super) groupStart(group uint32) uint64 {
	return s.firstData + uint64(group)*uint64(s.blocksPerGroup)
}

// descriptorAt is where a group's descriptor is, in bytes ("Meta Block Groups").
func (s *super) descriptorAt(group uint32) int64 {
	perBlock := uint32(s.blockSize / s.descSize)
	i := group / perBlock
	block := uint64(superOffset/s.blockSize) + 1 + uint64(i)
	if s.incompat&incompatMetaBG != 0 && i >= s.firstMetaBG {
		first := i * perBlock
		block = s.groupStart(first)
		if s.hasSuper(first) {
			block++
		}
		if s.blockSize == superOffset && first == 0 && s.firstData == 0 {
			block++ // the superblock is not the group's first block then
		}
	}
	return s.offset(block) + int64(group%perBlock)*s.descSize
}
