// Package paging reads a guest's memory by the guest's own virtual addresses: it walks x86-64's page tables, with
// four and five levels, in the guest's physical memory.
//
// The tables are the guest's and may say anything. What they say is bounded here: a walk reads at most
// five entries, a listing as many tables as its caller allows, and an address outside the guest's memory is the
// reader's error. The guest may change the tables meanwhile: what is read is what was there for each
// entry, at some instant.
//
// Source: Intel SDM, volume 3A, "Paging" (4-level and 5-level paging); AMD64 APM, volume 2, "Long-Mode Page
// Translation". Protection keys and shadow stacks are not told.
package paging

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
)

// Bits of an entry.
const (
	present  = 1 << 0
	writable = 1 << 1
	user     = 1 << 2
	large    = 1 << 7 // in a directory pointer or a directory
	noExec   = 1 << 63

	addressMask = 1<<52 - 1<<12
)

const (
	pageShift = 12
	indexBits = 9
	entrySize = 8
	tableSize = 1 << pageShift
	perTable  = 1 << indexBits
	maxLevels = 5
)

// A Space is a guest's virtual address space.
type Space struct {
	Memory io.ReaderAt // the guest's physical memory; an offset is an address
	Root   uint64      // CR3; what it says beside the address is ignored
	Levels int         // 4, or 5 where CR4.LA57 is set

	kept *[keptPages]Mapping // found by earlier reads; see Keep
}

// keptPages are the pages that a Space keeps, each in the place that its address says.
const keptPages = 256

// Keep has ReadAt walk the tables once for what it reads often, for a Space that one goroutine uses, until the next call of
// Keep.
func (s *Space) Keep() { s.kept = new([keptPages]Mapping) }

// page is Walk for ReadAt.
func (s *Space) page(virtual uint64) (Mapping, error) {
	if s.kept == nil {
		return s.Walk(virtual)
	}
	// A page of 4 KiB, or a part of a larger one: those that lie together have places of their own.
	slot := &s.kept[(virtual>>pageShift^virtual>>shift(2))%keptPages]
	if virtual-slot.Virtual < slot.Size {
		return *slot, nil
	}
	m, err := s.Walk(virtual)
	if err == nil {
		*slot = m
	}
	return m, err
}

// A Mapping is a page and what its tables allow: each of the rights only where all levels give it.
type Mapping struct {
	Virtual, Physical, Size uint64 // Virtual and Physical are where the page begins
	Writable, User          bool
	Executable              bool
}

// A NotMappedError says that an address has no page.
type NotMappedError struct {
	Virtual uint64
	Level   int // whose entry is not present, 1 for a page table's; 0: the address is not canonical
}

func (e *NotMappedError) Error() string {
	if e.Level == 0 {
		return fmt.Sprintf("%#x is no canonical address", e.Virtual)
	}
	return fmt.Sprintf("%#x is not mapped: its entry of level %d is not present", e.Virtual, e.Level)
}

// ErrTable is an entry that no processor takes.
var ErrTable = errors.New("a reserved bit is set")

// errBudget ends a listing.
var errBudget = errors.New("more page tables than were to be read")

// shift is by how much an address is to be shifted for its index in a table of a level.
func shift(level int) uint { return uint(pageShift + indexBits*(level-1)) }

// canonical reports whether all bits from the highest that counts are the same.
func (s *Space) canonical(virtual uint64) bool {
	top := int64(virtual) >> (shift(s.Levels+1) - 1)
	return top == 0 || top == -1
}

func (s *Space) check() error {
	if s.Levels != 4 && s.Levels != maxLevels {
		return fmt.Errorf("paging: %d levels", s.Levels)
	}
	return nil
}

