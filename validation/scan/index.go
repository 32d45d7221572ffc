package scan

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
)

// The encoded form, little-endian: a header, then of each volume a header and its sections, whose records are of fixed
// sizes and used where they lie. Opening looks at every record once, in their order, and allocates for directories only.
//
//	header  magic, rules' identity, number of volumes
//	volume  kind, place, fingerprint, numbers of records; then
//	  inodes   by number: what is known of each, and where its extents and the rest are
//	  names    by directory, then by name: the directory's inode number, the inode's index, where the letters are
//	  letters  of all names
//	  extents  where files lie on the device, of each file together
//	  rest     targets of links, and extended attributes
//	  replayed places whose contents came from the journal
const (
	magic        = "RDTSCAN\x01"
	headerSize   = 48
	volumeHeader = 128
	inodeSize    = 88
	nameSize     = 16
	extentSize   = 16
	rangeSize    = 16

	rootInode  = 2        // of ext4, and what FAT's root has here
	maxVolumes = 4096     // of an index
	maxShared  = 256      // bytes of a rest that several inodes may have
	maxPath    = 64 << 10 // bytes
)

// ErrIndex says that bytes are no index, or a damaged one: scan without it.
var ErrIndex = errors.New("no index of a scan, or a damaged one")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrIndex, fmt.Sprintf(format, args...))
}

// An Index is what a scan found: an entry for every name of which something was wanted, and where on the disks each file
// lies, for the next scan. It does not change.
type Index struct {
	b       []byte
	rules   [32]byte
	volumes []*volume // by name
}

type kind uint8

const (
	kindExt kind = 1 + iota
	kindFAT
)

// A volume is what an index has of one.
type volume struct {
	name         string
	kind         kind
	damaged      bool  // something could not be read, so that it must be read anew
	offset, size int64 // on the disk
	fingerprint  [32]byte
	waste        uint32 // bytes of the sections that nothing leads to, about
	encoded      []byte

	inodes, names, letters, extents, rest, replayed []byte

	once    sync.Once
	dirs    []dir
	dirsErr error
}

// A dir is a directory of which the names in it are known.
type dir struct {
	inode        uint32
	name         uint32 // its own, by its place in names
	first, count uint32 // the names in it
}

// Open makes an index of its encoded form, of which it keeps the bytes; they must not change. They may come from anybody:
// all is checked, and what is wrong is an [ErrIndex].
func Open(b []byte) (*Index, error) {
	if len(b) < headerSize || string(b[:8]) != magic {
		return nil, damaged("%d bytes without its magic", len(b))
	}
	x := &Index{b: b, rules: [32]byte(b[8:40])}
	count := binary.LittleEndian.Uint32(b[40:])
	if count > maxVolumes || binary.LittleEndian.Uint32(b[44:]) != 0 {
		return nil, damaged("%d volumes", count)
	}
	off := headerSize
	for range count {
		v, err := parseVolume(b[off:])
		if err != nil {
			return nil, fmt.Errorf("volume %d at byte %d: %w", len(x.volumes), off, err)
		}
		if n := len(x.volumes); n > 0 && x.volumes[n-1].name >= v.name {
			return nil, damaged("volume %q after %q", v.name, x.volumes[n-1].name)
		}
		x.volumes = append(x.volumes, v)
		off += len(v.encoded)
	}
	if off != len(b) {
		return nil, damaged("%d bytes behind the last volume", len(b)-off)
	}
	return x, nil
}

// Bytes is the encoded form. Nobody may change it.
func (x *Index) Bytes() []byte { return x.b }

// WriteTo implements io.WriterTo: it writes the encoded form.
func (x *Index) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(x.b)
	return int64(n), err
}

// Rules is the identity of the selector's rules, as [Run] was told.
func (x *Index) Rules() [32]byte { return x.rules }

func (x *Index) volume(name string) *volume {
	if x == nil {
		return nil
	}
	i, ok := slices.BinarySearchFunc(x.volumes, name, func(v *volume, name string) int { return cmp.Compare(v.name, name) })
	if !ok {
		return nil
	}
	return x.volumes[i]
}

func parseVolume(b []byte) (*volume, error) {
	v, err := sectionsOf(b)
	if err != nil {
		return nil, err
	}
	inodes := make(chan error, 1)
	go func() { inodes <- v.checkInodes() }()
	err = v.checkNames()
	if other := <-inodes; other != nil {
		return nil, other
	}
	if err != nil {
		return nil, err
	}
	if err := v.tree(); err != nil {
		return nil, err
	}
	return v, nil
}

