package vhostuser

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestEventFile: an eventfd that was given is taken as it is, and read and written without waiting and without the poller, whose
// deadlines it would have.
func TestEventFile(t *testing.T) {
	for _, flags := range []int{0, unix.EFD_NONBLOCK} {
		fd, err := unix.Eventfd(3, unix.EFD_CLOEXEC|flags)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f, err := eventFile(os.NewFile(uintptr(fd), "given"))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.SetReadDeadline(time.Now()); err == nil {
			t.Error("the poller watches it")
		}
		var b [8]byte
		for _, want := range []bool{true, false} { // what was in it, and nothing more: without waiting
			if _, err := unix.Read(int(f.Fd()), b[:]); (err == nil) != want {
				t.Errorf("read: %v", err)
			}
		}
		if b != [8]byte{3} {
			t.Errorf("read %x", b)
		}
		if _, err := unix.Read(theirs, b[:]); err != unix.EAGAIN { //nolint:errorlint // of the kernel's own
			t.Errorf("theirs: %v", err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		_ = unix.Close(theirs)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := eventFile(dir); err == nil {
		t.Error("a directory passes for an eventfd")
	}
}
