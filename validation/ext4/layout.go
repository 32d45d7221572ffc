package ext4

import (
	"crypto/sha256"
	"fmt"
)

// A Layout is where a file system's inodes lie, and what decides how everything in it is read.
type Layout struct {
	// Fingerprint is of all that the superblock says of places, sizes, features and checksums, and of the places of all
	// inode tables, but of no counter. While it stays the same, the bytes of an inode, a directory or a tree mean the same.
	Fingerprint [sha256.Size]byte

	perGroup  uint32
	inodeSize int64
	tables    []int64 // by group, in bytes of the device; -1: its descriptor cannot be read
}

// groupEffort is about what a group's place costs to keep and to find, in bytes of [Options.MaxMemory].
const groupEffort = 64

// Layout reads all groups' descriptors. One that is damaged is part of the fingerprint, and no error: its inodes are.
func (f *FS) Layout() (*Layout, error) {
	s := *f.sb
	groups := (uint64(s.inodes) + uint64(s.inodesPerGroup) - 1) / uint64(s.inodesPerGroup)
	if groups > uint64(f.memory)/groupEffort {
		return nil, at(superOffset+0x28, ErrEffort, "superblock: %d groups of inodes", groups)
	}
	l := &Layout{perGroup: s.inodesPerGroup, inodeSize: s.inodeSize, tables: make([]int64, groups)}
	h := sha256.New()
	// What comes and goes with a journal, an orphan or the first file of some kind changes nothing that is read here.
	s.incompat &^= incompatRecover
	s.compat &= compatHasJournal | compatDirIndex | compatSparseSuper2
	s.ro &= roSparseSuper | roHugeFile | roGroupSum | roBigalloc | roMetadataSum
	s.label = ""
	fmt.Fprintf(h, "%v", s)
	for n := range l.tables {
		g, err := f.group(uint32(n))
		if err != nil {
			l.tables[n] = -1
		} else {
			l.tables[n] = s.offset(g.table)
		}
	}
	for n, table := range l.tables {
		// Tables of a flexible group follow each other: most of these say nothing new.
		if n == 0 || table != l.tables[n-1]+int64(s.tableBlocks())*s.blockSize {
			fmt.Fprintf(h, "%d:%d ", n, table)
		}
	}
	h.Sum(l.Fingerprint[:0])
	return l, nil
}

// Inode is where an inode lies on the device, in bytes; the length is 0 where nobody can tell.
func (l *Layout) Inode(n uint32) Range {
	if n == 0 || uint64(n-1)/uint64(l.perGroup) >= uint64(len(l.tables)) || l.tables[(n-1)/l.perGroup] < 0 {
		return Range{}
	}
	return Range{l.tables[(n-1)/l.perGroup] + int64((n-1)%l.perGroup)*l.inodeSize, l.inodeSize}
}

// An InodeReader reads many inodes in the order of their numbers: in large pieces, beside the cache. It is for one
// goroutine.
type InodeReader struct{ t table }

// InodeReader returns a reader of inodes.
func (f *FS) InodeReader() *InodeReader { return &InodeReader{table{fs: f}} }

// Inode is [FS.Inode]; numbers that do not ascend are right too, and slower.
func (r *InodeReader) Inode(n uint32) (*Inode, error) { return r.t.inode(n) }

// InlineData reports whether the contents are in the inode itself, so that its block is all that they depend on.
func (i *Inode) InlineData() bool { return i.Flags&flagInline != 0 }

// Offset is where the inode is on the device, in bytes.
func (i *Inode) Offset() int64 { return i.offset }
