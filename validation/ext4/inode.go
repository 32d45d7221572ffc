package ext4

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"
)

// RootInode is the root directory's number.
const RootInode = 2

// Flags of inodes ("Inode Table": i_flags) that change how one is read, or what it means.
const (
	FlagImmutable = 0x10
	FlagAppend    = 0x20
	FlagVerity    = 0x100000

	flagEncrypted = 0x800
	flagIndex     = 0x1000
	flagHugeFile  = 0x40000
	flagExtents   = 0x80000
	flagEAInode   = 0x200000
	flagInline    = 0x10000000
)

// An Inode is a file, of whatever type ("Inode Table").
type Inode struct {
	Number     uint32
	Mode       uint32 // as of stat(2): type and permissions
	UID, GID   uint32
	Size       int64 // in bytes
	Links      uint32
	Flags      uint32
	Sectors    uint64 // of 512 bytes, that it takes
	Generation uint32
	Project    uint32
	Atime      time.Time
	Mtime      time.Time
	Ctime      time.Time
	Crtime     time.Time // zero where inodes are too small to say
	Dtime      uint32    // of its deletion, in seconds, or something of the kernel's

	fs     *FS
	raw    []byte
	offset int64  // in the device
	acl    uint64 // block of extended attributes
	seed   uint32 // of the checksums of what is its
}

// Inode reads an inode and verifies it, whether it is used or not.
func (f *FS) Inode(n uint32) (*Inode, error) {
	off, err := f.inodeAt(n)
	if err != nil {
		return nil, err
	}
	// An inode never crosses a block: both sizes are powers of two.
	b, err := f.block(uint64(off / f.sb.blockSize))
	if err != nil {
		return nil, err
	}
	return f.parseInode(n, b[off%f.sb.blockSize:][:f.sb.inodeSize], off)
}

// inodeAt is where an inode is, in bytes.
func (f *FS) inodeAt(n uint32) (int64, error) {
	if n == 0 || n > f.sb.inodes {
		return 0, at(superOffset, ErrCorrupt, "inode %d of %d", n, f.sb.inodes)
	}
	g, err := f.group((n - 1) / f.sb.inodesPerGroup)
	if err != nil {
		return 0, err
	}
	return f.sb.offset(g.table) + int64((n-1)%f.sb.inodesPerGroup)*f.sb.inodeSize, nil
}

func (f *FS) parseInode(n uint32, raw []byte, off int64) (*Inode, error) {
	le := binary.LittleEndian
	b := append([]byte(nil), raw...)
	i := &Inode{
		Number: n, fs: f, raw: b, offset: off,
		Mode: uint32(le.Uint16(b)), Links: uint32(le.Uint16(b[0x1a:])), Flags: le.Uint32(b[0x20:]),
		UID:        uint32(le.Uint16(b[2:])) | uint32(le.Uint16(b[0x78:]))<<16,
		GID:        uint32(le.Uint16(b[0x18:])) | uint32(le.Uint16(b[0x7a:]))<<16,
		Generation: le.Uint32(b[0x64:]), Dtime: le.Uint32(b[0x14:]),
		Size: int64(le.Uint32(b[4:])), acl: uint64(le.Uint32(b[0x68:])),
	}
	i.seed = crc32cLE(crc32cLE(f.sb.seed, n), i.Generation)
	if err := i.verify(); err != nil {
		return nil, err
	}
	if i.Type() == unix.S_IFREG || f.sb.incompat&incompatLargeDir != 0 {
		i.Size |= int64(le.Uint32(b[0x6c:])) << 32
	}
	if f.sb.incompat&incompat64Bit != 0 {
		i.acl |= uint64(le.Uint16(b[0x76:])) << 32
	}
	i.Sectors = uint64(le.Uint32(b[0x1c:]))
	if f.sb.ro&roHugeFile != 0 {
		i.Sectors |= uint64(le.Uint16(b[0x74:])) << 32
		if i.Flags&flagHugeFile != 0 {
			i.Sectors *= uint64(f.sb.blockSize / 512)
		}
	}
	i.Atime, i.Mtime, i.Ctime = i.time(8, 0x8c), i.time(0x10, 0x88), i.time(0xc, 0x84)
	if i.has(0x98) {
		i.Crtime = i.time(0x90, 0x94)
	}
	if i.has(0xa0) {
		i.Project = le.Uint32(b[0x9c:])
	}
	if i.Size < 0 || i.Size > f.sb.blockSize<<32 {
		return nil, at(off+4, ErrCorrupt, "inode %d: size of %d bytes", n, uint64(i.Size))
	}
	if i.Flags&flagEncrypted != 0 {
		return nil, at(off+0x20, ErrUnsupported, "inode %d: it is encrypted", n)
	}
	return i, nil
}

