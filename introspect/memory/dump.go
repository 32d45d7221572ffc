package memory

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"slices"
)

// maxRegions bounds the segments of a core; QEMU writes a handful.
const maxRegions = 64

// Open is the memory of a dump of size bytes: an ELF core with guest-physical addresses (p_paddr), or what a machine's
// memory file holds.
func Open(file io.ReaderAt, size uint64, m Machine) (*Physical, error) {
	var magic [len(elf.ELFMAG)]byte
	if _, err := file.ReadAt(magic[:], 0); err != nil {
		return nil, fmt.Errorf("no dump: %w", err)
	}
	if string(magic[:]) != elf.ELFMAG {
		return New(file, size, m)
	}
	return core(file, size)
}

func core(file io.ReaderAt, size uint64) (*Physical, error) {
	f, err := elf.NewFile(io.NewSectionReader(file, 0, int64(size)))
	if err != nil {
		return nil, fmt.Errorf("ELF core: %w", err)
	}
	if f.Type != elf.ET_CORE || f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 {
		return nil, fmt.Errorf("an ELF file of type %v for %v: a core of x86-64 is needed", f.Type, f.Machine)
	}
	p := &Physical{file: file}
	for _, s := range f.Progs {
		if s.Type != elf.PT_LOAD || s.Filesz == 0 {
			continue
		}
		if s.Off > size || s.Filesz > size-s.Off || s.Paddr+s.Filesz < s.Paddr || int64(s.Paddr+s.Filesz) < 0 {
			return nil, fmt.Errorf("ELF core: a segment of %d bytes at %#x, of address %#x, is not in the file of %d bytes", s.Filesz, s.Off, s.Paddr, size)
		}
		p.regions = append(p.regions, region{s.Paddr, s.Filesz, s.Off})
	}
	if len(p.regions) == 0 || len(p.regions) > maxRegions {
		return nil, fmt.Errorf("ELF core: %d segments of memory: 1 to %d are read", len(p.regions), maxRegions)
	}
	slices.SortFunc(p.regions, func(a, b region) int {
		if a.physical < b.physical {
			return -1
		}
		return 1
	})
	for i, r := range p.regions[1:] {
		if r.physical < p.regions[i].physical+p.regions[i].size {
			return nil, errors.New("ELF core: two segments have one address")
		}
	}
	return p, nil
}
