package partition

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode/utf16"
)

const (
	gptSignature = "EFI PART"
	gptHeader    = 92      // bytes of it that are defined
	gptEntry     = 128     // bytes of an entry, or a power of two of them
	gptMost      = 1 << 20 // bytes of all entries
)

// readGPT reads a GPT (UEFI 2.10 §5.3): its first copy or, if that is damaged, its second, at the disk's end.
func (d disk) readGPT(t *Table, o Options) error {
	t.Scheme = GPT
	sizes := []int64{512, 4096}
	if o.SectorSize != 0 {
		sizes = []int64{o.SectorSize}
	}
	var damage error
	for _, place := range []func(sector int64) int64{
		func(int64) int64 { return 1 },
		func(sector int64) int64 { return d.size/sector - 1 },
	} {
		for _, sector := range sizes {
			t.SectorSize, t.Partitions = sector, nil
			err := d.readCopy(t, place(sector))
			if err == nil {
				t.Damage = damage
				return nil
			}
			if damage == nil || errors.Is(damage, errNoGPT) {
				damage = err
			}
		}
	}
	return damage
}

var errNoGPT = fmt.Errorf("%w: no GPT where the protective MBR says there is one", ErrCorrupt)

func (d disk) readCopy(t *Table, lba int64) error {
	off := lba * t.SectorSize
	h, err := d.read(off, int(t.SectorSize))
	if err != nil {
		return err
	}
	if string(h[:8]) != gptSignature {
		return at(off, errNoGPT, "GPT")
	}
	le := binary.LittleEndian
	size := le.Uint32(h[12:])
	if size < gptHeader || int64(size) > t.SectorSize {
		return at(off+12, ErrCorrupt, "GPT: header of %d bytes", size)
	}
	want := le.Uint32(h[16:])
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:size]) != want {
		return at(off+16, ErrCorrupt, "GPT: the header's checksum is wrong")
	}
	first, last := le.Uint64(h[40:]), le.Uint64(h[48:])
	count, entry := le.Uint32(h[80:]), le.Uint32(h[84:])
	switch {
	case le.Uint64(h[24:]) != uint64(lba):
		return at(off+24, ErrCorrupt, "GPT: header for sector %d in sector %d", le.Uint64(h[24:]), lba)
	case first > last || last >= uint64(d.size/t.SectorSize):
		return at(off+40, ErrCorrupt, "GPT: sectors %d to %d of %d are to be used", first, last, d.size/t.SectorSize)
	case entry < gptEntry || entry&(entry-1) != 0 || uint64(entry)*uint64(count) > gptMost:
		return at(off+80, ErrCorrupt, "GPT: %d entries of %d bytes", count, entry)
	case le.Uint64(h[72:]) >= uint64(d.size/t.SectorSize):
		return at(off+72, ErrCorrupt, "GPT: entries at sector %d", le.Uint64(h[72:]))
	}
	place := int64(le.Uint64(h[72:])) * t.SectorSize
	all, err := d.read(place, int(entry*count))
	if err != nil {
		return err
	}
	if crc32.ChecksumIEEE(all) != le.Uint32(h[88:]) {
		return at(place, ErrCorrupt, "GPT: the entries' checksum is wrong")
	}
	for i := range int(count) {
		if err := d.gptEntry(t, i+1, all[i*int(entry):], first, last); err != nil {
			return err
		}
	}
	return nil
}

// gptEntry adds the partition of an entry, if there is one (UEFI 2.10 §5.3.3).
func (d disk) gptEntry(t *Table, number int, e []byte, first, last uint64) error {
	le := binary.LittleEndian
	kind := guid(e[:16])
	if kind == unusedGUID {
		return nil
	}
	from, to := le.Uint64(e[32:]), le.Uint64(e[40:])
	if from < first || to > last || from > to {
		return at(0, ErrCorrupt, "partition %d: sectors %d to %d, of %d to %d", number, from, to, first, last)
	}
	return t.add(d, number, from, to-from+1, kind, gptName(e[56:gptEntry]))
}

const unusedGUID = "00000000-0000-0000-0000-000000000000"

// guid is a GUID in its usual form (UEFI 2.10 Appendix A).
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

func gptName(b []byte) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		u := binary.LittleEndian.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return strings.ToValidUTF8(string(utf16.Decode(units)), "?")
}
