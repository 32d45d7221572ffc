package memory

import "io"

const (
	pageSize  = 16 << 10 // several of the guest's: what lies together is read together
	cacheSize = 1 << 10  // pages: 16 MiB, and lists of 10,000 members fit
)

// A Cache reads each page of memory once while it has room for it: what is read twice is the same. It is for one
// goroutine.
type Cache struct {
	memory io.ReaderAt
	pages  [cacheSize]*page // each in the place its number says
}

type page struct {
	at   uint64
	data [pageSize]byte
}

// NewCache makes an empty one.
func NewCache(memory io.ReaderAt) *Cache { return &Cache{memory: memory} }

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
		n += copy(part, p.data[inside:])
	}
	return n, nil
}

func (c *Cache) page(at uint64) *page {
	slot := &c.pages[at/pageSize%cacheSize]
	if p := *slot; p != nil && p.at == at {
		return p
	}
	p := &page{at: at}
	if n, _ := c.memory.ReadAt(p.data[:], int64(at)); n < pageSize {
		return nil
	}
	*slot = p
	return p
}

// Forget has everything read anew.
func (c *Cache) Forget() { clear(c.pages[:]) }
