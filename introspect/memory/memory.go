// Package memory reads a guest's memory by guest-physical address: of a guest that runs, whose memory is one memfd,
// and of a dump, a copy of that file or an ELF core as QEMU's dump-guest-memory writes it.
//
// The contents are the guest's and change while it runs: what is read was there at some instant, each word by itself.
package memory

import (
	"errors"
	"fmt"
	"io"
)

// A Machine says how a guest's memory is laid out: below 4 GiB there is a hole for devices, and what is not below the
// hole begins again at 4 GiB, without a gap in the file.
type Machine string

// The machines.
const (
	Native Machine = "native"
	QEMU   Machine = "qemu" // q35
	Flat   Machine = "flat" // an address is an offset
)

const (
	high = 1 << 32

	nativeLow = 0xc000_0000 // monitor/layout.go
	// QEMU's hw/i386/pc_q35.c: a guest that reaches so far has 2 GiB below the hole.
	qemuMost = 0xb000_0000
	qemuLow  = 0x8000_0000
)

// low is how much of a guest's memory is below the hole.
func (m Machine) low(size uint64) (uint64, error) {
	switch {
	case m == Native:
		return min(size, nativeLow), nil
	case m == QEMU && size >= qemuMost:
		return qemuLow, nil
	case m == QEMU, m == Flat:
		return size, nil
	}
	return 0, fmt.Errorf("a machine %q is not known: use native, qemu or flat", string(m))
}

// A region is a part of the file.
type region struct{ physical, size, offset uint64 }

// Physical is memory by guest-physical address. It may be used concurrently if its file may.
type Physical struct {
	file    io.ReaderAt
	regions []region // in order, none over another
}

// ErrNone says that an address is none of the guest's memory.
var ErrNone = errors.New("not the guest's memory")

// New is a machine's memory of size bytes in a file.
func New(file io.ReaderAt, size uint64, m Machine) (*Physical, error) {
	below, err := m.low(size)
	if err != nil {
		return nil, err
	}
	p := &Physical{file, []region{{0, below, 0}}}
	if size > below {
		p.regions = append(p.regions, region{high, size - below, below})
	}
	return p, nil
}

// End is the first address above all memory.
func (p *Physical) End() uint64 {
	if len(p.regions) == 0 {
		return 0
	}
	last := p.regions[len(p.regions)-1]
	return last.physical + last.size
}

// ReadAt implements io.ReaderAt; off is an address. It reads what lies before the first address that is not memory.
func (p *Physical) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		at := uint64(off) + uint64(n)
		r, ok := p.find(at)
		if !ok {
			return n, fmt.Errorf("%#x: %w", at, ErrNone)
		}
		inside := at - r.physical
		part := b[n:][:min(uint64(len(b)-n), r.size-inside)]
		got, err := p.file.ReadAt(part, int64(r.offset+inside))
		n += got
		if got < len(part) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}
	return n, nil
}

func (p *Physical) find(at uint64) (region, bool) {
	for _, r := range p.regions {
		if at >= r.physical && at-r.physical < r.size {
			return r, true
		}
	}
	return region{}, false
}
