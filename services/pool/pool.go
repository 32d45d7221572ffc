// Package pool opens the files that tenants name, beneath the tenant's pool and by no link, so that what
// a tenant may write in its pool cannot lead out of it.
package pool

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
	"redoubt.dev/redoubt/ipc/rpc"
)

// OpenFile opens a regular file by its absolute path, which must lie beneath the pool: to read, or
// also to write. Errors do not name the path.
func OpenFile(pool, path string, write bool) (*os.File, error) {
	rel, err := filepath.Rel(pool, path)
	if !filepath.IsAbs(path) || err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return nil, rpc.Errorf(rpc.Refused, "lies outside the pool %s: move it there, or name another one (`redoubt tenant set`, `redoubt up --pool`)", pool)
	}
	flags := unix.O_RDONLY
	if write {
		flags = unix.O_RDWR
	}
	f, err := OpenBeneath(pool, rel, flags|unix.O_NONBLOCK|unix.O_NOCTTY)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, rpc.Errorf(rpc.Invalid, "a symbolic link is on the way: name the file itself")
	case err != nil:
		return nil, rpc.Errorf(rpc.Invalid, "%v", err)
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, rpc.Errorf(rpc.Invalid, "not a regular file")
	}
	return f, nil
}

// OpenBeneath opens what lies beneath a directory and is reached without any link; flags are openat2's.
func OpenBeneath(dir, name string, flags int) (*os.File, error) {
	base, err := eintr.Value(func() (int, error) { return unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, err
	}
	defer unix.Close(base)
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := eintr.Value(func() (int, error) { return unix.Openat2(base, name, &how) })
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
