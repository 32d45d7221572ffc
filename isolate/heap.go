package isolate

import (
	"encoding/binary"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/types"
)

// heap finds what an address of the kernel's heap belongs to: which cache's object.
type heap struct {
	places struct{ caches, pages uint64 } // slab_caches; vmemmap_base, which holds where the structures of pages begin
	owner  types.Field                    // of struct slab: its cache
	list   types.Field                    // of struct kmem_cache, and so on
	name   types.Field
	size   types.Field
	page   uint64 // size of struct page

	caches map[uint64]cache // by where their structures are
}

type cache struct {
	name string
	size uint64 // from object to object
}

const (
	maxCaches = 1 << 12
	slabLink  = 8 // of struct page: where a page that is not the first of its slab says which is, plus 1
)

func (h *heap) find(t *types.Types, symbol func(string) uint64) error {
	var err error
	field := func(structure, member string) types.Field {
		f, ferr := t.Field(structure, member)
		if ferr != nil {
			err = errors.Join(err, fmt.Errorf("struct %s: %s: %w", structure, member, ferr))
		}
		return f
	}
	h.owner = field("slab", "slab_cache")
	h.list, h.name, h.size = field("kmem_cache", "list.next"), field("kmem_cache", "name"), field("kmem_cache", "size")
	size, serr := t.Size("page")
	h.page = size
	h.places.caches, h.places.pages = symbol("slab_caches"), symbol("vmemmap_base")
	return errors.Join(err, serr)
}

// slab names the object that a physical address of the heap is in: its cache, and how far from the object's start.
func (i *Isolation) slab(gpa uint64) (name string, off uint64, ok bool) {
	h := &i.kernel.heap
	pages := i.wordAt(h.places.pages)
	at := pages + gpa/pageSize*h.page
	head := at
	if link := i.wordAt(at + slabLink); link&1 != 0 {
		head = link - 1
	}
	if head < pages || (head-pages)%h.page != 0 || head > at {
		return "", 0, false
	}
	owner := i.wordAt(head + h.owner.Offset)
	c, known := h.caches[owner]
	if !known {
		i.readCaches()
		if c, known = h.caches[owner]; !known {
			return "", 0, false
		}
	}
	begin := (head - pages) / h.page * pageSize
	if c.size == 0 || gpa < begin {
		return "", 0, false
	}
	return c.name, (gpa - begin) % c.size, true
}

// readCaches lists the kernel's caches.
func (i *Isolation) readCaches() {
	h := &i.kernel.heap
	h.caches = map[uint64]cache{}
	head := h.places.caches
	for link := i.wordAt(head); link != head && link != 0 && len(h.caches) < maxCaches; link = i.wordAt(link) {
		at := link - h.list.Offset
		name, err := i.text256(i.wordAt(at + h.name.Offset))
		b, berr := i.bytes(at+h.size.Offset, 4)
		if err != nil || berr != nil {
			return
		}
		h.caches[at] = cache{name, uint64(binary.LittleEndian.Uint32(b))}
	}
}

// wordAt reads a word of the kernel's; 0 where there is none.
func (i *Isolation) wordAt(at uint64) uint64 {
	b, err := i.bytes(at, 8)
	if err != nil {
		return 0
	}
	return word(b)
}
