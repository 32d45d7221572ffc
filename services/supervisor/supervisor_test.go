package supervisor

import (
	"bufio"
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
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/services/storm"
)

// The test binary is the Builder, too: its argument says how it lives and ends.
const builder = "as-builder"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == builder {
		if err := live(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func die() error {
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {}
}

func live(how string) error {
	c, err := ipc.FromFile(os.NewFile(StoreFD, "supervisor"))
	if err != nil {
		return err
	}
	kept, left, generation, err := fdstore.Open(c)
	if err != nil {
		return err
	}
	switch how {
	case "fails":
		os.Exit(1)
	case "storms":
		return die()
	case "panics":
		if generation == 1 {
			panic("now")
		}
	case "resets":
		if generation <= 2*storm.MaxDeaths {
			os.Exit(ExitReset)
		}
	case "nonsense": // what it says is no change; it is ended
		if generation == 1 {
			if err := kept.Note("nothing", 0); err != nil {
				return err
			}
			select {}
		}
	case "waits":
		ready := os.NewFile(ReadyFD, "ready")
		end := make(chan os.Signal, 1)
		signal.Notify(end, unix.SIGTERM)
		if _, err := ready.WriteString("ready\n"); err != nil {
			return err
		}
		<-end
	case "dies": // with a child, and what it has kept
		switch generation {
		case 1, 2:
			n := left.Names("")
			if len(n) != int(generation)-1 {
				return fmt.Errorf("generation %d: left %v", generation, n)
			}
			r, w, err := os.Pipe()
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(w, "of %d\n", generation); err != nil {
				return err
			}
			if err := kept.Put(fmt.Sprint(generation), generation, r); err != nil {
				return err
			}
			if err := exec.Command("sleep", "0.05").Start(); err != nil {
				return err
			}
			return die()
		}
		for _, n := range []string{"1", "2"} {
			e, ok := left.Take(n)
			var of uint64
			if err := e.Decode(&of, 1); err != nil || !ok {
				return fmt.Errorf("%s: %v, %w", n, ok, err)
			}
			if said, err := bufio.NewReader(e.Files[0]).ReadString('\n'); said != "of "+n+"\n" || fmt.Sprint(of) != n {
				return fmt.Errorf("%s: %q, %d, %w", n, said, of, err)
			}
		}
	}
	return nil
}

func supervise(t *testing.T, ctx context.Context, how string, ready *os.File) error {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	err = Run(ctx, Config{
		Lock: filepath.Join(t.TempDir(), "run", "lock"), Program: self, Args: []string{builder, how},
		Ready: ready, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Output: out,
	})
	if t.Failed() || err != nil {
		said, _ := os.ReadFile(out.Name())
		t.Logf("%s: %s", how, said)
	}
	return err
}

// TestRun: a Builder that dies is followed by another one, which has what the last ones kept, unless they die again
// and again; one that ends by itself is the end.
func TestRun(t *testing.T) {
	for how, want := range map[string]string{
		"dies": "", "panics": "", "resets": "", "nonsense": "", "ends": "",
		"fails": errEnded.Error(), "storms": "again and again: signal: killed",
	} {
		t.Run(how, func(t *testing.T) {
			err := supervise(t, t.Context(), how, nil)
			if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
			if Ended(err) != (how == "fails") {
				t.Errorf("%v: ended by its own word: %v", err, Ended(err))
			}
		})
	}
	// The children of those that died became this process's.
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if errors.Is(err, unix.ECHILD) {
			break
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(pid, err)
		}
	}
}

// TestStop: the end of the context is the Builder's to carry out, and no other one follows.
func TestStop(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		if line, err := bufio.NewReader(r).ReadString('\n'); line != "ready\n" {
			t.Errorf("%q, %v", line, err)
		}
	}()
	if err := supervise(t, ctx, "waits", w); err != nil {
		t.Error(err)
	}
	w.Close()
}