// Walk finds the page of an address. The error is a [*NotMappedError] where there is none, and else the
// reader's, or ErrTable.
func (s *Space) Walk(virtual uint64) (Mapping, error) {
	if err := s.check(); err != nil {
		return Mapping{}, err
	}
	if !s.canonical(virtual) {
		return Mapping{}, &NotMappedError{Virtual: virtual}
	}
	m := Mapping{Writable: true, User: true, Executable: true}
	table := s.Root & addressMask
	for level := s.Levels; ; level-- {
		index := virtual >> shift(level) & (perTable - 1)
		var b [entrySize]byte
		if err := Read(s.Memory, b[:], table+index*entrySize); err != nil {
			return Mapping{}, fmt.Errorf("table of level %d of %#x: %w", level, virtual, err)
		}
		e := binary.LittleEndian.Uint64(b[:])
		if e&present == 0 {
			return Mapping{}, &NotMappedError{virtual, level}
		}
		leaf, err := m.descend(e, level)
		if err != nil {
			return Mapping{}, fmt.Errorf("%#x: level %d: %w", virtual, level, err)
		}
		if leaf {
			m.Virtual = virtual &^ (m.Size - 1)
			return m, nil
		}
		table = e & addressMask
	}
}

// descend takes an entry's rights in, and its page if it is a leaf.
func (m *Mapping) descend(e uint64, level int) (leaf bool, err error) {
	m.Writable = m.Writable && e&writable != 0
	m.User = m.User && e&user != 0
	m.Executable = m.Executable && e&noExec == 0
	if level > 1 && e&large == 0 {
		return false, nil
	}
	if level > 3 { // PS is reserved there
		return false, ErrTable
	}
	m.Size = 1 << shift(level)
	if e&(m.Size-1)&^(1<<13-1) != 0 && level > 1 { // below the address and above PAT
		return false, ErrTable
	}
	m.Physical = e & addressMask &^ (m.Size - 1) // of a large page bit 12 is PAT
	return true, nil
}

// ReadAt reads by virtual address: off is the address, the upper half of which is negative. It implements
// io.ReaderAt: what lies before the first page that is not there is read.
func (s *Space) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		at := uint64(off) + uint64(n)
		m, err := s.page(at)
		if err != nil {
			return n, err
		}
		inside := at - m.Virtual
		part := p[n:][:min(uint64(len(p)-n), m.Size-inside)]
		if err := Read(s.Memory, part, m.Physical+inside); err != nil {
			return n, fmt.Errorf("%#x: %w", at, err)
		}
		n += len(part)
	}
	return n, nil
}

// Mappings lists the pages of the addresses from first to last, in order. It reads at most so many tables, and
// ends with an error where it cannot go on.
func (s *Space) Mappings(first, last uint64, tables int) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		if err := s.check(); err != nil {
			yield(Mapping{}, err)
			return
		}
		l := lister{s: s, first: first, last: last, left: tables, yield: yield}
		all := Mapping{Writable: true, User: true, Executable: true}
		if err := l.table(s.Root&addressMask, s.Levels, 0, all); err != nil && !errors.Is(err, errStop) {
			yield(Mapping{}, err)
		}
	}
}

// errStop says that the caller wants no more.
var errStop = errors.New("stop")

type lister struct {
	s           *Space
	first, last uint64
	left        int // tables
	yield       func(Mapping, error) bool
}

// table lists what a table maps; base is the address of its first entry.
func (l *lister) table(at uint64, level int, base uint64, m Mapping) error {
	if l.left--; l.left < 0 {
		return errBudget
	}
	var t [tableSize]byte
	if err := Read(l.s.Memory, t[:], at); err != nil {
		return fmt.Errorf("table of level %d at %#x: %w", level, at, err)
	}
	for i := range uint64(perTable) {
		virtual := base + i<<shift(level)
		if level == l.s.Levels && i >= perTable/2 { // the upper half of the addresses
			virtual |= ^uint64(0) << shift(level+1)
		}
		end := virtual + (1<<shift(level) - 1)
		e := binary.LittleEndian.Uint64(t[i*entrySize:])
		if e&present == 0 || end < l.first || virtual > l.last {
			continue
		}
		next := m
		leaf, err := next.descend(e, level)
		switch {
		case err != nil:
			return fmt.Errorf("%#x: level %d: %w", virtual, level, err)
		case leaf:
			next.Virtual = virtual
			if !l.yield(next, nil) {
				return errStop
			}
		default:
			if err := l.table(e&addressMask, level-1, virtual, next); err != nil {
				return err
			}
		}
	}
	return nil
}

// Read reads all of p at a physical address, or fails.
func Read(r io.ReaderAt, p []byte, at uint64) error {
	if int64(at) < 0 {
		return fmt.Errorf("physical address %#x", at)
	}
	n, err := r.ReadAt(p, int64(at))
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("physical address %#x: %w", at, err)
}
