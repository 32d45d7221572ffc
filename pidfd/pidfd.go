// Package pidfd names processes by descriptors (pidfd_open(2)), which never name another process once theirs has ended.
package pidfd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// Open names a running process, or one that has ended and was not waited for. The descriptor does not block. The error
// wraps ESRCH where there is no such process.
func Open(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// Await returns nil when the process has ended, waited for or not, and the context's error when that ends and the process
// has not. The descriptor must not block; one goroutine waits at a time.
func Await(ctx context.Context, f *os.File) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	told := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(told)
		_ = f.SetReadDeadline(time.Unix(1, 0)) // long ago; it could be set just now
	})
	var over bool
	var failed error
	look := func(fd uintptr) bool {
		over, failed = ended(int(fd))
		return over || failed != nil
	}
	err = c.Read(look)
	if !stop() {
		<-told // the next wait's deadline is its own
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		err = c.Control(func(fd uintptr) { look(fd) })
		if !over && failed == nil && err == nil {
			return ctx.Err()
		}
	}
	return errors.Join(err, failed)
}

// ended looks without waiting.
func ended(fd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := eintr.Value(func() (int, error) { return unix.Poll(p, 0) })
	return n == 1, os.NewSyscallError("poll", err)
}

// Signal sends a signal. The error wraps ESRCH where the process has ended and was waited for.
func Signal(f *os.File, s syscall.Signal) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := c.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), s, nil, 0) }); cerr != nil {
		return cerr
	}
	return os.NewSyscallError("pidfd_send_signal", err)
}
