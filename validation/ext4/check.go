package ext4

import (
	"encoding/binary"
	"iter"
	"slices"

	"golang.org/x/sys/unix"
)

// maxProblems is how many a check yields before it gives up.
const maxProblems = 1000

// Check yields what is wrong with the file system's structure, at most a thousand findings: descriptors, bitmaps,
// inodes, extent trees, directories and attributes with wrong checksums or that make no sense, blocks outside the file
// system, of two owners or marked as free, entries for unused inodes, numbers of links that are not those of names.
//
// It is no e2fsck(8): the counts of what is free, backups of superblock and descriptors, the order in hash trees, names that
// occur twice, quotas, the orphans' list, and what is marked as used and is nobody's are not looked at, nor are contents.
func (f *FS) Check() iter.Seq[error] {
	return func(yield func(error) bool) {
		left := maxProblems
		c := &check{fs: f, say: func(err error) bool {
			left--
			return yield(err) && left > 0
		}}
		_ = c.begin() && c.groups() && c.inodes() && c.links() && c.free()
	}
}

// A check's steps return whether to go on.
type check struct {
	fs     *FS
	say    func(error) bool
	owned  []byte   // a bit a block
	shared []byte   // a bit a block that many inodes may have: of extended attributes
	used   []byte   // a bit an inode
	want   []uint16 // an inode's links, as it says; noLinks: not to be checked
	names  []uint32 // an inode's names
}

const noLinks = 0xffff

func (c *check) begin() bool {
	s := c.fs.sb
	if need := s.blocks/4 + uint64(s.inodes)*7; need > uint64(c.fs.memory) {
		c.say(at(superOffset, ErrEffort, "superblock: %d blocks and %d inodes: to check them takes %d bytes", s.blocks, s.inodes, need))
		return false
	}
	c.owned, c.shared = make([]byte, s.blocks/8+1), make([]byte, s.blocks/8+1)
	c.used, c.want, c.names = make([]byte, s.inodes/8+1), make([]uint16, s.inodes+1), make([]uint32, s.inodes+1)
	return true
}

// claim marks blocks as somebody's; false: one is another's already.
func (c *check) claim(block, n uint64) bool {
	for b := block; b < block+n; b++ {
		if c.owned[b/8]&(1<<(b%8)) != 0 {
			return false
		}
		c.owned[b/8] |= 1 << (b % 8)
	}
	return true
}

func (c *check) groups() bool {
	for n := range c.fs.sb.groups {
		g, err := c.fs.group(n)
		if err != nil {
			if !c.say(err) {
				return false
			}
			continue
		}
		if !c.claim(g.table, c.fs.sb.tableBlocks()) || !c.claim(g.blockBitmap, 1) || !c.claim(g.inodeBitmap, 1) {
			if !c.say(at(g.offset, ErrCorrupt, "group %d: its inodes or bitmaps overlap others", n)) {
				return false
			}
		}
		if _, err := c.fs.blockBitmap(g); err != nil && !c.say(err) {
			return false
		}
	}
	return true
}

func (c *check) inodes() bool {
	for in, err := range c.fs.Inodes() {
		if err != nil {
			if !c.say(err) {
				return false
			}
			continue
		}
		c.used[in.Number/8] |= 1 << (in.Number % 8)
		c.want[in.Number] = uint16(in.Links)
		if c.hidden(in) {
			c.want[in.Number] = noLinks
		}
		if in.Links == 0 && in.Dtime != 0 { // deleted, and still open
			c.want[in.Number] = noLinks
		}
		if err := c.blocks(in); err != nil && !c.say(err) {
			return false
		}
		if _, err := in.Xattrs(); err != nil && !c.say(err) {
			return false
		}
		if in.Type() == unix.S_IFLNK {
			if _, err := in.Readlink(); err != nil && !c.say(err) {
				return false
			}
		}
		if in.IsDir() && !c.directory(in) {
			return false
		}
	}
	return true
}

