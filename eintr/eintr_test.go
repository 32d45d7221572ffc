package eintr

import (
	"os"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSignalled: a call that signals interrupt ends with its own result.
func TestSignalled(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	var calls atomic.Int32
	poll := func() (int, error) {
		calls.Add(1)
		return unix.Poll([]unix.PollFd{{Fd: int32(pipe[0]), Events: unix.POLLIN}}, -1)
	}
	// disturb signals this thread until the call was made anew, then lets it end.
	disturb := func(thread int, done chan<- error) {
		for was := calls.Load(); calls.Load() < was+3; runtime.Gosched() {
			if err := unix.Tgkill(os.Getpid(), thread, unix.SIGURG); err != nil {
				done <- err
				return
			}
		}
		_, err := unix.Write(pipe[1], []byte{1})
		done <- err
	}
	done := make(chan error, 1)
	go disturb(unix.Gettid(), done)
	if n, err := Value(poll); n != 1 || err != nil {
		t.Errorf("poll: %d, %v", n, err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Read(pipe[0], make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	go disturb(unix.Gettid(), done)
	if err := Call(func() error { _, err := poll(); return err }); err != nil {
		t.Errorf("poll: %v", err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestErrors(t *testing.T) {
	if n, err := Value(func() (int, error) { return 7, unix.EIO }); n != 7 || err != unix.EIO { //nolint:errorlint // the call's own
		t.Errorf("%d, %v", n, err)
	}
	if err := Call(func() error { return unix.EAGAIN }); err != unix.EAGAIN { //nolint:errorlint // the call's own
		t.Error(err)
	}
}
