package state_test

import (
	"context"
	"os"
	"os/exec"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/state"
)

// TestMain lets the test binary be a worker or a store of its own, so that tests can kill them.
func TestMain(m *testing.M) {
	switch os.Getenv("STORE_TEST_ROLE") {
	case "logic":
		if err := logic.Serve(3); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	case "store":
		child()
		os.Exit(0)
	case "relay":
		relay(3, 4)
		os.Exit(0)
	case "echo":
		relay(3, -1)
		os.Exit(0)
	}
	code := m.Run()
	if built != "" {
		_ = os.RemoveAll(built)
	}
	os.Exit(code)
}

// inProcess runs workers as goroutines of the test, each over a socket of its own.
func inProcess(tb testing.TB) state.Workers {
	return behaving(tb, logic.Serve)
}

// behaving runs workers that do what serve does.
func behaving(tb testing.TB, serve func(fd int) error) state.Workers {
	var wg sync.WaitGroup
	tb.Cleanup(wg.Wait)
	return state.WorkersFunc(func(context.Context) (*state.Worker, error) {
		c, f, err := ipc.Pair()
		if err != nil {
			return nil, err
		}
		wg.Go(func() {
			defer f.Close()
			_ = serve(int(f.Fd()))
		})
		return &state.Worker{Conn: c, Kill: func() {}}, nil
	})
}

// programs starts a program for each worker, and tells started of it.
func programs(tb testing.TB, path string, started func(*os.Process), env ...string) state.Workers {
	var wg sync.WaitGroup
	tb.Cleanup(wg.Wait)
	return state.WorkersFunc(func(context.Context) (*state.Worker, error) {
		c, f, err := ipc.Pair()
		if err != nil {
			return nil, err
		}
		defer f.Close()
		cmd := exec.Command(path)
		cmd.Env = env
		cmd.ExtraFiles = []*os.File{f}
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if err := cmd.Start(); err != nil {
			c.Close()
			return nil, err
		}
		started(cmd.Process)
		wg.Go(func() { _ = cmd.Wait() })
		return &state.Worker{Conn: c, Kill: func() { _ = cmd.Process.Kill() }}, nil
	})
}

// self starts the test binary as workers.
func self(tb testing.TB) state.Workers {
	return programs(tb, "/proc/self/exe", func(*os.Process) {}, "STORE_TEST_ROLE=logic")
}