// verify checks the inode's checksum ("Checksums") and the length it says it has.
func (i *Inode) verify() error {
	b := i.raw
	if len(b) > 128 {
		if extra := binary.LittleEndian.Uint16(b[0x80:]); int(extra) > len(b)-128 || extra%4 != 0 {
			return at(i.offset+0x80, ErrCorrupt, "inode %d: %d extra bytes", i.Number, extra)
		}
	}
	if !i.fs.sb.metadataSum() {
		return nil
	}
	sum := crc32c(crc32c(crc32c(i.seed, b[:0x7c]), zeros[:2]), b[0x7e:0x80])
	want, mask := uint32(binary.LittleEndian.Uint16(b[0x7c:])), uint32(0xffff)
	if len(b) > 128 {
		sum = crc32c(sum, b[0x80:0x82])
		rest := b[0x82:]
		if i.has(0x84) {
			want, mask = want|uint32(binary.LittleEndian.Uint16(rest))<<16, ^uint32(0)
			sum, rest = crc32c(sum, zeros[:2]), rest[2:]
		}
		sum = crc32c(sum, rest)
	}
	if sum&mask != want {
		return at(i.offset, ErrChecksum, "inode %d", i.Number)
	}
	return nil
}

// has reports whether a field beyond the first 128 bytes, up to end, is there.
func (i *Inode) has(end int) bool {
	return len(i.raw) > 128 && end <= 128+int(binary.LittleEndian.Uint16(i.raw[0x80:]))
}

// time reads a time, which from 2038 on, and in nanoseconds, needs its other field ("Inode Timestamps").
func (i *Inode) time(field, extra int) time.Time {
	sec, nanos := int64(int32(binary.LittleEndian.Uint32(i.raw[field:]))), int64(0)
	if i.has(extra + 4) {
		v := binary.LittleEndian.Uint32(i.raw[extra:])
		sec, nanos = sec+int64(v&3)<<32, int64(v>>2)
	}
	return time.Unix(sec, nanos).UTC()
}

// Type is the type of file: a unix.S_IF value, or something that is none.
func (i *Inode) Type() uint32 { return i.Mode & unix.S_IFMT }

// IsDir reports whether it is a directory.
func (i *Inode) IsDir() bool { return i.Type() == unix.S_IFDIR }

// FileMode is the mode as Go's packages have it.
func (i *Inode) FileMode() fs.FileMode {
	m := fs.FileMode(i.Mode & 0o777)
	switch i.Type() {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFIFO:
		m |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		m |= fs.ModeSocket
	case unix.S_IFBLK:
		m |= fs.ModeDevice
	case unix.S_IFCHR:
		m |= fs.ModeDevice | fs.ModeCharDevice
	default:
		m |= fs.ModeIrregular
	}
	for bit, mode := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if i.Mode&bit != 0 {
			m |= mode
		}
	}
	return m
}

// Device is which device a device node stands for; of other files it is 0, 0.
func (i *Inode) Device() (major, minor uint32) {
	if t := i.Type(); t != unix.S_IFCHR && t != unix.S_IFBLK {
		return 0, 0
	}
	b := i.blockField()
	if v := binary.LittleEndian.Uint32(b); v != 0 {
		return v >> 8 & 0xff, v & 0xff
	}
	v := binary.LittleEndian.Uint32(b[4:])
	return v >> 8 & 0xfff, v&0xff | v>>12&0xfff00
}

// blockField is i_block: 60 bytes of a map, an extent tree's root, a link's target or contents.
func (i *Inode) blockField() []byte { return i.raw[blockFieldAt:blockFieldEnd] }

const (
	blockFieldAt  = 0x28
	blockFieldEnd = 0x64
)

// Readlink is a symbolic link's target.
func (i *Inode) Readlink() (string, error) {
	if i.Type() != unix.S_IFLNK {
		return "", fmt.Errorf("inode %d: not a symbolic link", i.Number)
	}
	if i.fastLink() {
		if i.Size >= blockFieldEnd-blockFieldAt {
			return "", at(i.offset+4, ErrCorrupt, "inode %d: link of %d bytes in the inode", i.Number, i.Size)
		}
		return string(i.blockField()[:i.Size]), nil
	}
	if i.Size > i.fs.sb.blockSize {
		return "", at(i.offset+4, ErrCorrupt, "inode %d: link of %d bytes", i.Number, i.Size)
	}
	b := make([]byte, i.Size)
	r, err := i.Open()
	if err != nil {
		return "", err
	}
	if r.inline != nil && len(r.inline) < len(b) {
		return "", at(i.offset+4, ErrCorrupt, "inode %d: link of %d bytes, there are %d", i.Number, i.Size, len(r.inline))
	}
	if _, err := r.ReadAt(b, 0); err != nil {
		return "", err
	}
	return string(b), nil
}

// fastLink reports whether a symbolic link is kept in the inode, as the kernel tells it: it has no blocks for it.
func (i *Inode) fastLink() bool {
	if i.Type() != unix.S_IFLNK || i.Flags&flagInline != 0 {
		return false
	}
	sectors := uint64(0)
	if i.acl != 0 {
		sectors = uint64(i.fs.sb.blockSize) * uint64(i.fs.sb.clusterRatio) / 512
	}
	return i.Sectors == sectors
}
