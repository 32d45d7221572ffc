package sandbox

// The parent's side of seccomp_unotify(2).

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// A note is struct seccomp_notif.
type note struct {
	id    uint64
	pid   uint32
	flags uint32
	data  struct { // struct seccomp_data
		number uint32
		arch   uint32
		ip     uint64
		args   [6]uint64
	}
}

// noteReply is struct seccomp_notif_resp.
type noteReply struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

var errNoMore = errors.New("no process uses the filter any more")

// awaitNote takes the next call that is held. It ends with an error when no process can make one
// any more, at f's read deadline and when f is closed.
func awaitNote(f *os.File) (*note, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var n note
	var failed error
	err = c.Read(func(fd uintptr) bool {
		for {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, err := eintr.Value(func() (int, error) { return unix.Poll(p, 0) }); err != nil {
				failed = err
				return true
			}
			if p[0].Revents&unix.POLLIN == 0 {
				if p[0].Revents != 0 {
					failed = errNoMore
				}
				return p[0].Revents != 0
			}
			n = note{} // the kernel wants it zero
			_, _, e := unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
			switch e {
			case 0:
				return true
			case unix.EINTR, unix.ENOENT: // the thread that made the call was killed
				continue
			}
			failed = e
			return true
		}
	})
	if err == nil {
		err = failed
	}
	return &n, err
}

// letPass lets a held call be made.
func letPass(f *os.File, id uint64) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	r := noteReply{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	var e unix.Errno
	err = c.Control(func(fd uintptr) {
		_, _, e = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r)))
	})
	if err == nil && e != 0 {
		err = e
	}
	return err
}

// trySeccomp asks whether the kernel can tell us of calls (Linux 5.0).
func trySeccomp() error {
	action := uint32(unix.SECCOMP_RET_USER_NOTIF)
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action))); e != 0 {
		return fmt.Errorf("user notification: %w", e)
	}
	return nil
}
