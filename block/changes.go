package block

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// What is shared here between processes lies in sealed memory of the Builder's: BlkBack writes it, so that the next BlkBack
// goes on with what the last one left, however that ended; inspectors read it. Whoever reads it checks it: it may have been
// written by a process that a guest took over. Numbers are in the processor's byte order, words of eight bytes.

// maxMap bounds one map of changes, in bytes: a disk of more than 128 GiB has larger granules than 4 KiB.
const maxMap = 4 << 20

// Words of the header of a map of changes. Each of the two maps has a bit for each of its pages that was ever written, so
// that what is done while a guest's disk is held takes as long as there are changes, whatever the disk's size.
const (
	changesMagic   = 0x31474e4843544452 // "RDTCHNG1"
	wordMagic      = 0
	wordSize       = 1 // of the disk, in bytes
	wordGranule    = 2 // in bytes
	wordCurrent    = 3 // which map takes changes, 0 or 1
	wordTouched    = 8 // 16 words for each map
	touchedWords   = maxMap / pageSize / 64
	pageSize       = 4096
	wordsPerPage   = pageSize / 8
	headerWords    = wordsPerPage
	granulesInPage = pageSize * 8
)

// ErrChanges says that memory is no map of the changes of this disk.
var ErrChanges = errors.New("map of changes")

// Changes says which parts of a disk changed since when: two maps, of which one takes changes and the other is what a
// validation looks at. A change is in the map before it is on the disk. [Changes.Mark] may be called by several goroutines,
// [Changes.Freeze] while nobody else does anything.
type Changes struct {
	mem     []byte
	words   []uint64
	size    int64
	granule int64
	words1  int64 // of one map, in whole pages
}

// granuleOf is the unit of a disk's map, in bytes.
func granuleOf(size int64) int64 {
	granule := int64(OverlayBlock)
	for (size+granule-1)/granule > maxMap*8 {
		granule *= 2
	}
	return granule
}

func mapWords(size int64) int64 {
	granules := (size + granuleOf(size) - 1) / granuleOf(size)
	return (granules + granulesInPage - 1) / granulesInPage * wordsPerPage
}

// ChangesSize is how much memory the map of a disk of size bytes takes, in bytes. It is used only where the disk changes.
func ChangesSize(size int64) int64 { return 8 * (headerWords + 2*mapWords(size)) }

// OpenChanges maps the memory of f, which stays the caller's, for a disk of size bytes. Memory of zeros is one of a disk
// that never changed.
func OpenChanges(f *os.File, size int64) (*Changes, error) {
	c := &Changes{size: size, granule: granuleOf(size), words1: mapWords(size)}
	if err := checkSize(size); err != nil {
		return nil, fmt.Errorf("%w: disk: %w", ErrChanges, err)
	}
	mem, err := mapShared(f, ChangesSize(size), true)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrChanges, err)
	}
	c.mem, c.words = mem, wordsOf(mem)
	if c.words[wordMagic] == 0 {
		c.words[wordSize], c.words[wordGranule] = uint64(c.size), uint64(c.granule)
		atomic.StoreUint64(&c.words[wordMagic], changesMagic)
	}
	if err := c.check(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Changes) check() error {
	for _, w := range []struct {
		what string
		at   int
		want uint64
	}{{"magic", wordMagic, changesMagic}, {"size", wordSize, uint64(c.size)}, {"granule", wordGranule, uint64(c.granule)}} {
		if v := c.words[w.at]; v != w.want {
			return fmt.Errorf("%w: %s %#x at offset %d, not %#x", ErrChanges, w.what, v, 8*w.at, w.want)
		}
	}
	if v := c.words[wordCurrent]; v > 1 {
		return fmt.Errorf("%w: map %#x at offset %d", ErrChanges, v, 8*wordCurrent)
	}
	return nil
}

// Close gives the mapping back; the memory stays.
func (c *Changes) Close() error { return unix.Munmap(c.mem) }

func (c *Changes) bits(which uint64) []uint64 {
	return c.words[headerWords+int64(which)*c.words1:][:c.words1]
}

