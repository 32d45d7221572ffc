// Package foreign is how a service has another's program (QEMU, swtpm) run in a sandbox of its
// own. A process in a sandbox can start none, and must not: it asks the Builder, which starts the
// program beside it and hands back a lifeline. The program ends when the lifeline does.
package foreign

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/programs"
)

// Method is the call to the Builder. Descriptors: the lifeline, the pipe for the output, then the
// program's own from 3 on.
const Method = "program" // Request → Started

// Request asks for a program.
type Request struct {
	Name string   `json:"name"`
	Args []string `json:"args"`
	// Dir is the directory it may write in, relative to that of the service which asks; "": none.
	Dir string `json:"dir,omitempty"`
}

// Started says that it runs.
type Started struct {
	PID int `json:"pid"` // on the host
}

// terminate on the lifeline asks the program to end.
const terminate = 'T'

// ended is the last message on the lifeline.
type ended struct {
	Exit  string `json:"exit"`
	Error string `json:"error,omitempty"`
}

// A Starter is a [programs.Starter] by the Builder at the other end of a control connection.
type Starter struct {
	Builder *rpc.Peer
	// Dir is where a service, the one that asks and the program alike, finds its own directory.
	Dir string
}

// remote is a program that the Builder runs.
type remote struct {
	pid    int
	line   *os.File
	out    *os.File // what it prints
	output sync.WaitGroup

	mu   sync.Mutex
	exit string
}

// Start implements [programs.Starter].
func (s Starter) Start(ctx context.Context, p programs.Program) (programs.Running, error) {
	r, err := s.start(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Name, err)
	}
	return r, nil
}

func (s Starter) start(ctx context.Context, p programs.Program) (_ programs.Running, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "lifeline")
	defer theirs.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil { // so that Kill ends a read
		return nil, errors.Join(err, unix.Close(fds[0]))
	}
	line := os.NewFile(uintptr(fds[0]), "lifeline")
	defer func() {
		if err != nil {
			line.Close()
		}
	}()
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	files := []*os.File{theirs, in}
	q := Request{Name: p.Name, Args: p.Args(s.Dir)}
	if p.Dir != "" {
		if q.Dir, err = filepath.Rel(s.Dir, p.Dir); err != nil {
			out.Close()
			return nil, err
		}
	}
	var started Started
	if _, err := s.Builder.Call(ctx, Method, q, &started, append(files, p.Files...)...); err != nil {
		out.Close()
		return nil, err
	}
	return run(started.PID, line, out, p.Output), nil
}

func run(pid int, line, out *os.File, w io.Writer) *remote {
	r := &remote{pid: pid, line: line, out: out}
	if w == nil {
		w = io.Discard
	}
	r.output.Go(func() { // ends with the last writer, the program
		defer out.Close()
		_, _ = io.Copy(w, out)
	})
	return r
}

// Handles are copies of what another process needs to own a program of a [Starter] in place of
// this one: see [Adopt].
func Handles(p programs.Running) (lifeline, output *os.File, err error) {
	r, ok := p.(*remote)
	if !ok {
		return nil, nil, errors.New("the program is no Builder's")
	}
	if lifeline, err = duplicate(r.line); err != nil {
		return nil, nil, err
	}
	if output, err = duplicate(r.out); err != nil {
		lifeline.Close()
		return nil, nil, err
	}
	return lifeline, output, nil
}

func duplicate(f *os.File) (*os.File, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if cerr := c.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// Adopt owns a program whose last owner is gone. It takes the handles over.
func Adopt(pid int, lifeline, output *os.File, w io.Writer) programs.Running {
	return run(pid, lifeline, output, w)
}

func (r *remote) PID() int   { return r.pid }
func (r *remote) Terminate() { _, _ = r.line.Write([]byte{terminate}) }

// Kill ends our half of the lifeline, upon which the Builder ends the program.
func (r *remote) Kill() {
	c, err := r.line.SyscallConn()
	if err != nil {
		return // Wait has closed it
	}
	_ = c.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
}

// errLost is the end of a program whose Builder is gone.
var errLost = errors.New("nobody told how it ended")

// maxEnded bounds what is read of a program's end.
const maxEnded = 64 << 10

func (r *remote) Wait() error {
	var e ended
	text, err := io.ReadAll(io.LimitReader(r.line, maxEnded))
	if err == nil {
		err = json.Unmarshal(text, &e)
	}
	r.line.Close()
	r.output.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.exit = errLost.Error()
		return errLost
	}
	r.exit = e.Exit
	if e.Error != "" {
		return errors.New(e.Error)
	}
	return nil
}

func (r *remote) Exit() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.exit
}
