package isolate

import (
	"encoding/binary"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/types"
)

// heap finds what an address of the kernel's heap belongs to: which cache's object.
type heap struct {
	places struct{ caches, pages, direct uint64 } // slab_caches; vmemmap_base and page_offset_base, which hold where the structures of pages begin, and the mapping of all memory
	owner  types.Field                            // of struct slab: its cache
	list   types.Field                            // of struct kmem_cache, and so on
	name   types.Field
	size   types.Field
	page   uint64      // size of struct page
	kind   types.Field // of struct page: page_type

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
	h.kind = field("page", "page_type")
	size, serr := t.Size("page")
	h.page = size
	h.places.caches, h.places.pages, h.places.direct = symbol("slab_caches"), symbol("vmemmap_base"), symbol("page_offset_base")
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

// pageAddress is where the kernel sees the page of a struct page.
func (i *Isolation) pageAddress(at uint64) uint64 {
	h := &i.kernel.heap
	return i.wordAt(h.places.direct) + (at-i.wordAt(h.places.pages))/h.page*pageSize
}

// isTable says whether a page is one of the kernel's own page tables. They may be any pages, and are noted nowhere: so all
// tables are looked through, which are some hundred.
func (i *Isolation) isTable(gpa uint64) bool {
	left := mostTables * 8
	var in func(table uint64, level int) bool
	in = func(table uint64, level int) bool {
		if table == gpa {
			return true
		}
		left--
		b, err := i.cfg.Memory.Slice(table, pageSize)
		if err != nil || level == 1 {
			return false
		}
		if left < 0 { // more than a kernel has: fail closed
			return true
		}
		const present, large, address = 1 << 0, 1 << 7, 0x000f_ffff_ffff_f000
		from := 0
		if level == 4 {
			from = pageSize / 2 // the kernel's half
		}
		for ; from < pageSize; from += 8 {
			e := word(b[from:])
			if e&present != 0 && (e&large == 0 || level == 4) && in(e&address, level-1) {
				return true
			}
		}
		return false
	}
	return in(i.kernel.space.Root&^(pageSize-1), 4)
}

// userTable says whether the kernel notes that a page is a page table: it does for those of processes.
func (i *Isolation) userTable(gpa uint64) bool {
	h := &i.kernel.heap
	b, err := i.bytes(i.wordAt(h.places.pages)+gpa/pageSize*h.page+h.kind.Offset, 4)
	if err != nil {
		return true // what cannot be judged
	}
	// A page that is mapped by no process has a kind: until 6.10 the bit of its kind is cleared of ones, from 6.12 its highest
	// byte is the kind's number, all others being zero. A page that is in none is all ones.
	const kinds, table = 0xf000_0000, 0x0000_0400
	return binary.LittleEndian.Uint32(b)&(kinds|table) == kinds
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
