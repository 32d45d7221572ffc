// Package kernel finds a running Linux kernel in a guest's memory: where it lies, and where the guest sees it, which
// the kernel chooses anew at each boot, separately (KASLR).
//
// What is looked for is what the kernel's own image says is there. The guest may imitate it: a place counts only if
// the page tables that belong to it map it, and lead back to the same words. So what is found is a kernel of this
// image in tables of its own; that it is the one which runs is the guest's word.
package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"redoubt.dev/redoubt/introspect/layout"
	"redoubt.dev/redoubt/introspect/paging"
)

// A Kernel is one that was found.
type Kernel struct {
	*layout.Layout
	Space    paging.Space // the kernel's own tables
	Physical uint64       // where _text lies
	Offset   uint64       // by how much addresses are above those that it was linked for
	// Anew has memory read anew that was kept, if it is; nil: it never is. What a running guest has put into a page since it
	// was read is not there before.
	Anew func()

	number [8]byte // room for one that is read: what is read through interfaces would be allocated each time
}

// maxAnew is how often one list may have memory read anew.
const maxAnew = 16

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
)

// Find looks for the kernel of a layout in a guest's physical memory up to an address.
func Find(memory io.ReaderAt, size uint64, l *layout.Layout) (*Kernel, error) {
	var places [3]uint64
	for i, n := range []string{"_text", "linux_banner", "init_top_pgt"} {
		var err error
		if places[i], err = l.Symbol(n); err != nil {
			return nil, err
		}
	}
	text, banner, root := places[0], places[1], places[2]
	want := l.Banner
	got := make([]byte, len(want))
	for at := uint64(firstPlace); at < size; at += alignment {
		if paging.Read(memory, got, at+banner-text) != nil || !bytes.Equal(got, want) {
			continue
		}
		k := &Kernel{Layout: l, Physical: at, Space: paging.Space{Memory: memory, Root: at + root - text, Levels: 4}}
		if l5, err := l.Symbol("__pgtable_l5_enabled"); err == nil {
			var b [4]byte
			if paging.Read(memory, b[:], at+l5-text) == nil && binary.LittleEndian.Uint32(b[:]) != 0 {
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
	a, err := k.Symbol(name)
	if err != nil {
		return 0, err
	}
	return a + k.Offset, nil
}

// ReadAt reads by the guest's virtual addresses, see [paging.Space].
func (k *Kernel) ReadAt(p []byte, off int64) (int, error) { return k.Space.ReadAt(p, off) }

// Word reads 8 bytes, such as a pointer.
func (k *Kernel) Word(at uint64) (uint64, error) {
	k.number = [8]byte{}
	_, err := k.ReadAt(k.number[:], int64(at))
	return binary.LittleEndian.Uint64(k.number[:]), err
}

// Half reads 4 bytes, such as an int.
func (k *Kernel) Half(at uint64) (uint32, error) {
	b := k.number[:4]
	clear(b)
	_, err := k.ReadAt(b, int64(at))
	return binary.LittleEndian.Uint32(b), err
}

// Text reads a text that ends with a zero within size bytes. What does not belong to it may be on a page that is not
// there.
func (k *Kernel) Text(at, size uint64) (string, error) {
	b := make([]byte, size)
	n, err := k.ReadAt(b, int64(at))
	end := bytes.IndexByte(b[:n], 0)
	switch {
	case end >= 0:
		return string(b[:end]), nil
	case err != nil:
		return "", err
	}
	return "", fmt.Errorf("%#x: a text without an end in %d bytes", at, size)
}

// Items follows a list (struct list_head) from its head: each gets the address of every member's link, in the list's order.
// A list of more than most members, or one that leads back into itself, is an error. A member that is not as it should be is read
// anew once.
func (k *Kernel) Items(head uint64, most int, each func(link uint64) error) error {
	next, err := k.Word(head)
	// A member that was passed, renewed at each power of two: a list that leads back comes to it again (Brent).
	passed, renew, anew := head, 1, 0
	for n := 0; err == nil && next != head; n++ {
		switch {
		case n == most:
			return fmt.Errorf("more than %d members", most)
		case n > 0 && next == passed:
			return fmt.Errorf("member %d, at %#x: it leads back to itself", n, next)
		case n == renew:
			passed, renew = next, 2*renew
		case n == 0:
			passed = next
		}
		at := next
		err = each(at)
		if err != nil && k.Anew != nil && anew < maxAnew {
			anew++
			k.Anew()
			err = each(at)
		}
		if err == nil {
			next, err = k.Word(at)
		}
		if err != nil {
			return fmt.Errorf("member %d, at %#x: %w", n, at, err)
		}
	}
	return err
}
