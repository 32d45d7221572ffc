// Package process starts Redoubt's own programs and watches over them.
//
// A child gets one control connection as descriptor 3 ([Control]); everything else it may use
// arrives over that connection. It gets no other descriptor, no standard input, and no
// environment but what programs need. Its standard error goes to a log file. A child whose
// parent dies sees its control connection end and ends itself in an orderly way, unless somebody
// holds the parent's ends: another process can go on with it then ([Adopt]).
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/sandbox"
)

// controlFD is the descriptor of a child's control connection.
const controlFD = 3

// A Process is a running child.
type Process struct {
	Name    string
	Control *ipc.Conn      // the parent's end; the caller owns it
	cmd     *exec.Cmd      // nil of one that was adopted
	guard   *sandbox.Guard // nil without a sandbox
	tail    *tail
	done    chan struct{}
	err     error
}

// Held is what it takes to go on with a process that another one started.
type Held struct {
	Guard   sandbox.Held
	Control *os.File // the parent's end
	Output  *os.File // what the child says on its standard error
}

// Options say what to start.
type Options struct {
	Program string // its name; it lies beside the running one
	Label   string // what this instance is called, in messages and by its log; "": as Program
	LogDir  string // where LABEL.log is appended to
	// Sandbox confines it; nil: nothing does. The running program calls sandbox.LauncherMain, or
	// Host names one that does.
	Sandbox *sandbox.Spec
	Host    sandbox.Host
	// Hold keeps copies elsewhere before the program runs, see [sandbox.Guard]; nil: none are kept.
	Hold func(Held) error
}

// Start runs a program. The child is not tied to a context; it ends with its control connection,
// or by Kill.
func Start(o Options) (*Process, error) {
	p, err := start(o)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", o.Program, err)
	}
	return p, nil
}

