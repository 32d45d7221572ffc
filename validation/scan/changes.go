package scan

import (
	"fmt"
	"iter"
	"math"
	"math/bits"

	"redoubt.dev/redoubt/validation/ext4"
)

// Changes are the parts of a disk that may have changed since the last scan: a bit too many costs time, a bit too few hides
// a change.
type Changes struct {
	Granule int64    // bytes, a power of two, at least 4096
	Bits    []uint64 // bit i, the lowest of a word first: bytes [i*Granule, (i+1)*Granule)
}

// check reports whether the changes are of a disk of size bytes.
func (c *Changes) check(size int64) error {
	if c.Granule < 4096 || c.Granule&(c.Granule-1) != 0 {
		return fmt.Errorf("changes: granules of %d bytes", c.Granule)
	}
	if granules := (size-1)/c.Granule + 1; int64(len(c.Bits)) < (granules+63)/64 {
		return fmt.Errorf("changes: %d words of bits for %d granules of %d bytes", len(c.Bits), granules, c.Granule)
	}
	return nil
}

// A changed is the changes of one volume. Whether any byte of a range may have changed takes the same short time for
// every length: a hostile file system may have millions of long ranges.
type changed struct {
	offset int64 // of the volume on the disk
	shift  uint
	bits   []uint64
	before []uint32 // how many bits are set before each word; as many granules as do not fit are none of any disk's
}

// newChanged adds to the changes of a disk those of a volume at offset whose contents come from its journal.
func newChanged(c *Changes, offset int64, replayed iter.Seq[ext4.Range]) *changed {
	s := &changed{offset: offset, shift: uint(bits.TrailingZeros64(uint64(c.Granule)))}
	s.bits = append(s.bits, c.Bits...)
	for r := range replayed {
		for g := s.granule(r.Offset); g <= s.granule(r.Offset+r.Length-1) && g/64 < int64(len(s.bits)); g++ {
			s.bits[g/64] |= 1 << (g % 64)
		}
	}
	s.before = make([]uint32, len(s.bits)+1)
	for i, w := range s.bits {
		s.before[i+1] = s.before[i] + uint32(bits.OnesCount64(w))
	}
	return s
}

func (s *changed) granule(off int64) int64 { return (s.offset + off) >> s.shift }

// any reports whether a byte of the volume's range may have changed; what is not on the disk may have.
func (s *changed) any(r ext4.Range) bool {
	if r.Length <= 0 || r.Offset < 0 || r.Offset > math.MaxInt64-s.offset-r.Length {
		return true
	}
	first, last := s.granule(r.Offset), s.granule(r.Offset+r.Length-1)
	if last/64 >= int64(len(s.bits)) {
		return true
	}
	if first == last {
		return s.bits[first/64]>>(first%64)&1 != 0
	}
	return s.upTo(last+1) > s.upTo(first)
}

// upTo is how many granules before one may have changed.
func (s *changed) upTo(g int64) uint32 {
	n := s.before[g/64]
	if r := uint(g % 64); r != 0 {
		n += uint32(bits.OnesCount64(s.bits[g/64] << (64 - r)))
	}
	return n
}
