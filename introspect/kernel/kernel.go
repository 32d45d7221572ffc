// Package kernel finds a running Linux kernel in a guest's memory: where it lies, and where the guest sees it, which
// the kernel chooses anew at each boot, separately (KASLR).
//
// What is looked for is what the kernel's own image says is there. The guest may imitate it: a place counts only if
// the page tables that belong to it map it, and lead back to the same words. So what is found is a kernel of this
// image in tables of its own; that it is the one which runs is the guest's word.
package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"redoubt.dev/redoubt/introspect/paging"
	"redoubt.dev/redoubt/introspect/symbols"
)

// A Kernel is one that was found.
type Kernel struct {
	Symbols  *symbols.Table
	Space    paging.Space // the kernel's own tables
	Physical uint64       // where _text lies
	Offset   uint64       // by how much addresses are above those that it was linked for
}

// ErrNotFound says that the memory holds no kernel of the image.
var ErrNotFound = errors.New("the guest's memory holds no kernel of this image")

// Of a kernel of x86-64.
const (
	firstVirtual = 0xffffffff80000000 // where it may be seen
	lastVirtual  = 0xffffffffbfffffff
	alignment    = 2 << 20
	firstPlace   = 2 << 20 // below it the kernel never runs

	// mostTables are read to find where it is seen: a page table for each 2 MiB of the range, and those above.
	mostTables = 512 + 8
	maxBanner  = 1 << 10
)

// Find looks for the kernel of an unpacked image, whose symbols are t, in a guest's physical memory up to an address.
func Find(memory io.ReaderAt, size uint64, image []byte, t *symbols.Table) (*Kernel, error) {
	places, err := locate(t, "_text", "linux_banner", "init_top_pgt")
	if err != nil {
		return nil, err
	}
	text, banner, root := places[0], places[1], places[2]
	want, err := content(image, banner)
	if err != nil {
		return nil, err
	}
	got := make([]byte, len(want))
	for at := uint64(firstPlace); at < size; at += alignment {
		if paging.Read(memory, got, at+banner-text) != nil || !bytes.Equal(got, want) {
			continue
		}
		k := &Kernel{Symbols: t, Physical: at, Space: paging.Space{Memory: memory, Root: at + root - text, Levels: 4}}
		if l5, ok := t.Lookup("__pgtable_l5_enabled"); ok {
			var b [4]byte
			if paging.Read(memory, b[:], at+l5.Address-text) == nil && binary.LittleEndian.Uint32(b[:]) != 0 {
				k.Space.Levels = 5
			}
		}
		if !k.see(text) {
			continue
		}
		if n, err := k.Space.ReadAt(got, int64(banner+k.Offset)); n == len(got) && err == nil && bytes.Equal(got, want) {
			return k, nil
		}
	}
	return nil, ErrNotFound
}

func locate(t *symbols.Table, names ...string) (all []uint64, err error) {
	for _, n := range names {
		s, ok := t.Lookup(n)
		if !ok {
			return nil, fmt.Errorf("the kernel's image has no symbol %s", n)
		}
		all = append(all, s.Address)
	}
	return all, nil
}

// content is the text, with the zero that ends it, at an address of the image.
func content(image []byte, address uint64) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, fmt.Errorf("the kernel's image: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD || address < p.Vaddr || address-p.Vaddr >= p.Filesz {
			continue
		}
		b := make([]byte, min(maxBanner, p.Filesz-(address-p.Vaddr)))
		n, _ := p.ReadAt(b, int64(address-p.Vaddr))
		if end := bytes.IndexByte(b[:n], 0); end > 0 {
			return b[:end+1], nil
		}
		break
	}
	return nil, fmt.Errorf("the kernel's image holds no text at %#x", address)
}

// see finds where the kernel's tables map its text.
func (k *Kernel) see(text uint64) bool {
	for m, err := range k.Space.Mappings(firstVirtual, lastVirtual, mostTables) {
		if err != nil {
			return false
		}
		if m.Executable && k.Physical >= m.Physical && k.Physical-m.Physical < m.Size {
			k.Offset = m.Virtual + (k.Physical - m.Physical) - text
			return k.Offset%alignment == 0
		}
	}
	return false
}

// Address is where the guest sees a symbol.
func (k *Kernel) Address(name string) (uint64, error) {
	all, err := locate(k.Symbols, name)
	if err != nil {
		return 0, err
	}
	return all[0] + k.Offset, nil
}

// ReadAt reads by the guest's virtual addresses, see [paging.Space].
func (k *Kernel) ReadAt(p []byte, off int64) (int, error) { return k.Space.ReadAt(p, off) }
