package engine

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"

	"redoubt.dev/redoubt/programs"
)

// socketpair makes a connected pair of stream sockets: ours, and the engine's as a file to
// pass on.
func socketpair(name string) (*net.UnixConn, *os.File, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, os.NewSyscallError("socketpair", err))
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	return c.(*net.UnixConn), theirs, nil
}

// keyPipe is a pipe from which the engine reads its key and then the end.
func keyPipe(key *[KeySize]byte) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	_, err = w.Write(key[:]) // far less than a pipe holds: does not block
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// logTail keeps the end of what the engine printed, for error messages.
type logTail struct {
	mu  sync.Mutex
	buf []byte
}

const maxTail = 2048

func (t *logTail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if len(t.buf) > maxTail {
		t.buf = append([]byte(nil), t.buf[len(t.buf)-maxTail:]...)
	}
	return len(b), nil
}

// String is the tail as one printable line.
func (t *logTail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f {
			return -1
		}
		return r
	}, string(t.buf))
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' }), "; ")
}

// process owns the running engine.
type process struct {
	programs.Running
	log  logTail
	done chan struct{} // closed once the process is gone
}

// start starts the engine's program; its output goes to the log tail.
func start(starter programs.Starter, p programs.Program) (*process, error) {
	e := &process{done: make(chan struct{})}
	p.Output = &e.log
	var err error
	if e.Running, err = starter.Start(context.Background(), p); err != nil {
		return nil, err
	}
	go func() { // ends with the program
		defer close(e.done)
		_ = e.Wait() // Exit tells
	}()
	return e, nil
}

// kill ends the process for certain and waits for its end.
func (p *process) kill() {
	p.Kill()
	<-p.done
}
