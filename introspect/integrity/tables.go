// Package integrity says whether a running Linux kernel is still what its image is: its system-call table, its interrupt
// descriptor table and its text, in the guest's memory.
package integrity

import (
	"encoding/binary"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/image"
	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/symbols"
)

// A Hook is an entry of a table that leads elsewhere than it should.
type Hook struct {
	Entry  int    `json:"entry"`
	Target uint64 `json:"target"`
	Symbol string `json:"symbol,omitempty"` // where the target is, if it is in the kernel's image
	Want   string `json:"want"`
}

const (
	pointer    = 8
	maxSyscall = 1 << 10
)

// A Reader reads one kernel; what it should be is the image's.
type Reader struct {
	Kernel      *kernel.Kernel
	Image       *image.Image
	Symbols     *symbols.Table
	relocations *image.Relocations
}

// moved are the image's bytes as the kernel, which has moved itself, must have them.
func (r *Reader) moved(from, to uint64) ([]byte, error) {
	if r.relocations == nil {
		rel, err := r.Image.Relocations()
		if err != nil && r.Kernel.Offset != 0 {
			return nil, err
		}
		r.relocations = &rel
	}
	return r.Image.Moved(from, to, r.Kernel.Offset, *r.relocations)
}

// SymbolAt is NAME+0xOFFSET of an address as the guest sees it, "" outside the kernel's image.
func (r *Reader) SymbolAt(address uint64) string {
	linked := address - r.Kernel.Offset
	end, ok := r.Symbols.Lookup("_end")
	text, err := r.Kernel.Symbol("_text")
	if !ok || err != nil || linked < text || linked >= end.Address {
		return ""
	}
	s, ok := r.Symbols.At(linked)
	if !ok {
		return ""
	}
	if s.Address == linked {
		return s.Name
	}
	return fmt.Sprintf("%s+%#x", s.Name, linked-s.Address)
}

// A Table is one table's answer.
type Table struct {
	Entries int    `json:"entries"` // looked at
	Hooks   []Hook `json:"hooks"`
}

// SystemCalls holds the system-call table against the image's. The table's end is that of its symbol. From 6.9 on, and in older
// kernels with the mitigation of BHI, calls go by code (x64_sys_call), which is text; the table is there all the same.
func (r *Reader) SystemCalls() (t Table, err error) {
	t.Hooks = []Hook{}
	from, err := r.Kernel.Symbol("sys_call_table")
	if err != nil {
		return t, err
	}
	next, ok := r.Symbols.After(from)
	if !ok || next-from < pointer || next-from > maxSyscall*pointer {
		return t, fmt.Errorf("the kernel's image: sys_call_table from %#x to %#x", from, next)
	}
	to := from + (next-from)&^(pointer-1)
	want, err := r.moved(from, to)
	if err != nil {
		return t, err
	}
	got := make([]byte, len(want))
	if _, err := r.Kernel.ReadAt(got, int64(from+r.Kernel.Offset)); err != nil {
		return t, err
	}
	for i := 0; i < len(want); i += pointer {
		should, is := binary.LittleEndian.Uint64(want[i:]), binary.LittleEndian.Uint64(got[i:])
		if should != 0 { // else padding behind the table
			t.Entries++
		}
		if should != is {
			t.Hooks = append(t.Hooks, Hook{i / pointer, is, r.SymbolAt(is), r.SymbolAt(should)})
		}
	}
	return t, nil
}

// Of a gate in the IDT (Intel SDM, volume 3A, "64-Bit Mode IDT").
const (
	gates       = 256
	gateSize    = 16
	gatePresent = 1 << 15
)

// Interrupts looks at the kernel's interrupt descriptor table: each gate that is present must lead into the kernel's entry
// code, or be one that was never set since the kernel started (of an exception that is reserved, or that the processor has
// not): those lead to a handler of their number, whose memory is free again. Which table the processor uses is in a register
// that memory does not show.
func (r *Reader) Interrupts() (t Table, err error) {
	t.Hooks = []Hook{}
	var at [3]uint64
	for i, n := range []string{"idt_table", "__entry_text_start", "__entry_text_end"} {
		if at[i], err = r.Kernel.Address(n); err != nil {
			return t, err
		}
	}
	var b [gates * gateSize]byte
	if _, err := r.Kernel.ReadAt(b[:], int64(at[0])); err != nil {
		return t, err
	}
	early := r.early()
	le := binary.LittleEndian
	for i := range gates {
		g := b[i*gateSize:]
		if le.Uint16(g[4:])&gatePresent == 0 {
			continue
		}
		t.Entries++
		target := uint64(le.Uint16(g)) | uint64(le.Uint16(g[6:]))<<16 | uint64(le.Uint32(g[8:]))<<32
		if (target < at[1] || target >= at[2]) && !early[target] {
			t.Hooks = append(t.Hooks, Hook{i, target, r.SymbolAt(target), "the kernel's entry code"})
		}
	}
	if t.Entries == 0 {
		return t, errors.New("the guest's interrupt descriptor table has no gate")
	}
	return t, nil
}

// early are the handlers of exceptions that the kernel starts with.
func (r *Reader) early() map[uint64]bool {
	all := map[uint64]bool{}
	first, ok := r.Symbols.Lookup("early_idt_handler_array")
	end, there := r.Symbols.Lookup("early_idt_handler_common")
	const exceptions = 32
	if !ok || !there || end.Address <= first.Address || (end.Address-first.Address)%exceptions != 0 {
		return all
	}
	for i := range uint64(exceptions) {
		all[first.Address+i*((end.Address-first.Address)/exceptions)+r.Kernel.Offset] = true
	}
	return all
}
