package memory

import (
	"io"

	"golang.org/x/sys/unix"
)

const (
	pageSize  = 4 << 10 // the guest's: its neighbours are often nobody's
	cacheSize = 4 << 10 // pages: 16 MiB, and lists of 10,000 members fit
)

// A Cache reads each page of memory once while it has room for it: what is read twice is the same. It is for one
// goroutine.
type Cache struct {
	memory io.ReaderAt
	pages  [cacheSize]page // each in the place its number says
	room   []byte          // for pages that were not used yet
}

// A page of memory that was read; data is nil where none was.
type page struct {
	at   uint64
	data []byte
}

// NewCache makes an empty one.
func NewCache(memory io.ReaderAt) *Cache {
	c := &Cache{memory: memory, room: make([]byte, cacheSize*pageSize)}
	// A fault for each page of it would take longer than all else: what is asked is often asked of a new process. Where the kernel does
	// not hear that, it takes longer.
	_ = unix.Madvise(c.room, unix.MADV_HUGEPAGE)
	return c
}

// ReadAt implements io.ReaderAt. A page that is not memory as a whole is read as it is, uncached.
func (c *Cache) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		at := uint64(off) + uint64(n)
		inside := at % pageSize
		part := b[n:][:min(uint64(len(b)-n), pageSize-inside)]
		p := c.page(at - inside)
		if p == nil {
			got, err := c.memory.ReadAt(part, int64(at))
			if n += got; got < len(part) {
				return n, err
			}
			continue
		}
		n += copy(part, p[inside:])
	}
	return n, nil
}

func (c *Cache) page(at uint64) []byte {
	p := &c.pages[at/pageSize%cacheSize]
	if p.data != nil && p.at == at {
		return p.data
	}
	to := p.data
	if to == nil {
		to = c.room[:pageSize:pageSize]
	}
	if n, _ := c.memory.ReadAt(to, int64(at)); n < pageSize {
		if p.data != nil { // what is there now is neither page
			p.at = ^uint64(0)
		}
		return nil
	}
	if p.data == nil {
		c.room = c.room[pageSize:]
	}
	*p = page{at, to}
	return to
}

// Forget has everything read anew.
func (c *Cache) Forget() {
	for n := range c.pages {
		c.pages[n].at = ^uint64(0)
	}
}
