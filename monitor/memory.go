package monitor

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pci"
)

// memory is the guest's RAM: one mapping of the descriptor, at two guest-physical places.
type memory struct {
	all  []byte
	low  []byte // at 0
	high []byte // at highRAMBase; empty below 3 GiB
}

// A Region is one range of a machine's RAM and its place in the memory descriptor.
type Region struct{ Guest, Size, Offset uint64 }

// Regions is where a machine has its RAM.
func Regions(size uint64) []Region {
	low := min(size, lowRAMLimit)
	r := []Region{{Guest: 0, Size: low}}
	if size > low {
		r = append(r, Region{Guest: highRAMBase, Size: size - low, Offset: low})
	}
	return r
}

func mapMemory(f *os.File, size uint64) (*memory, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	if uint64(st.Size()) < size {
		return nil, fmt.Errorf("guest memory: the descriptor holds %d bytes, the machine needs %d", st.Size(), size)
	}
	all, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("guest memory: map %d bytes: %w", size, err)
	}
	// A guest's memory stays out of a core dump of its monitor. Huge pages where the host
	// gives them to shared memory: fewer faults; both are wishes.
	_ = unix.Madvise(all, unix.MADV_DONTDUMP)
	_ = unix.Madvise(all, unix.MADV_HUGEPAGE)
	n := min(size, lowRAMLimit)
	return &memory{all: all, low: all[:n:n], high: all[n:]}, nil
}

func (m *memory) close() error {
	if m.all == nil {
		return nil
	}
	all := m.all
	*m = memory{}
	return unix.Munmap(all)
}

// Slice implements pci.Memory.
func (m *memory) Slice(gpa, n uint64) ([]byte, error) {
	region := m.low
	off := gpa
	if gpa >= highRAMBase {
		region, off = m.high, gpa-highRAMBase
	}
	if off > uint64(len(region)) || n > uint64(len(region))-off {
		return nil, fmt.Errorf("%d bytes at %#x: %w", n, gpa, pci.ErrMemory)
	}
	return region[off : off+n : off+n], nil
}

// anonymous is zeroed, page-aligned memory that the guest may see.
func anonymous(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", n, err)
	}
	return b, nil
}

func unmapAll(regions ...[]byte) error {
	var errs []error
	for _, r := range regions {
		if r != nil {
			errs = append(errs, unix.Munmap(r))
		}
	}
	return errors.Join(errs...)
}