// sectionsOf reads a volume's header, and where its sections are.
func sectionsOf(b []byte) (*volume, error) {
	le := binary.LittleEndian
	if len(b) < volumeHeader {
		return nil, damaged("header of %d bytes", len(b))
	}
	length := int(b[0])
	if length == 0 || length > 31 || b[33] > 1 {
		return nil, damaged("name of %d bytes, flags %#x", length, b[33])
	}
	v := &volume{
		name: string(b[1 : 1+length]), kind: kind(b[32]), damaged: b[33] != 0, waste: le.Uint32(b[112:]),
		offset: int64(le.Uint64(b[40:])), size: int64(le.Uint64(b[48:])), fingerprint: [32]byte(b[56:88]),
	}
	if v.kind != kindExt && v.kind != kindFAT || v.offset < 0 || v.size <= 0 || v.offset+v.size < 0 {
		return nil, damaged("kind %d, %d bytes at %d", v.kind, v.size, v.offset)
	}
	off := uint64(volumeHeader)
	for i, s := range v.sections() {
		n := uint64(le.Uint32(b[88+4*i:])) * uint64(sectionUnits[i])
		if n > uint64(len(b))-off {
			return nil, damaged("section %d of %d bytes", i, n)
		}
		*s = b[off : off+n : off+n]
		off += n
	}
	v.encoded = b[:off:off]
	last := int64(0)
	for b := v.replayed; len(b) > 0; b = b[rangeSize:] {
		from, length := int64(le.Uint64(b)), int64(le.Uint64(b[8:]))
		if from < last || length <= 0 || from > v.size || length > v.size-from {
			return nil, damaged("%d bytes replayed at %d, after %d of %d", length, from, last, v.size)
		}
		last = from + length
	}
	return v, nil
}

var sectionUnits = [...]int{inodeSize, nameSize, 1, extentSize, 1, rangeSize}

func (v *volume) sections() [6]*[]byte {
	return [...]*[]byte{&v.inodes, &v.names, &v.letters, &v.extents, &v.rest, &v.replayed}
}

func (v *volume) inodeCount() int { return len(v.inodes) / inodeSize }
func (v *volume) nameCount() int  { return len(v.names) / nameSize }

// An inode is a record as it lies there.
type inode []byte

func (v *volume) inode(i int) inode { return inode(v.inodes[i*inodeSize:][:inodeSize]) }

// What of an inode is known, or could not be read.
const (
	hasDigest uint16 = 1 << iota
	hasXattrs
	badDigest
	badXattrs
	badTarget
	unmapped // its extents are not known: any change may be one of it
	isInline
	bad        = badDigest | badXattrs | badTarget
	stateKnown = 1<<7 - 1
)

func (n inode) number() uint32     { return binary.LittleEndian.Uint32(n) }
func (n inode) mode() uint32       { return uint32(binary.LittleEndian.Uint16(n[4:])) }
func (n inode) state() uint16      { return binary.LittleEndian.Uint16(n[6:]) }
func (n inode) size() int64        { return int64(binary.LittleEndian.Uint64(n[32:])) }
func (n inode) generation() uint32 { return binary.LittleEndian.Uint32(n[24:]) }
func (n inode) flags() uint32      { return binary.LittleEndian.Uint32(n[20:]) }
func (n inode) isDir() bool        { return n.mode()&unix.S_IFMT == unix.S_IFDIR }
func (n inode) extents() (first, count uint32) {
	return binary.LittleEndian.Uint32(n[72:]), binary.LittleEndian.Uint32(n[76:])
}

func (n inode) rest() (off, length uint32) {
	return binary.LittleEndian.Uint32(n[80:]), binary.LittleEndian.Uint32(n[84:])
}