func (c *Changes) touched(which uint64) []uint64 {
	return c.words[wordTouched+which*touchedWords:][:touchedWords]
}

// Mark notes that n bytes at off are about to change; both are within the disk.
func (c *Changes) Mark(off, n int64) {
	if n <= 0 {
		return
	}
	which := atomic.LoadUint64(&c.words[wordCurrent]) & 1
	bits, touched := c.bits(which), c.touched(which)
	from, to := off/c.granule, (off+n-1)/c.granule+1
	// The page's bit first: a process may be killed between the two.
	for page := from / granulesInPage; page <= (to-1)/granulesInPage; page++ {
		orWord(&touched[page/64], 1<<(page%64))
	}
	for b := from; b < to; {
		last := min(to, (b/64+1)*64)
		orWord(&bits[b/64], ^uint64(0)>>(64-(last-b))<<(b%64))
		b = last
	}
}

// orWord sets bits, without writing where they are set already.
func orWord(w *uint64, mask uint64) {
	if atomic.LoadUint64(w)&mask != mask {
		atomic.OrUint64(w, mask)
	}
}

// Freeze ends the map that took changes and begins another. validated says that what the last Freeze ended was looked at;
// if it was not, its changes are added to those that this one ends. A process may be killed at any point of it: if then the
// next Freeze is told that nothing was validated, no change is lost.
func (c *Changes) Freeze(validated bool) {
	current := c.words[wordCurrent] & 1
	old := current ^ 1
	c.eachPage(old, func(page int64) {
		bits := c.bits(old)[page*wordsPerPage:][:wordsPerPage]
		if !validated {
			orWord(&c.touched(current)[page/64], 1<<(page%64))
			for i, into := 0, c.bits(current)[page*wordsPerPage:][:wordsPerPage]; i < len(bits); i++ {
				if bits[i] != 0 {
					orWord(&into[i], bits[i])
				}
			}
		}
	})
	// Only now, when all is in the other one, may it go.
	c.eachPage(old, func(page int64) {
		clear(c.bits(old)[page*wordsPerPage:][:wordsPerPage])
		c.touched(old)[page/64] &^= 1 << (page % 64)
	})
	atomic.StoreUint64(&c.words[wordCurrent], old)
}

func (c *Changes) eachPage(which uint64, do func(page int64)) {
	for page := range c.words1 / wordsPerPage {
		if c.touched(which)[page/64]&(1<<(page%64)) != 0 {
			do(page)
		}
	}
}

// Frozen is a copy of the map that the last Freeze ended, read from memory that somebody else writes: bit i says whether the
// bytes from i*granule on may have changed.
func Frozen(f *os.File, size int64) (granule int64, bits []uint64, err error) {
	if err := checkSize(size); err != nil {
		return 0, nil, fmt.Errorf("%w: disk: %w", ErrChanges, err)
	}
	header := make([]byte, pageSize)
	if _, err := f.ReadAt(header, 0); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", ErrChanges, err)
	}
	c := &Changes{size: size, granule: granuleOf(size), words1: mapWords(size), words: make([]uint64, headerWords)}
	for i := range c.words {
		c.words[i] = binary.NativeEndian.Uint64(header[8*i:])
	}
	if err := c.check(); err != nil {
		return 0, nil, err
	}
	which := c.words[wordCurrent] ^ 1
	bits = make([]uint64, (size+c.granule*64-1)/(c.granule*64))
	buf := make([]byte, pageSize)
	c.eachPage(which, func(page int64) {
		if err != nil {
			return
		}
		if _, err = f.ReadAt(buf, 8*(headerWords+int64(which)*c.words1)+page*pageSize); err != nil {
			err = fmt.Errorf("%w: %w", ErrChanges, err)
			return
		}
		for i := range wordsPerPage {
			if at := page*wordsPerPage + int64(i); at < int64(len(bits)) {
				bits[at] = binary.NativeEndian.Uint64(buf[8*i:])
			}
		}
	})
	return c.granule, bits, err
}
