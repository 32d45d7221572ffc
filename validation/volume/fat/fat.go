// Package fat reads FAT12, FAT16 and FAT32 file systems with long names from an [io.ReaderAt], without ever writing: the EFI
// system partition.
//
// The image may be a hostile guest's: places are checked before they are read, chains end, nothing is kept but one piece of
// the table, and errors name the byte. What is read is what Linux shows, in its code page 437 and with its long names; times,
// which have no zone there, are taken for UTC.
//
// It is a reader of our own because what validates a guest's disk must show what the guest's kernel shows: docs/DEPENDENCIES.md
// says where the known library does not.
//
// Source: Microsoft, FAT File System Specification (2004); where it leaves a choice, Linux fs/fat.
package fat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
)

// Why something is not read.
var (
	ErrNotFAT  = errors.New("not a FAT file system")
	ErrCorrupt = errors.New("damaged")
	// ErrEffort says that something would take more than a file system of this size may.
	ErrEffort = errors.New("takes more than a file system of this size may")
)

func at(offset int64, kind error, format string, args ...any) error {
	return fmt.Errorf("%s (byte %d): %w", fmt.Sprintf(format, args...), offset, kind)
}

// An FS is an open file system. Its methods may be called by several goroutines.
type FS struct {
	r           io.ReaderAt
	bits        int   // of an entry of the table: 12, 16 or 32
	cluster     int64 // bytes
	table       int64 // where it begins, and its length
	tableBytes  int64
	root        int64 // of FAT12 and FAT16
	rootBytes   int64
	data        int64  // where cluster 2 is
	clusters    uint32 // the first that there is not
	rootCluster uint32 // of FAT32
	label       string
	serial      uint32

	mu    sync.Mutex
	piece []byte // of the table, kept
	place int64
}

// Open opens the file system on a device of size bytes (§3).
func Open(r io.ReaderAt, size int64) (*FS, error) {
	b := make([]byte, 512)
	if size < int64(len(b)) {
		return nil, at(0, ErrNotFAT, "device of %d bytes", size)
	}
	if err := readFull(r, b, 0); err != nil {
		return nil, err
	}
	f := &FS{r: r, bits: 32}
	le := binary.LittleEndian
	sector, perCluster := int64(le.Uint16(b[11:])), int64(b[13])
	if b[510] != 0x55 || b[511] != 0xaa || !slices.Contains([]int64{512, 1024, 2048, 4096}, sector) || perCluster == 0 || perCluster&(perCluster-1) != 0 {
		return nil, at(0, ErrNotFAT, "boot sector")
	}
	f.cluster = sector * perCluster
	reserved, copies := int64(le.Uint16(b[14:])), int64(b[16])
	total, perTable := int64(le.Uint16(b[19:])), int64(le.Uint16(b[22:]))
	if total == 0 {
		total = int64(le.Uint32(b[32:]))
	}
	names := b[43:]
	f.serial = le.Uint32(b[39:])
	if wide := perTable == 0; wide {
		perTable, f.rootCluster = int64(le.Uint32(b[36:])), le.Uint32(b[44:])
		f.serial, names = le.Uint32(b[67:]), b[71:]
	} else {
		f.bits = 16
	}
	f.label = strings.TrimRight(string(names[:11]), " \x00")
	f.table, f.tableBytes = reserved*sector, perTable*sector
	f.root, f.rootBytes = f.table+copies*f.tableBytes, int64(le.Uint16(b[17:]))*32
	f.data = f.root + (f.rootBytes+sector-1)/sector*sector
	if reserved == 0 || copies == 0 || perTable == 0 || f.cluster > 256<<10 || total*sector > size || f.data >= total*sector {
		return nil, at(11, ErrCorrupt, "boot sector: %d sectors of %d bytes on a device of %d, contents from byte %d", total, sector, size, f.data)
	}
	return f, f.countClusters((total*sector - f.data) / f.cluster)
}

func (f *FS) countClusters(count int64) error {
	if f.bits != 32 && count < 4085 {
		f.bits = 12
	}
	f.clusters = uint32(min(count+2, f.tableBytes*8/int64(f.bits), 1<<28-16))
	if f.bits == 32 && (f.rootCluster < 2 || f.rootCluster >= f.clusters) {
		return at(44, ErrCorrupt, "boot sector: root directory in cluster %d of %d", f.rootCluster, f.clusters)
	}
	return nil
}

// Info is what a file system says of itself.
type Info struct {
	Label   string
	Serial  uint32
	Cluster int64 // bytes
	Bytes   int64
	Bits    int // of an entry of its table: 12, 16 or 32
}

// Info returns what the boot sector says.
func (f *FS) Info() Info {
	return Info{f.label, f.serial, f.cluster, f.data + int64(f.clusters-2)*f.cluster, f.bits}
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	if n, err := r.ReadAt(p, off); n < len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("read %d of %d bytes at byte %d: %w", n, len(p), off, err)
	}
	return nil
}

const pieceBytes = 48 << 10 // a multiple of 3: two entries of FAT12 take three bytes

// entryAt is where the table's entry for a cluster is, in the table.
func (f *FS) entryAt(cluster uint32) int64 { return int64(cluster) * int64(f.bits) / 8 }

// next is the cluster after one; 0: it is the last.
func (f *FS) next(cluster uint32) (uint32, error) {
	v, err := f.entry(cluster)
	if err != nil {
		return 0, err
	}
	// The last values mean an end (§4), the one before them a bad cluster.
	top := uint32(1)<<min(f.bits, 28) - 1
	switch {
	case v >= top-7:
		return 0, nil
	case v < 2 || v >= f.clusters:
		return 0, at(f.table+f.entryAt(cluster), ErrCorrupt, "cluster %d leads to %d of %d", cluster, v, f.clusters)
	}
	return v, nil
}

// entry reads the table's entry for a cluster.
func (f *FS) entry(cluster uint32) (uint32, error) {
	if cluster < 2 || cluster >= f.clusters {
		return 0, at(f.table, ErrCorrupt, "cluster %d of %d", cluster, f.clusters)
	}
	off := f.entryAt(cluster)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.piece == nil || off < f.place || off+4 > f.place+int64(len(f.piece)) && f.place+int64(len(f.piece)) < f.tableBytes {
		place := off / pieceBytes * pieceBytes
		piece := make([]byte, min(pieceBytes+4, f.tableBytes-place))
		if err := readFull(f.r, piece, f.table+place); err != nil {
			return 0, err
		}
		f.piece, f.place = piece, place
	}
	var b [4]byte
	copy(b[:], f.piece[off-f.place:])
	v := binary.LittleEndian.Uint32(b[:])
	switch f.bits {
	case 12:
		return v >> (cluster & 1 * 4) & 0xfff, nil
	case 16:
		return v & 0xffff, nil
	}
	return v & 0xfffffff, nil
}

// offset is where a cluster is.
func (f *FS) offset(cluster uint32) int64 { return f.data + int64(cluster-2)*f.cluster }
