package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pci"
)

// memory is a guest's memory as the front end has described it. It implements pci.Memory.
type memory struct {
	regions []mapped
}

type mapped struct {
	region
	data []byte
}

const pageSize = 4096

// A Whitelist says which files may be mapped as guest memory: those of the guests that this
// service was given. A nil list allows none.
type Whitelist []os.FileInfo

// allows reports whether f is one of the list's files.
func (w Whitelist) allows(f *os.File) (os.FileInfo, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	for _, a := range w {
		if os.SameFile(a, st) {
			return st, nil
		}
	}
	return nil, errors.New("not the memory of a guest of this service")
}

// checkMappable refuses what would fault under our feet: a file that can shrink.
func checkMappable(f *os.File) error {
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("not a memory file: %w", err)
	}
	if seals&unix.F_SEAL_SHRINK == 0 {
		return errors.New("not sealed against shrinking")
	}
	return nil
}

// mapMemory maps a memory table; files are one a region. Nothing stays mapped on error.
func mapMemory(regions []region, files []*os.File, allowed Whitelist) (_ *memory, err error) {
	if len(files) != len(regions) {
		return nil, fmt.Errorf("%w: memory table of %d regions with %d descriptors", ErrProtocol, len(regions), len(files))
	}
	m := &memory{}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.unmap())
		}
	}()
	for i, r := range regions {
		for _, v := range [...]uint64{r.guest, r.size, r.user, r.offset} {
			if v%pageSize != 0 || v >= 1<<62 {
				return nil, fmt.Errorf("%w: memory region %d: %#x is not a page's", ErrProtocol, i, v)
			}
		}
		for _, o := range m.regions {
			if r.guest < o.guest+o.size && o.guest < r.guest+r.size {
				return nil, fmt.Errorf("%w: memory regions overlap at %#x", ErrProtocol, max(r.guest, o.guest))
			}
		}
		st, err := allowed.allows(files[i])
		if err == nil {
			err = checkMappable(files[i])
		}
		if err != nil {
			return nil, fmt.Errorf("%w: memory region %d: %w", ErrProtocol, i, err)
		}
		if r.size == 0 || r.offset+r.size > uint64(st.Size()) {
			return nil, fmt.Errorf("%w: memory region %d: %#x bytes at %#x of a file of %#x", ErrProtocol, i, r.size, r.offset, st.Size())
		}
		data, err := unix.Mmap(int(files[i].Fd()), int64(r.offset), int(r.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("vhost-user: map memory region %d: %w", i, err)
		}
		m.regions = append(m.regions, mapped{r, data})
	}
	return m, nil
}

// is reports whether the memory is what a table says, if it is of the same files.
func (m *memory) is(regions []region) bool {
	return m != nil && slices.EqualFunc(m.regions, regions, func(a mapped, b region) bool { return a.region == b })
}

func (m *memory) unmap() error {
	var errs []error
	for _, r := range m.regions {
		errs = append(errs, unix.Munmap(r.data))
	}
	m.regions = nil
	return errors.Join(errs...)
}

// Slice implements pci.Memory.
func (m *memory) Slice(gpa, n uint64) ([]byte, error) {
	for _, r := range m.regions {
		if gpa >= r.guest && gpa-r.guest <= r.size && n <= r.size-(gpa-r.guest) {
			at := gpa - r.guest
			return r.data[at : at+n : at+n], nil
		}
	}
	return nil, fmt.Errorf("%#x bytes at %#x: %w", n, gpa, pci.ErrMemory)
}

// user is the n bytes at an address of the front end's.
func (m *memory) user(addr, n, align uint64) ([]byte, error) {
	b, _, err := m.locate(addr, n, align)
	return b, err
}

// locate is the n bytes at an address of the front end's, and their guest-physical address.
func (m *memory) locate(addr, n, align uint64) ([]byte, uint64, error) {
	if addr%align != 0 {
		return nil, 0, fmt.Errorf("%w: ring at %#x is not aligned to %d", ErrProtocol, addr, align)
	}
	for _, r := range m.regions {
		if addr >= r.user && addr-r.user <= r.size && n <= r.size-(addr-r.user) {
			at := addr - r.user
			return r.data[at : at+n : at+n], r.guest + at, nil
		}
	}
	return nil, 0, fmt.Errorf("%w: ring of %#x bytes at %#x: outside the memory table", ErrProtocol, n, addr)
}
