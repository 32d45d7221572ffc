package disk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
)

// A file that is read may be damaged, and bbolt, which maps it and believes what it finds,
// answers damage with panics, faults and reads beyond its memory. So the contents are read by
// what follows, which knows of bbolt's format 2 as much as it takes to find all records and
// checks each step. Offsets are from the start of the file, numbers little-endian.
//
//	page     id u64, flags u16, elements u16, further pages u32, then the elements
//	root     magic u32, version u32, page size u32, flags u32, page of the top bucket u64,
//	         sequence u64, freelist u64, pages in use u64, transaction u64, FNV-1a of these
//	leaf     flags u32 (1: the value is a bucket), position u32, key size u32, value size u32
//	branch   position u32, key size u32, page u64
//	bucket   page u64 (0: its one page follows within the value), sequence u64
const (
	pageHeader = 16
	element    = 16
	rootSize   = 64
	boltMagic  = 0xED0CDAED
	boltFormat = 2
	flagBranch = 1
	flagLeaf   = 2
	flagBucket = 1
	maxDepth   = 32
)

type parser struct {
	b        []byte
	pageSize uint64
	pages    uint64 // in use
	seen     map[uint64]bool
}

// damage is an error at an offset.
func damage(at uint64, format string, args ...any) error {
	return fmt.Errorf("offset %d: %s", at, fmt.Sprintf(format, args...))
}

// parse calls yield with each record of each bucket, in order. Both roots must be whole: bbolt
// would take the older one without a word, but no process's death damages one.
func parse(b []byte, pageSize int, yield func(bucket string, key, value []byte) error) error {
	p := &parser{b: b, pageSize: uint64(pageSize), seen: map[uint64]bool{0: true, 1: true}}
	var top, newest uint64
	for i := range uint64(2) {
		at := i*p.pageSize + pageHeader
		if at+rootSize > uint64(len(b)) {
			return damage(at, "the file ends before this root, after %d bytes", len(b))
		}
		m := b[at : at+rootSize]
		sum := fnv.New64a()
		_, _ = sum.Write(m[:56])
		u32, u64 := binary.LittleEndian.Uint32, binary.LittleEndian.Uint64
		switch {
		case u32(m) != boltMagic || u64(m[56:]) != sum.Sum64():
			return damage(at, "no whole root")
		case u32(m[4:]) != boltFormat || uint64(u32(m[8:])) != p.pageSize:
			return damage(at, "format %d with pages of %d bytes", u32(m[4:]), u32(m[8:]))
		case u64(m[40:]) > uint64(len(b))/p.pageSize:
			return damage(at, "%d pages in use, the file has %d bytes", u64(m[40:]), len(b))
		}
		if tx := u64(m[48:]); i == 0 || tx > newest {
			newest, top, p.pages = tx, u64(m[16:]), u64(m[40:])
		}
	}
	return p.bucket(top, maxDepth, func(at uint64, flags uint32, key, value []byte) error {
		if flags != flagBucket {
			return damage(at, "a record outside the buckets")
		}
		name := string(key)
		leaf := func(at uint64, flags uint32, key, value []byte) error {
			if flags != 0 {
				return damage(at, "a bucket in %q", name)
			}
			return yield(name, key, value)
		}
		if len(value) < 16 {
			return damage(at, "bucket %q of %d bytes", name, len(value))
		}
		if root := binary.LittleEndian.Uint64(value); root != 0 {
			return p.bucket(root, maxDepth, leaf)
		}
		var last []byte
		return p.page(value[16:], at, 0, &last, leaf)
	})
}

type visit func(at uint64, flags uint32, key, value []byte) error

// bucket walks the pages beneath id.
func (p *parser) bucket(id uint64, depth int, f visit) error {
	var last []byte
	return p.tree(id, depth, &last, f)
}

func (p *parser) tree(id uint64, depth int, last *[]byte, f visit) error {
	at := id * p.pageSize
	if id >= p.pages {
		return fmt.Errorf("something leads to page %d, %d are in use", id, p.pages)
	}
	further := uint64(binary.LittleEndian.Uint32(p.b[at+12:]))
	if binary.LittleEndian.Uint64(p.b[at:]) != id || further >= p.pages-id {
		return damage(at, "a page that says it is another, or %d too long", further)
	}
	for i := id; i <= id+further; i++ {
		if p.seen[i] {
			return damage(at, "page %d is used twice", i)
		}
		p.seen[i] = true
	}
	b := p.b[at : at+(1+further)*p.pageSize]
	if depth == 0 {
		return damage(at, "pages nested too deep")
	}
	return p.page(b, at, depth, last, f)
}

// page visits the elements of one page, which b holds and which lies at the offset at. With
// depth 0 it may have no pages beneath it.
func (p *parser) page(b []byte, at uint64, depth int, last *[]byte, f visit) error {
	if len(b) < pageHeader {
		return damage(at, "a page of %d bytes", len(b))
	}
	flags, n := binary.LittleEndian.Uint16(b[8:]), int(binary.LittleEndian.Uint16(b[10:]))
	if flags != flagLeaf && (flags != flagBranch || depth == 0) {
		return damage(at+8, "page flags %#x", flags)
	}
	if len(b) < pageHeader+n*element {
		return damage(at+10, "%d elements in %d bytes", n, len(b))
	}
	for i := range n {
		off := uint64(pageHeader + i*element)
		e := b[off : off+element]
		u32 := binary.LittleEndian.Uint32
		if flags == flagBranch {
			if _, err := cut(b, at, off, u32(e), u32(e[4:]), 0); err != nil {
				return err
			}
			if err := p.tree(binary.LittleEndian.Uint64(e[8:]), depth-1, last, f); err != nil {
				return err
			}
			continue
		}
		kv, err := cut(b, at, off, u32(e[4:]), u32(e[8:]), u32(e[12:]))
		if err != nil {
			return err
		}
		key, value := kv[:u32(e[8:])], kv[u32(e[8:]):]
		if *last != nil && bytes.Compare(key, *last) <= 0 {
			return damage(at+off, "%q comes after %q", key, *last)
		}
		*last = key
		if err := f(at+off, u32(e), key, value); err != nil {
			return err
		}
	}
	return nil
}

// cut returns key and value of an element at off of a page.
func cut(page []byte, at, off uint64, pos, key, value uint32) ([]byte, error) {
	from := off + uint64(pos)
	to := from + uint64(key) + uint64(value)
	if to > uint64(len(page)) {
		return nil, damage(at+off, "key and value end %d bytes behind the page", to-uint64(len(page)))
	}
	return page[from:to], nil
}
