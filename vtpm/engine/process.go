package engine

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
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
	cmd  *exec.Cmd
	log  logTail
	done chan struct{} // closed once the process is reaped; state is set before
	end  string        // how it ended, for messages
}

// start runs cmd, which must carry its descriptors, and returns once it is running. cmd's
// output goes to the log tail. One goroutine owns the process: it starts it on a thread that
// lives until the process is reaped, because the kernel ties the parent-death signal to the
// starting thread (prctl(2), PR_SET_PDEATHSIG), not to the program.
func start(cmd *exec.Cmd) (*process, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // an interrupt typed at the terminal is ours to handle, not the engine's
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		w.Close()
		started <- err
		if err != nil {
			r.Close()
			return
		}
		drained := make(chan struct{})
		go func() { // ends with the last writer, the process
			defer close(drained)
			defer r.Close()
			b := make([]byte, 1024)
			for {
				n, err := r.Read(b)
				_, _ = p.log.Write(b[:n])
				if err != nil {
					return
				}
			}
		}()
		err = cmd.Wait()
		<-drained
		p.end = cmd.ProcessState.String()
		if err != nil && cmd.ProcessState == nil {
			p.end = err.Error()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// kill ends the process for certain and waits for it to be reaped.
func (p *process) kill() {
	// The only failure is that the process is already gone.
	_ = p.cmd.Process.Kill()
	<-p.done
}
