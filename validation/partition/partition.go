// Package partition finds what is on a disk: the partitions of a GPT or an MBR, or a bare file system, and for each what
// its first bytes say it holds.
//
// The disk may be a hostile guest's. Partitions that overlap or leave the disk are refused with the whole table, checksums
// are verified, and chains of logical partitions end. Where a table can be read in two ways it is read as the guest's
// Linux would (block/partitions: efi.c, msdos.c), save that a GPT whose first copy is damaged is read from its second. What
// is recognised and not read here (LVM, LUKS, RAID, other file systems) has a name and a mend: [Content.Refusal].
//
// It is a parser of its own because the one of go-diskfs believes what it reads: it allocates what the header asks for,
// takes partitions that overlap or leave the disk, and knows no logical ones.
//
// Source: UEFI 2.10 §5 (GPT, protective MBR); for MBR and logical partitions, Linux.
package partition

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Why a disk is not read.
var (
	// ErrNone says that there is neither a table nor anything else that is known.
	ErrNone = errors.New("no partition table and no file system that is known")
	// ErrCorrupt says that a table is damaged, or tells of partitions that cannot be.
	ErrCorrupt = errors.New("the partition table is damaged")
	// ErrAmbiguous says that the same bytes are a table and a file system.
	ErrAmbiguous = errors.New("both a partition table and a file system: wipe one of them (wipefs)")
	// ErrRefused says that something was recognised and is not read.
	ErrRefused = errors.New("not read")
)

func at(offset int64, kind error, format string, args ...any) error {
	return fmt.Errorf("%s (byte %d): %w", fmt.Sprintf(format, args...), offset, kind)
}

// Scheme is how a disk is divided.
type Scheme string

// Schemes.
const (
	GPT  Scheme = "gpt"
	MBR  Scheme = "mbr"
	Bare Scheme = "bare" // one file system, no table
)

// A Table is what a disk is divided into.
type Table struct {
	Scheme     Scheme
	SectorSize int64
	Partitions []Partition // by their numbers; of a bare disk the only one has number 0
	// Damage is why a GPT was read from its second copy.
	Damage error
}

// A Partition is a part of a disk.
type Partition struct {
	Number        int    // as Linux counts
	Offset, Bytes int64  // on the disk
	Type          string // a GPT's GUID, or an MBR's byte in hexadecimal
	Name          string // in a GPT
	Content       Content
}

// Find returns the partition of a number; of a bare disk it is 0, and 0 is also a table's only one.
func (t *Table) Find(number int) (*Partition, error) {
	if number == 0 && len(t.Partitions) == 1 {
		return &t.Partitions[0], nil
	}
	for i, p := range t.Partitions {
		if p.Number == number {
			return &t.Partitions[i], nil
		}
	}
	var all []int
	for _, p := range t.Partitions {
		all = append(all, p.Number)
	}
	if number == 0 {
		return nil, fmt.Errorf("which partition? there are %v", all)
	}
	return nil, fmt.Errorf("no partition %d: there are %v", number, all)
}

// Options say what a disk does not tell.
type Options struct {
	// SectorSize is 512 or 4096; 0: that at which a GPT is found, else 512.
	SectorSize int64
}

// A disk is what is read.
type disk struct {
	r    io.ReaderAt
	size int64
}

func (d disk) read(off int64, n int) ([]byte, error) {
	if off < 0 || int64(n) > d.size || off > d.size-int64(n) {
		return nil, at(off, ErrCorrupt, "%d bytes of a disk of %d", n, d.size)
	}
	b := make([]byte, n)
	if got, err := d.r.ReadAt(b, off); got < n {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read %d of %d bytes at byte %d: %w", got, n, off, err)
	}
	return b, nil
}

// Read finds what is on a disk of size bytes.
func Read(r io.ReaderAt, size int64, o Options) (*Table, error) {
	d := disk{r, size}
	if size < 512 {
		return nil, at(0, ErrNone, "disk of %d bytes", size)
	}
	whole, err := Identify(r, size)
	if err != nil {
		return nil, err
	}
	first, err := d.read(0, 512)
	if err != nil {
		return nil, err
	}
	entries, isMBR := parseMBR(first)
	t := &Table{SectorSize: cmp.Or(o.SectorSize, 512)}
	switch {
	case isMBR && slices.ContainsFunc(entries, protective):
		err = d.readGPT(t, o)
	case isMBR && len(entries) > 0:
		err = d.readMBR(t, entries)
	case whole == Unknown:
		return nil, at(0, ErrNone, "disk of %d bytes", size)
	default:
		t.Scheme = Bare
		t.Partitions = []Partition{{Bytes: size, Content: whole}}
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	if whole != Unknown && whole != ISO9660 { // that is made for both
		return nil, at(0, ErrAmbiguous, "%s and %s", t.Scheme, whole)
	}
	for i := range t.Partitions {
		p := &t.Partitions[i]
		if p.Content, err = Identify(io.NewSectionReader(r, p.Offset, p.Bytes), p.Bytes); err != nil {
			return nil, err
		}
	}
	return t, t.checkOverlaps()
}

// checkOverlaps refuses tables of which two partitions share bytes.
func (t *Table) checkOverlaps() error {
	sorted := slices.SortedFunc(slices.Values(t.Partitions), func(a, b Partition) int { return cmp.Compare(a.Offset, b.Offset) })
	for i := 1; i < len(sorted); i++ {
		if p, q := sorted[i-1], sorted[i]; p.Offset+p.Bytes > q.Offset {
			return at(q.Offset, ErrCorrupt, "partitions %d and %d overlap", p.Number, q.Number)
		}
	}
	return nil
}

// add adds a partition given in sectors, which must lie on the disk.
func (t *Table) add(d disk, number int, first, count uint64, kind, name string) error {
	sectors := uint64(d.size / t.SectorSize)
	if first == 0 || count == 0 || first >= sectors || count > sectors-first {
		return at(0, ErrCorrupt, "partition %d: %d sectors of %d bytes at sector %d, on a disk of %d", number, count, t.SectorSize, first, sectors)
	}
	t.Partitions = append(t.Partitions, Partition{
		Number: number, Offset: int64(first) * t.SectorSize, Bytes: int64(count) * t.SectorSize, Type: kind, Name: name,
	})
	return nil
}
