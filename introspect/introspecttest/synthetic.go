package introspecttest

import (
	"encoding/binary"
	"io"
	"testing"

	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/layout"
	"redoubt.dev/redoubt/introspect/types"
)

// A Synthetic is a kernel made of nothing but what readers look for: its memory is one large page, which a test fills. It
// is seen by an offset, as one that KASLR moved.
type Synthetic struct {
	memory [size]byte
	Layout *layout.Layout
	kernel *kernel.Kernel
}

const (
	size   = 4 << 20
	place  = 2 << 20            // where it lies
	linked = 0xffffffff81000000 // what it was linked for
	moved  = 0x2000000

	banner = "Linux version 0.0 (synthetic)\n\x00"

	bannerAt = 0x1000
	levelsAt = 0x1100
	tablesAt = 0x100000
	pageSize = 4 << 10

	// Room is how much of the page a test may fill, from Data on as the guest sees it.
	Room = 512 << 10
	Data = linked + moved + dataAt

	dataAt = 0x10000
)

// NewSynthetic makes one with page tables of 4 or 5 levels. Symbols are at offsets of what a test fills.
func NewSynthetic(t testing.TB, levels int, symbols map[string]uint64, fields map[string]types.Field) *Synthetic {
	t.Helper()
	s := &Synthetic{Layout: &layout.Layout{Banner: []byte(banner), Fields: fields, Symbols: map[string]uint64{
		"_text": linked, "linux_banner": linked + bannerAt, "__pgtable_l5_enabled": linked + levelsAt, "init_top_pgt": linked + tablesAt,
	}}}
	for name, at := range symbols {
		s.Layout.Symbols[name] = linked + dataAt + at
	}
	copy(s.memory[place+bannerAt:], banner)
	if levels == 5 {
		s.memory[place+levelsAt] = 1
	}
	table, at := uint64(place+tablesAt), uint64(linked+moved)
	for level := levels; level >= 2; level-- {
		index := at >> (12 + 9*(level-1)) & 511
		entry, next := uint64(place|1|1<<7), table+pageSize // a large page, executable
		if level > 2 {
			entry = next | 1
		}
		binary.LittleEndian.PutUint64(s.memory[table+8*index:], entry)
		table = next
	}
	var err error
	if s.kernel, err = kernel.Find(s, size, s.Layout); err != nil {
		t.Fatal(err)
	}
	if s.kernel.Offset != moved || s.kernel.Physical != place || s.kernel.Space.Levels != levels {
		t.Fatalf("found at %#x, moved by %#x, %d levels", s.kernel.Physical, s.kernel.Offset, s.kernel.Space.Levels)
	}
	return s
}

// Kernel is it, filled with b from Data on, and nothing behind.
func (s *Synthetic) Kernel(b []byte) *kernel.Kernel {
	room := s.memory[place+dataAt:][:Room]
	clear(room[copy(room, b):])
	return s.kernel
}

// ReadAt reads its physical memory.
func (s *Synthetic) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > size || int64(len(p)) > size-off {
		return 0, io.EOF
	}
	return copy(p, s.memory[off:]), nil
}
