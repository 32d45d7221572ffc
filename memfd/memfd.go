// Package memfd makes files that are memory only and that whoever gets them cannot change the size of:
// guests' memory, and sealed copies of what guests boot from.
package memfd

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
)

// MaxSealed bounds what Sealed copies, in bytes.
const MaxSealed = 1 << 30

// New makes size bytes of zeros that anybody who has them may change. Nobody who maps them can be
// surprised by a smaller file.
func New(name string, size int64) (*os.File, error) {
	f, err := create(name)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s of %d bytes: %w", name, size, err)
	}
	if err := seal(f, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Sealed is a copy of f that nobody can change any more, open to read: what is measured is what the
// guest gets, whatever happens to the file. name is what errors call it.
func Sealed(name string, f *os.File) (*os.File, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() == 0 || st.Size() > MaxSealed {
		return nil, rpc.Errorf(rpc.Invalid, "%s: not a regular file of 1 byte to 1 GiB", name)
	}
	m, err := create(name)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	// Read at offsets: where the descriptor stands does not matter.
	n, err := io.Copy(m, io.NewSectionReader(f, 0, st.Size()))
	if err == nil && n != st.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("%s: copied %d of %d bytes: %w", name, n, st.Size(), err)
	}
	if err := seal(m, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, err
	}
	// Who gets it reads it only, and QEMU wants a descriptor that says so.
	return ReadOnly(m)
}

// ReadOnly is another descriptor of a file, by which it can be read and nothing else: not written, cut, sealed, or mapped
// to write. Who has a /proc could open the file anew by it.
func ReadOnly(f *os.File) (*os.File, error) {
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return ro, nil
}

func create(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate("redoubt-"+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func seal(f *os.File, seals int) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("%s: seal: %w", f.Name(), err)
	}
	return nil
}
