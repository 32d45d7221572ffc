package partition

import (
	"encoding/binary"
	"fmt"
	"slices"
)

const (
	mbrEntries = 446
	maxLogical = 100 // as Linux
)

// An mbrEntry is one of the four in an MBR, or of the two in that of a logical partition.
type mbrEntry struct {
	index        int
	kind         byte
	first, count uint32 // sectors
}

func protective(e mbrEntry) bool { return e.kind == 0xee && e.first == 1 }

func (e mbrEntry) extended() bool { return slices.Contains([]byte{0x05, 0x0f, 0x85}, e.kind) }

// parseMBR reads the entries of a sector that are not empty; false: it is no MBR, such as a file system's boot sector.
func parseMBR(b []byte) (all []mbrEntry, ok bool) {
	if b[510] != 0x55 || b[511] != 0xaa {
		return nil, false
	}
	for i := range 4 {
		e := b[mbrEntries+16*i:][:16]
		if e[0] != 0 && e[0] != 0x80 {
			return nil, false
		}
		v := mbrEntry{i, e[4], binary.LittleEndian.Uint32(e[8:]), binary.LittleEndian.Uint32(e[12:])}
		if v.count != 0 {
			all = append(all, v)
		}
	}
	return all, true
}

func (d disk) readMBR(t *Table, entries []mbrEntry) error {
	t.Scheme = MBR
	var extended *mbrEntry
	for _, e := range entries {
		if !e.extended() {
			if err := t.add(d, e.index+1, uint64(e.first), uint64(e.count), fmt.Sprintf("%02x", e.kind), ""); err != nil {
				return err
			}
			continue
		}
		if extended != nil {
			return at(mbrEntries, ErrCorrupt, "MBR: two extended partitions")
		}
		extended = &e
	}
	if extended == nil {
		return nil
	}
	primary := slices.Clone(t.Partitions)
	// No partition but the logical ones may lie in the extended one.
	if err := t.add(d, extended.index+1, uint64(extended.first), uint64(extended.count), "", ""); err != nil {
		return err
	}
	if err := t.checkOverlaps(); err != nil {
		return err
	}
	t.Partitions = primary
	return d.readLogical(t, *extended)
}

// readLogical follows the chain of logical partitions: each has an MBR of its own before it, whose first entry is
// the partition, counted from there, and whose second leads to the next, counted from the extended partition.
func (d disk) readLogical(t *Table, extended mbrEntry) error {
	end := uint64(extended.first) + uint64(extended.count)
	here := uint64(extended.first)
	for number := 5; ; {
		off := int64(here) * t.SectorSize
		b, err := d.read(off, 512)
		if err != nil {
			return err
		}
		entries, ok := parseMBR(b)
		if !ok {
			return at(off, ErrCorrupt, "MBR: no table of a logical partition")
		}
		next := uint64(0)
		for _, e := range entries {
			first := here + uint64(e.first)
			switch {
			case e.extended() && next == 0:
				next = uint64(extended.first) + uint64(e.first)
			case e.extended() || number > maxLogical+5:
				return at(off, ErrCorrupt, "MBR: chain of logical partitions")
			case first <= here || first >= end || uint64(e.count) > end-first:
				return at(off, ErrCorrupt, "partition %d: outside of the extended one", number)
			default:
				if err := t.add(d, number, first, uint64(e.count), fmt.Sprintf("%02x", e.kind), ""); err != nil {
					return err
				}
				number++
			}
		}
		if next == 0 {
			return nil
		}
		if next <= here || next >= end { // Linux would follow it back; whoever made it wants a loop
			return at(off, ErrCorrupt, "MBR: chain of logical partitions leads from sector %d to %d", here, next)
		}
		here = next
	}
}
