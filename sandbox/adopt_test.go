package sandbox

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// held keeps what a Guard wants held.
func held(t *testing.T, g *Guard) *[]Held {
	t.Helper()
	var all []Held
	copyOf := func(f *os.File) *os.File {
		if f == nil {
			return nil
		}
		c, err := f.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		fd := -1
		if cerr := c.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
		return os.NewFile(uintptr(fd), f.Name())
	}
	g.Hold = func(h Held) error {
		h.PIDFD, h.Notes = copyOf(h.PIDFD), copyOf(h.Notes)
		all = append(all, h)
		return nil
	}
	return &all
}

// late starts the probe that makes a call outside its list when its input ends.
func late(t *testing.T, s *Spec) (g *Guard, h *[]Held, in io.Closer, out *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(probe(t), "late")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	g, err = (&Host{Launcher: probe(t)}).Prepare(cmd, s)
	if err != nil {
		t.Fatal(err)
	}
	h = held(t, g)
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	out = bufio.NewReader(stdout)
	if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return g, h, stdin, out
}

// TestAdopt: who adopts a process whose guard is gone ends it for a call outside its list, which else is
// only not made (TestParentGone).
func TestAdopt(t *testing.T) {
	s := &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, ""), Memory: 64 << 20}
	g, all, in, out := late(t, s)
	if len(*all) != 2 || (*all)[0].Notes != nil || (*all)[1].Notes == nil || (*all)[0].PID != g.PID() {
		t.Fatalf("held: %+v", *all)
	}
	(*all)[0].PIDFD.Close()
	g.notes.Close() // as the end of its process does
	<-g.watched
	next := Adopt((*all)[1])
	if next.PID() != g.PID() {
		t.Errorf("process %d", next.PID())
	}
	in.Close()
	if line, err := out.ReadString('\n'); !errors.Is(err, io.EOF) {
		t.Errorf("%q, %v", line, err)
	}
	_ = g.cmd.Wait() // its parent hears of its end
	err := next.Wait()
	var v *Violation
	if !errors.As(err, &v) || v.Program != "test" {
		t.Errorf("%v", err)
	}
	if group := (*all)[1].Group; group != "" {
		if _, err := os.Stat(group); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its cgroup is left: %v", err)
		}
	}
}

// TestAdoptSignals: who adopts a process ends it and hears of its end, though not how it ended.
func TestAdoptSignals(t *testing.T) {
	s := &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "")}
	for _, how := range []string{"adopted", "ended"} {
		g, all, in, _ := late(t, s)
		g.notes.Close()
		<-g.watched
		go func() { _ = g.cmd.Wait() }() // the parent's
		if how == "ended" {
			(*all)[1].PIDFD.Close()
			if err := End((*all)[0]); err != nil {
				t.Error(err)
			}
			(*all)[1].Notes.Close()
		} else {
			(*all)[0].PIDFD.Close()
			next := Adopt((*all)[1])
			if err := next.Signal(unix.SIGKILL); err != nil {
				t.Error(err)
			}
			if err := next.Wait(); !errors.Is(err, ErrNotParent) {
				t.Error(err)
			}
		}
		in.Close()
	}
}

// TestHoldFails: a program of which nobody would know does not run.
func TestHoldFails(t *testing.T) {
	for fail := range 2 {
		cmd := exec.Command(probe(t), "busy")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		g, err := (&Host{Launcher: probe(t)}).Prepare(cmd, &Spec{Name: "test", UID: testID, GID: testID, Policy: goPolicy(t, "")})
		if err != nil {
			t.Fatal(err)
		}
		nobody, n := errors.New("nobody"), 0
		g.Hold = func(Held) error {
			if n++; n == fail+1 {
				return nobody
			}
			return nil
		}
		if err := g.Start(); !errors.Is(err, nobody) {
			t.Error(err)
		}
		if said, _ := io.ReadAll(out); len(said) > 0 {
			t.Errorf("it ran: %q", said)
		}
	}
}
