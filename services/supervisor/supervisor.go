// Package supervisor is the first process of Redoubt: it starts the Builder, holds for it what must
// outlive it (package fdstore), and starts another one when it has died. It serves nobody else, knows
// nothing of guests, and reads nothing but what the Builder itself says.
//
// What loses its parent with the Builder becomes the Supervisor's child, which takes its end from the
// kernel's list. When the Supervisor dies, the Builder ends everything; where both die at once, all that
// was held is closed, and whoever was at the other end ends itself.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/services/storm"
)

// Descriptors of a Builder, besides the standard ones.
const (
	StoreFD = 3 // its connection to the Supervisor, fdstore.Open's
	ReadyFD = 4 // where it says "ready\n", if anybody wants to know
)

// ExitReset is the exit status of a Builder that wants to be followed by another one. With 0 and 1 it has
// ended everything; any other end is its death.
const ExitReset = 75 // EX_TEMPFAIL, sysexits(3)

// Config of a Supervisor.
type Config struct {
	Lock    string   // a file, see [Lock]
	Program string   // the Builder's
	Args    []string // its arguments
	Env     []string
	Ready   *os.File // becomes ReadyFD; nil: nobody wants to know
	Log     *slog.Logger
	Output  io.Writer // of the Builder; an *os.File
}

// Run keeps a Builder running until ctx ends, upon which the Builder is asked to end everything, or until
// one ends by itself or more than storm.MaxDeaths die within storm.DeathWindow. The error is nil
// where the Builder has ended everything in order.
func Run(ctx context.Context, cfg Config) error {
	unlock, err := Lock(cfg.Lock)
	if err != nil {
		return err
	}
	defer unlock()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper: %w", err)
	}
	held := fdstore.NewHeld()
	defer held.Close()
	var deaths storm.Deaths
	for generation := uint64(1); ; generation++ {
		end, err := once(ctx, cfg, held, generation)
		if err != nil {
			return err
		}
		code := end.ExitStatus() // -1 for a signal
		switch {
		case end.Exited() && code == 0:
			return nil
		case end.Exited() && code == 1:
			return errEnded
		case ctx.Err() != nil:
			return fmt.Errorf("the Builder died while it ended everything: %s", describe(end))
		case end.Exited() && code == ExitReset:
			cfg.Log.Info("the Builder is replaced", "kept", held.Len())
			continue
		}
		if deaths.Add(time.Now(), storm.MaxDeaths) {
			return fmt.Errorf("the Builder dies again and again: %s", describe(end))
		}
		cfg.Log.Warn("the Builder died and is started again", "end", describe(end), "kept", held.Len())
	}
}

// errEnded follows the Builder's own words.
var errEnded = errors.New("the Builder ended everything")

// Ended says that the Builder has told why, and that everything ended in order.
func Ended(err error) bool { return errors.Is(err, errEnded) }

// once runs one Builder.
func once(ctx context.Context, cfg Config, held *fdstore.Held, generation uint64) (end unix.WaitStatus, err error) {
	ours, theirs, err := ipc.Pair()
	if err != nil {
		return end, err
	}
	pidfd := -1
	c := exec.Command(cfg.Program, cfg.Args...)
	c.Env, c.Stdout, c.Stderr = cfg.Env, cfg.Output, cfg.Output
	c.ExtraFiles = []*os.File{theirs}
	if cfg.Ready != nil {
		c.ExtraFiles = append(c.ExtraFiles, cfg.Ready)
	}
	c.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd, Setpgid: true} // a terminal's signals are for the Supervisor
	err = c.Start()
	theirs.Close()
	if err != nil {
		ours.Close()
		return end, err
	}
	told := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(told)
		_ = unix.PidfdSendSignal(pidfd, unix.SIGTERM, nil, 0)
	})
	served := make(chan error, 1)
	go func() { // ends with the connection, which ends with the Builder
		err := held.Serve(ours, generation)
		if err != nil {
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		}
		served <- err
	}()
	end, err = reap(c.Process.Pid)
	if !stop() {
		<-told
	}
	if serr := <-served; serr != nil {
		cfg.Log.Error("what the Builder wanted held", "err", serr)
	}
	return end, errors.Join(err, c.Process.Release(), unix.Close(pidfd))
}

// reap waits for the Builder's end, and meanwhile for those of all who lost their parent.
func reap(builder int) (end unix.WaitStatus, err error) {
	for {
		pid, err := eintr.Value(func() (int, error) { return unix.Wait4(-1, &end, 0, nil) })
		switch {
		case err != nil:
			return end, fmt.Errorf("wait for the Builder: %w", err)
		case pid == builder:
			return end, nil
		}
	}
}

func describe(end unix.WaitStatus) string {
	if end.Signaled() {
		return "signal: " + end.Signal().String()
	}
	return "exit status " + strconv.Itoa(end.ExitStatus())
}
