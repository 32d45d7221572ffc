package partition

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// Content is what a partition holds, by its magic numbers.
type Content string

// Contents. Of these only Ext and FAT are read.
const (
	Unknown   Content = ""
	Ext       Content = "ext" // ext2, ext3 or ext4
	FAT       Content = "fat"
	LVM2      Content = "lvm2"
	LUKS      Content = "luks"
	RAID      Content = "raid" // Linux md
	Btrfs     Content = "btrfs"
	XFS       Content = "xfs"
	F2FS      Content = "f2fs"
	ZFS       Content = "zfs"
	NTFS      Content = "ntfs"
	ExFAT     Content = "exfat"
	BitLocker Content = "bitlocker"
	Bcache    Content = "bcache"
	EROFS     Content = "erofs"
	SquashFS  Content = "squashfs"
	ISO9660   Content = "iso9660"
	Swap      Content = "swap"
)

// A magic is bytes at a place. What holds other things comes before what it may hold.
type magic struct {
	content Content
	offset  int64
	bytes   string
}

var magics = []magic{
	{LUKS, 0, "LUKS\xba\xbe"},
	{BitLocker, 3, "-FVE-FS-"},
	{RAID, 0, "\xfc\x4e\x2b\xa9"},
	{RAID, 4096, "\xfc\x4e\x2b\xa9"},
	{Bcache, 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{LVM2, 24, "LVM2 001"},
	{LVM2, 512 + 24, "LVM2 001"},
	{LVM2, 1024 + 24, "LVM2 001"},
	{LVM2, 1536 + 24, "LVM2 001"},
	{ZFS, 128 << 10, "\x0c\xb1\xba\x00\x00\x00\x00\x00"},
	{XFS, 0, "XFSB"},
	{Btrfs, 0x10040, "_BHRfS_M"},
	{Ext, 1024 + 0x38, "\x53\xef"},
	{F2FS, 1024, "\x10\x20\xf5\xf2"},
	{EROFS, 1024, "\xe2\xe1\xf5\xe0"},
	{SquashFS, 0, "hsqs"},
	{ISO9660, 32769, "CD001"},
	{NTFS, 3, "NTFS    "},
	{ExFAT, 3, "EXFAT   "},
	{Swap, 4096 - 10, "SWAPSPACE2"},
	{Swap, 16384 - 10, "SWAPSPACE2"},
	{Swap, 65536 - 10, "SWAPSPACE2"},
}

// Identify says what is on a device of size bytes, by its magic numbers.
func Identify(r io.ReaderAt, size int64) (Content, error) {
	d := disk{r, size}
	for _, m := range magics {
		if m.offset+int64(len(m.bytes)) > size {
			continue
		}
		b, err := d.read(m.offset, len(m.bytes))
		if err != nil {
			return Unknown, err
		}
		if string(b) == m.bytes {
			return m.content, nil
		}
	}
	if size >= 512 {
		b, err := d.read(0, 512)
		if err != nil {
			return Unknown, err
		}
		if isFAT(b) {
			return FAT, nil
		}
	}
	return d.oldRAID()
}

// isFAT reports whether a sector is a FAT file system's first ("Microsoft FAT specification", §3.1).
func isFAT(b []byte) bool {
	le := binary.LittleEndian
	sector, cluster := le.Uint16(b[11:]), b[13]
	return b[510] == 0x55 && b[511] == 0xaa && (b[0] == 0xeb || b[0] == 0xe9) &&
		slices.Contains([]uint16{512, 1024, 2048, 4096}, sector) && cluster != 0 && cluster&(cluster-1) == 0 &&
		le.Uint16(b[14:]) != 0 && (b[16] == 1 || b[16] == 2) && (b[21] == 0xf0 || b[21] >= 0xf8)
}

// oldRAID looks for Linux md's superblocks that are at the device's end (versions 1.0 and 0.90).
func (d disk) oldRAID() (Content, error) {
	for _, off := range []int64{(d.size/512 - 16) &^ 7 * 512, d.size&^(64<<10-1) - 64<<10} {
		if off <= 0 || off+4 > d.size {
			continue
		}
		b, err := d.read(off, 4)
		if err != nil {
			return Unknown, err
		}
		if bytes.Equal(b, []byte("\xfc\x4e\x2b\xa9")) {
			return RAID, nil
		}
	}
	return Unknown, nil
}

// What is recognised and not read, and what to do instead.
var refusals = map[Content]string{
	LVM2:      "an LVM2 physical volume: put the file system onto a partition of its own",
	LUKS:      "encrypted with LUKS: only the guest can read it; encrypt the image on the host instead",
	BitLocker: "encrypted with BitLocker: only the guest can read it",
	RAID:      "a member of a Linux RAID: give the guest one disk, and mirror it on the host",
	Bcache:    "a bcache device: cache on the host instead",
	Btrfs:     "btrfs: ext4 is read",
	XFS:       "XFS: ext4 is read",
	F2FS:      "F2FS: ext4 is read",
	ZFS:       "ZFS: ext4 is read",
	NTFS:      "NTFS: ext4 and FAT are read",
	ExFAT:     "exFAT: ext4 and FAT are read",
	EROFS:     "EROFS: a read-only image is checked by its hash",
	SquashFS:  "SquashFS: a read-only image is checked by its hash",
	ISO9660:   "ISO 9660: a read-only image is checked by its hash",
	Swap:      "swap: it holds no files",
	Unknown:   "nothing that is known: make a file system on it, or leave it out",
}

// Refusal says, as an [ErrRefused], what this is and what to do instead; nil: it is read.
func (c Content) Refusal() error {
	if word, ok := refusals[c]; ok {
		return fmt.Errorf("%w: it is %s", ErrRefused, word)
	}
	return nil
}

// String is the content's name.
func (c Content) String() string {
	if c == Unknown {
		return "unknown"
	}
	return string(c)
}