func start(o Options) (*Process, error) {
	if o.Label == "" {
		o.Label = o.Program
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	ctl, child, err := ipc.Pair()
	if err != nil {
		return nil, err
	}
	defer child.Close()
	log, err := openLog(o.LogDir, o.Label)
	if err != nil {
		ctl.Close()
		return nil, err
	}
	output, theirs, err := pipe()
	if err != nil {
		ctl.Close()
		log.Close()
		return nil, err
	}
	defer theirs.Close()
	p := &Process{Name: o.Label, Control: ctl, tail: &tail{}, done: make(chan struct{})}
	p.cmd = exec.Command(filepath.Join(filepath.Dir(self), o.Program))
	p.cmd.Env = Env()
	p.cmd.ExtraFiles = []*os.File{child}
	p.cmd.Stderr = theirs
	p.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	wait := p.cmd.Wait
	if o.Sandbox == nil {
		err = p.cmd.Start()
	} else if p.guard, err = o.Host.Prepare(p.cmd, o.Sandbox); err == nil {
		if o.Hold != nil {
			p.guard.Hold = func(h sandbox.Held) error { return p.hold(o.Hold, h, output) }
		}
		err = p.guard.Start()
		wait = p.guard.Wait
	}
	if err != nil {
		ctl.Close()
		log.Close()
		output.Close()
		return nil, err
	}
	go p.follow(wait, output, log)
	return p, nil
}

// pipe makes a pipe whose reading end never blocks, whoever is given it: reads have deadlines.
func pipe() (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("pipe: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, errors.Join(err, unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return os.NewFile(uintptr(fds[0]), "output"), os.NewFile(uintptr(fds[1]), "output"), nil
}

func openLog(dir, label string) (*os.File, error) {
	log, err := os.OpenFile(filepath.Join(dir, label+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	return log, nil
}

func (p *Process) hold(hold func(Held) error, h sandbox.Held, output *os.File) error {
	control, err := p.Control.File()
	if err != nil {
		return err
	}
	defer control.Close()
	return hold(Held{h, control, output})
}

// Adopt goes on with a process that another one started and held. What is in h is the Process's then,
// also after an error.
func Adopt(label, logDir string, h Held) (*Process, error) {
	p := &Process{Name: label, tail: &tail{}, done: make(chan struct{}), guard: sandbox.Adopt(h.Guard)}
	log, err := openLog(logDir, label)
	if err == nil {
		if p.Control, err = ipc.FromFile(h.Control); err != nil {
			log.Close()
		}
	}
	if err != nil {
		h.Control.Close()
		h.Output.Close()
		p.Kill()
		return nil, errors.Join(fmt.Errorf("go on with %s: %w", label, err), p.guard.Wait())
	}
	go p.follow(p.guard.Wait, h.Output, log)
	return p, nil
}

// lossy drops what cannot be written, as where the file system is full: a child that is not read would stand still.
type lossy struct{ io.Writer }

func (l lossy) Write(b []byte) (int, error) {
	_, _ = l.Writer.Write(b)
	return len(b), nil
}

// lastOutput is how long what a child said may take to be written down after its end.
const lastOutput = 2 * time.Second

// follow writes down what the child says until it has ended.
func (p *Process) follow(wait func() error, output, log *os.File) {
	written := make(chan struct{})
	go func() { // ends with output
		defer close(written)
		// Not by os.File's WriteTo, which takes 32 KiB for the little that most say.
		_, _ = io.CopyBuffer(io.MultiWriter(lossy{log}, p.tail), struct{ io.Reader }{output}, make([]byte, 2<<10))
	}()
	err := wait()
	_ = output.SetReadDeadline(time.Now().Add(lastOutput)) // who else has the child's end is not waited for
	<-written
	output.Close()
	log.Close()
	p.err = p.describe(err)
	close(p.done)
}

// Env is what a program of ours may know of the environment.
func Env() []string {
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	for _, k := range []string{"REDOUBT_TOOLS", "REDOUBT_IN_LAB", "GOMAXPROCS", "GOCOVERDIR"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// PID of the child.
func (p *Process) PID() int {
	if p.cmd == nil {
		return p.guard.PID()
	}
	return p.cmd.Process.Pid
}

// Conn is Control.
func (p *Process) Conn() *ipc.Conn { return p.Control }

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the child ended, nil for exit status 0; valid once Done is closed.
func (p *Process) Err() error { return p.err }

// GrowMemory raises the limit of its sandbox, see [sandbox.Guard.GrowMemory].
func (p *Process) GrowMemory(limit uint64) error {
	if p.guard == nil {
		return nil
	}
	return p.guard.GrowMemory(limit)
}

// Kill ends the child at once.
func (p *Process) Kill() {
	if p.cmd == nil {
		_ = p.guard.Signal(unix.SIGKILL)
		return
	}
	_ = p.cmd.Process.Kill()
}

// Stop ends the control connection, which asks the child to end, and waits; a child that
// has not ended when ctx does is killed.
func (p *Process) Stop(ctx context.Context) error {
	_ = p.Control.Shutdown() // whoever else holds it
	p.Control.Close()
	select {
	case <-p.done:
	case <-ctx.Done():
		p.Kill()
		<-p.done
	}
	return p.err
}

func (p *Process) describe(err error) error {
	if err == nil {
		return nil
	}
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		if last := p.tail.lastLine(); last != "" {
			return fmt.Errorf("%s: %w: %s", p.Name, ee, last)
		}
	}
	return fmt.Errorf("%s: %w", p.Name, err)
}

// tail keeps the end of what a child wrote.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailSize = 4096

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if len(t.buf) > tailSize {
		t.buf = append([]byte(nil), t.buf[len(t.buf)-tailSize:]...)
	}
	return len(b), nil
}

func (t *tail) lastLine() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(string(bytes.TrimSpace(t.buf)), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// Main is the main function of a child program: it takes the control connection and runs
// until body returns. The context ends on SIGTERM and SIGINT. It does not return.
func Main(name string, body func(ctx context.Context, log *slog.Logger, control *ipc.Conn) error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("service", name)
	signal.Ignore(unix.SIGPIPE) // a word that nobody hears any more must not be the last
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := func() error {
		f := os.NewFile(controlFD, "control")
		if _, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil {
			return errors.New("this program is started by redoubt-builder, not by hand: use `redoubt up`")
		}
		unix.CloseOnExec(controlFD)
		control, err := ipc.FromFile(f)
		if err != nil {
			return err
		}
		defer control.Close()
		return body(ctx, log, control)
	}()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
	os.Exit(0)
}