// hidden reports whether an inode has no name because it needs none.
func (c *check) hidden(in *Inode) bool {
	s := c.fs.sb
	return in.Number < s.firstInode && in.Number != RootInode || in.Flags&flagEAInode != 0 || in.Number == s.orphanInode ||
		slices.Contains(s.quotaInodes[:], in.Number)
}

// blocks checks where an inode's contents and attributes are.
func (c *check) blocks(in *Inode) (problem error) {
	s := c.fs.sb
	twice := func(b uint64) error {
		return at(in.offset, ErrCorrupt, "inode %d: block %d has another owner too", in.Number, b)
	}
	if in.acl != 0 && s.valid(in.acl, 1) && c.shared[in.acl/8]&(1<<(in.acl%8)) == 0 {
		c.shared[in.acl/8] |= 1 << (in.acl % 8)
		if !c.claim(in.acl, 1) {
			problem = twice(in.acl)
		}
	}
	if !in.mapped() {
		return problem
	}
	in.contents(in.mostBlocks(), func(e Extent, err error) bool {
		if err != nil {
			problem = err
			return false
		}
		if b := uint64(e.Offset / s.blockSize); e.Kind != Hole && !c.claim(b, uint64(e.Length/s.blockSize)) && s.ro&roSharedBlocks == 0 {
			problem = twice(b)
			return false
		}
		return true
	})
	return problem
}

// mostBlocks is how far the map can lead, beyond the size too: blocks may be reserved there.
func (i *Inode) mostBlocks() uint64 {
	if i.Flags&flagExtents != 0 {
		return maxLogical
	}
	p := uint64(i.fs.sb.blockSize / 4)
	return min(maxLogical, directBlocks+p+p*p+p*p*p)
}

// directory counts the names in a directory.
func (c *check) directory(in *Inode) bool {
	dots := 0
	for d, err := range in.entries() {
		if err != nil {
			if !c.say(err) {
				return false
			}
			continue
		}
		c.names[d.Inode]++
		if d.Name == "." && d.Inode == in.Number || d.Name == ".." {
			dots++
		}
	}
	if dots != 2 && in.Links > 0 {
		return c.say(at(in.offset, ErrCorrupt, "inode %d: directory without itself and its parent", in.Number))
	}
	return true
}

// links holds the inodes' numbers of links to their names.
func (c *check) links() bool {
	for n := uint32(1); n <= c.fs.sb.inodes && n != 0; n++ {
		used, names := c.used[n/8]&(1<<(n%8)) != 0, c.names[n]
		var err error
		switch want := c.want[n]; {
		case !used && names > 0:
			err = ErrCorrupt
		case !used || want == noLinks || names == uint32(want):
		case want == 1 && names > 2: // a directory of more than can be counted (dir_nlink)
		default:
			err = ErrCorrupt
		}
		if err == nil {
			continue
		}
		off, _ := c.fs.inodeAt(n)
		if !used {
			err = at(off, err, "inode %d: %d names, but it is not used", n, names)
		} else {
			err = at(off, err, "inode %d: %d links, but %d names", n, c.want[n], names)
		}
		if !c.say(err) {
			return false
		}
	}
	return true
}

// free finds blocks that are somebody's and marked as free.
func (c *check) free() bool {
	s := c.fs.sb
	for n := range s.groups {
		g, err := c.fs.group(n)
		if err != nil {
			continue // was said
		}
		marked, err := c.fs.blockBitmap(g)
		if err != nil || marked == nil {
			continue
		}
		start := s.groupStart(n)
		for b := start; b < min(s.blocks, start+uint64(s.blocksPerGroup)); b++ {
			if b%64 == 0 && b+64 <= s.blocks && binary.LittleEndian.Uint64(c.owned[b/8:][:8]) == 0 {
				b += 63
				continue
			}
			if c.owned[b/8]&(1<<(b%8)) != 0 && !marked.has(uint32(b-start)/s.clusterRatio) {
				if !c.say(at(s.offset(b), ErrCorrupt, "block %d: in use, but marked as free", b)) {
					return false
				}
				break // one of a group is enough
			}
		}
	}
	return true
}
