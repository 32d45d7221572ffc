package supervisor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// Lock makes this the only Supervisor that has a file, in which its process id is. The lock goes with the
// process. The file is root's alone: who may open it may lock it, too. The lock is the open file description's (fcntl(2)), of
// which [Holder] asks without taking it: one that tried to would keep a Supervisor from starting at that moment.
func Lock(path string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lock(f); err != nil {
		f.Close()
		return nil, err
	}
	return func() { _ = f.Truncate(0); f.Close() }, nil
}

func lock(f *os.File) error {
	if err := f.Chmod(0o600); err != nil { // one that is there may be older than this rule
		return err
	}
	l := whole()
	err := eintr.Call(func() error { return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l) })
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%s: Redoubt runs already on this run directory", f.Name())
	}
	if err != nil {
		return fmt.Errorf("%s: lock: %w", f.Name(), err)
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	return err
}

// whole is the lock: the whole file, for one alone.
func whole() unix.Flock_t { return unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart} }

// Holder is the process id of the Supervisor that holds a lock, 0 where there is none.
func Holder(path string) (pid int, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	l := whole()
	if err := eintr.Call(func() error { return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) }); err != nil {
		return 0, fmt.Errorf("%s: lock: %w", path, err)
	}
	if l.Type == unix.F_UNLCK {
		return 0, nil // whoever's id is in it has ended
	}
	b, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0, err
	}
	pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s: holds no process id", path)
	}
	return pid, nil
}
