package programs

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Program is a start of another's program.
type Program struct {
	Name  string     // as for [Find]
	Files []*os.File // its descriptors from 3 on; the caller's
	// Dir is the one directory in which it writes; "": none.
	Dir string
	// Args are its arguments. dir is where it finds Dir, which differs in a sandbox.
	Args func(dir string) []string
	// Output takes what it prints. It is not written to any more once Wait has returned.
	Output io.Writer
}

// A Starter starts programs: in a sandbox of its own where the Builder does it, else as a child.
type Starter interface {
	// Start starts p, which then belongs to the caller. It ends at the latest with its owner.
	Start(ctx context.Context, p Program) (Running, error)
}

// Running is a program that was started. Its methods may be called concurrently.
type Running interface {
	PID() int     // on the host
	Terminate()   // asks it to end (SIGTERM)
	Kill()        // ends it
	Wait() error  // how it ended, nil for status 0; to be called once
	Exit() string // in words, once Wait has returned
}

// Direct starts programs as children of this process, without a sandbox.
type Direct struct{}

// child is a program that Direct started.
type child struct {
	cmd  *exec.Cmd
	done chan error // has room for one
}

// Start implements [Starter].
func (Direct) Start(_ context.Context, p Program) (Running, error) {
	// It outlives the start, so no context: it is ended by its owner.
	cmd, err := Command(context.Background(), p.Name, p.Args(p.Dir)...)
	if err != nil {
		return nil, err
	}
	return StartChild(cmd, p)
}

// StartChild starts cmd, whose path, arguments and environment are given, with the files and the
// output of p. The child dies with this process.
func StartChild(cmd *exec.Cmd, p Program) (Running, error) {
	cmd.ExtraFiles = p.Files
	cmd.Stdout, cmd.Stderr = p.Output, p.Output
	cmd.SysProcAttr = &unix.SysProcAttr{
		Pdeathsig: unix.SIGKILL,
		Setpgid:   true, // an interrupt typed at the terminal is ours to handle, not the program's
	}
	c := &child{cmd, make(chan error, 1)}
	started := make(chan error, 1)
	// The kernel ties the parent-death signal to the starting thread (prctl(2), PR_SET_PDEATHSIG),
	// so this goroutine keeps its thread until the child is gone.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			c.done <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Name, err)
	}
	return c, nil
}

func (c *child) PID() int    { return c.cmd.Process.Pid }
func (c *child) Terminate()  { _ = c.cmd.Process.Signal(unix.SIGTERM) }
func (c *child) Kill()       { _ = c.cmd.Process.Kill() }
func (c *child) Wait() error { return <-c.done }

func (c *child) Exit() string {
	if c.cmd.ProcessState == nil {
		return "how it ended is not known"
	}
	return c.cmd.ProcessState.String()
}