// find is the index of an inode by its number.
func (v *volume) find(number uint32) (int, bool) {
	low, high := 0, v.inodeCount()
	for low < high {
		mid := int(uint(low+high) / 2)
		if v.inode(mid).number() < number {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return low, low < v.inodeCount() && v.inode(low).number() == number
}

// A name is a record as it lies there.
type name []byte

func (v *volume) nameAt(i int) name { return name(v.names[i*nameSize:][:nameSize]) }

func (n name) dir() uint32         { return binary.LittleEndian.Uint32(n) }
func (n name) inode() uint32       { return binary.LittleEndian.Uint32(n[4:]) } // index
func (n name) place() uint32       { return binary.LittleEndian.Uint32(n[8:]) }
func (n name) want() baseline.Want { return baseline.Want(n[13]) }

func (v *volume) lettersOf(n name) []byte { return v.letters[n.place():][:n[12]] }

const wantKnown = baseline.Descend | baseline.Metadata | baseline.Content | baseline.Xattrs

func (v *volume) checkInodes() error {
	extents := uint64(len(v.extents) / extentSize)
	last, lastRest := uint32(0), [2]uint32{}
	// Extents are one inode's, and only short rests are shared: else what each has could be all, many times over.
	extentsLeft, restLeft := int64(extents), int64(len(v.rest))
	for i := range v.inodeCount() {
		n := v.inode(i)
		first, count := n.extents()
		off, length := n.rest()
		switch {
		case n.number() <= last:
			return damaged("inode %d after %d", n.number(), last)
		case n.state()&^uint16(stateKnown) != 0 || n.size() < 0:
			return damaged("inode %d: state %#x, size %d", n.number(), n.state(), n.size())
		case uint64(first)+uint64(count) > extents:
			return damaged("inode %d: extents %d to %d of %d", n.number(), first, uint64(first)+uint64(count), extents)
		case uint64(off)+uint64(length) > uint64(len(v.rest)):
			return damaged("inode %d: %d bytes at %d of %d", n.number(), length, off, len(v.rest))
		}
		if extentsLeft -= int64(count); length > maxShared {
			restLeft -= int64(length)
		}
		if extentsLeft < 0 || restLeft < 0 {
			return damaged("inode %d: what it has is another's too", n.number())
		}
		last = n.number()
		if rest := [2]uint32{off, length}; length > 0 && rest != lastRest { // many have the same
			if _, _, ok := parseRest(v.rest[off:][:length]); !ok {
				return damaged("inode %d: target and attributes", n.number())
			}
			lastRest = rest
		}
	}
	return nil
}

func (v *volume) checkNames() error {
	inodes := uint32(v.inodeCount())
	var lastDir uint32
	var last []byte
	for i := range v.nameCount() {
		n := v.nameAt(i)
		if n.inode() >= inodes || uint64(n.place())+uint64(n[12]) > uint64(len(v.letters)) || n.want()&^wantKnown != 0 || n[14] != 0 || n[15] != 0 {
			return damaged("name %d: inode %d of %d, %d bytes at %d of %d", i, n.inode(), inodes, n[12], n.place(), len(v.letters))
		}
		letters := v.lettersOf(n)
		switch {
		case (i == 0) != (n.dir() == 0):
			return damaged("name %d in directory %d", i, n.dir())
		case i == 0 && (len(letters) != 0 || v.inode(int(n.inode())).number() != rootInode):
			return damaged("the root is inode %d", v.inode(int(n.inode())).number())
		case i > 0 && (len(letters) == 0 || bytes.IndexByte(letters, '/') >= 0):
			return damaged("name %q", letters)
		case n.dir() < lastDir || n.dir() == lastDir && i > 0 && bytes.Compare(letters, last) <= 0:
			return damaged("name %q in directory %d after %q in %d", letters, n.dir(), last, lastDir)
		}
		lastDir, last = n.dir(), letters
	}
	return nil
}

// tree finds the directories and what is in each, once.
func (v *volume) tree() error {
	v.once.Do(func() { v.dirsErr = v.makeTree() })
	return v.dirsErr
}

func (v *volume) makeTree() error {
	for i := range v.nameCount() {
		if n := v.nameAt(i); n.want()&baseline.Descend != 0 {
			in := v.inode(int(n.inode()))
			if !in.isDir() {
				return damaged("inode %d is no directory", in.number())
			}
			v.dirs = append(v.dirs, dir{inode: in.number(), name: uint32(i)})
		}
	}
	slices.SortFunc(v.dirs, func(a, b dir) int { return cmp.Compare(a.inode, b.inode) })
	for i := 1; i < len(v.dirs); i++ {
		if v.dirs[i].inode == v.dirs[i-1].inode {
			return damaged("directory %d has two names", v.dirs[i].inode)
		}
	}
	d := 0
	for i := 1; i < v.nameCount(); {
		in, first := v.nameAt(i).dir(), i
		for i++; i < v.nameCount() && v.nameAt(i).dir() == in; i++ {
		}
		for d < len(v.dirs) && v.dirs[d].inode < in {
			d++
		}
		if d == len(v.dirs) || v.dirs[d].inode != in {
			return damaged("%d names in directory %d, which has none", i-first, in)
		}
		v.dirs[d].first, v.dirs[d].count = uint32(first), uint32(i-first)
	}
	return v.checkDepth()
}

// checkDepth reports directories that are in themselves, and paths that are too long.
func (v *volume) checkDepth() error {
	const unknown, under = 0, -1
	lengths := make([]int32, len(v.dirs)) // of paths, and 1
	var way []int
	for i := range v.dirs {
		way = way[:0]
		d := i
		for lengths[d] == unknown {
			lengths[d] = under
			way = append(way, d)
			parent := v.nameAt(int(v.dirs[d].name)).dir()
			if parent == 0 {
				break
			}
			var ok bool
			if d, ok = v.dir(parent); !ok {
				return damaged("directory %d is nowhere", parent)
			}
			if lengths[d] == under {
				return damaged("directory %d is in itself", parent)
			}
		}
		length := int32(1)
		if len(way) == 0 {
			continue
		}
		if n := v.nameAt(int(v.dirs[way[len(way)-1]].name)); n.dir() != 0 {
			length = lengths[d]
		}
		for k := len(way) - 1; k >= 0; k-- {
			length += 1 + int32(v.nameAt(int(v.dirs[way[k]].name))[12])
			if length > maxPath {
				return damaged("path of more than %d bytes", maxPath)
			}
			lengths[way[k]] = length
		}
	}
	return nil
}

// dir is a directory's place in dirs.
func (v *volume) dir(inode uint32) (int, bool) {
	return slices.BinarySearchFunc(v.dirs, inode, func(d dir, n uint32) int { return cmp.Compare(d.inode, n) })
}
