package pidfd

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// sleeper starts a process that ends when its standard input does.
func sleeper(t *testing.T) (*exec.Cmd, io.Closer) {
	t.Helper()
	c := exec.Command("cat")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	return c, in
}

func TestAwait(t *testing.T) {
	c, in := sleeper(t)
	f, err := Open(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Await(ctx, f); !errors.Is(err, context.Canceled) {
		t.Errorf("await a running process with a context that has ended: %v", err)
	}
	done := make(chan error, 1)
	ctx, cancel = context.WithCancel(t.Context())
	go func() { done <- Await(ctx, f) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("await a running process with a context that ends: %v", err)
	}
	// A wait that was called off spoils none after it.
	go func() { done <- Await(t.Context(), f) }()
	in.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := Await(t.Context(), f); err != nil {
		t.Errorf("ended, not waited for: %v", err)
	}
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := Await(ctx, f); err != nil {
		t.Errorf("waited for, with a context that has ended: %v", err)
	}
	if err := Signal(f, unix.SIGTERM); !errors.Is(err, unix.ESRCH) {
		t.Errorf("signal to a process waited for: %v", err)
	}
	if f, err := Open(c.Process.Pid); !errors.Is(err, unix.ESRCH) {
		t.Errorf("open a process waited for: %v, %v", f, err)
	}
}

// TestAwaitSignalled: signals to the waiting process disturb no wait.
func TestAwaitSignalled(t *testing.T) {
	c, in := sleeper(t)
	f, err := Open(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	done := make(chan error, 1)
	go func() { done <- Await(t.Context(), f) }()
	for range 1000 { // what the Go runtime preempts with
		if err := syscall.Kill(syscall.Getpid(), syscall.SIGURG); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("await a running process: %v", err)
	default:
	}
	in.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestSignal(t *testing.T) {
	c := exec.Command("sh", "-c", "trap 'echo trapped; exit 0' TERM; echo up; read x")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	r := bufio.NewReader(out)
	if l, err := r.ReadString('\n'); err != nil || l != "up\n" {
		t.Fatal(l, err)
	}
	f, err := Open(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Signal(f, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if l, err := r.ReadString('\n'); err != nil || l != "trapped\n" {
		t.Error(l, err)
	}
	if err := Await(t.Context(), f); err != nil {
		t.Error(err)
	}
}
