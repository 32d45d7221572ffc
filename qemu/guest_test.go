package qemu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/vtpm/channel"
	"redoubt.dev/redoubt/vtpm/frontend"
)

// A paused guest prints nothing; a resumed one goes on where it was.
func TestPauseResume(t *testing.T) {
	events := make(chan string, 64)
	m, files, con := newDirect(t, "ticks", func(c *Config, _ *Files) { c.TPM = NoTPM }, Hooks{
		Event: func(e Event) { events <- e.Name },
	})
	startMachine(t, m, files, nil)
	con.wait("TICK 3", bootLimit)
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, events, "STOP")
	// All that the guest wrote before it stopped has left QEMU once QEMU answers again, and
	// stands in the socket; what follows would be written by a running guest.
	before := settled(con)
	after := settled(con)
	if before != after {
		t.Errorf("the paused guest prints: %q", strings.TrimPrefix(after, before))
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, events, "RESUME")
	n := strings.Count(after, "TICK")
	con.waitFor(bootLimit, "more ticks", func(s string) bool { return strings.Count(s, "TICK") > n+2 })
	if err := m.Quit(); err != nil {
		t.Fatal(err)
	}
	wantOutcome(t, m, con, Stopped)
}

// settled is the console's text after three tick lengths of silence on it at most.
func settled(c *console) string {
	timer := time.NewTimer(300 * time.Millisecond)
	defer timer.Stop()
	<-timer.C
	return c.String()
}

func waitEvent(t *testing.T, events <-chan string, want string) {
	t.Helper()
	timer := time.NewTimer(10 * time.Second)
	defer timer.Stop()
	for {
		select {
		case e := <-events:
			if e == want {
				return
			}
		case <-timer.C:
			t.Fatalf("no event %s", want)
		}
	}
}

// backEnd plays the vTPM back end: it opens the gate once begin is closed and the delay is over,
// and then serves from tpm.
func backEnd(t *testing.T, begin <-chan struct{}, delay time.Duration, tpm Transport, log []byte) *channel.Conn {
	t.Helper()
	a, b, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	back := channel.New(b)
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-begin
		timer := time.NewTimer(delay)
		defer timer.Stop()
		<-timer.C
		if back.Send(channel.Frame{Kind: channel.Open, Data: log}) != nil {
			return
		}
		for {
			f, err := back.Receive()
			if err != nil {
				return
			}
			r, err := tpm.Execute(f.Locality, f.Data)
			if err != nil {
				_ = back.Send(channel.Frame{Kind: channel.Failed, Data: []byte(err.Error())})
				return
			}
			if back.Send(channel.Frame{Kind: channel.Reply, Seq: f.Seq, Data: r}) != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = back.Close()
		<-done
	})
	return channel.New(a)
}

// A vTPM that comes late is waited for: the guest is paused at its first command and never
// sees the delay. Early and late gates both place the event log in time.
func TestGate(t *testing.T) {
	for name, late := range map[string]bool{"before the first command": false, "5 s after it": true} {
		t.Run(name, func(t *testing.T) {
			tpm := newSwtpm(t, root(t))
			var waited atomic.Bool
			first := make(chan struct{})
			m, files, con := newDirect(t, "log", nil, Hooks{FirstTPM: func() { close(first) }})
			begin, delay := first, 5*time.Second
			if !late {
				begin, delay = make(chan struct{}), 0
				close(begin)
			}
			fe := frontend.New(backEnd(t, begin, delay, tpm, testLog()), frontend.Options{
				Guest:  m,
				OnOpen: m.SetEventLog,
				OnWait: func() { waited.Store(true) },
			})
			t.Cleanup(func() { _ = fe.Close() })
			startMachine(t, m, files, fe)
			wantOutcome(t, m, con, PowerOff)
			out := con.String()
			if strings.Contains(out, "TPM-bypass") || !strings.Contains(out, "ima: Allocated hash algorithm") {
				t.Errorf("IMA without a TPM:\n%s", out)
			}
			if !strings.Contains(out, hexString(testLog())) {
				t.Errorf("no event log in the guest:\n%s", out)
			}
			if waited.Load() != late {
				t.Errorf("waited: %v", waited.Load())
			}
		})
	}
}

// Several processors, whose kernel rewrites its own code while they run it (static keys); the newer
// kernel with memory on both sides of the hole below 4 GiB.
func TestShapes(t *testing.T) {
	for _, shape := range []struct {
		kernel string
		cpus   int
		memory uint64
	}{{"6.1", 2, 256 << 20}, {"6.12-cloud", 2, 3 << 30}} {
		t.Run(shape.kernel, func(t *testing.T) {
			r := root(t)
			m, files, con := newDirect(t, "patch", func(c *Config, f *Files) {
				c.CPUs, c.Memory = shape.cpus, shape.memory
				path, err := r.Vmlinuz(shape.kernel)
				if err != nil {
					t.Fatal(err)
				}
				_ = f.Kernel.Close()
				if f.Kernel, err = os.Open(path); err != nil {
					t.Fatal(err)
				}
			}, Hooks{})
			if err := m.SetEventLog(testLog()); err != nil {
				t.Fatal(err)
			}
			startMachine(t, m, files, newSwtpm(t, r))
			wantOutcome(t, m, con, PowerOff)
			if out := con.String(); strings.Contains(out, "TPM-bypass") || !strings.Contains(out, hexString(testLog())) {
				t.Errorf("no TPM or no event log:\n%s", out)
			} else if !strings.Contains(out, "PATCHED") {
				t.Errorf("the kernel's code was not rewritten:\n%s", out)
			}
		})
	}
}

// A TPM that fails ends the guest: no guest runs on without its TPM.
func TestTPMFails(t *testing.T) {
	tpm := newSwtpm(t, root(t))
	n := 0
	m, _ := direct(t, "off", transportFunc(func(l uint8, cmd []byte) ([]byte, error) {
		if n++; n > 3 {
			return nil, errors.New("engine is gone")
		}
		return tpm.Execute(l, cmd)
	}), nil)
	outcome, err := m.Wait()
	if outcome != Crash || err == nil || !strings.Contains(err.Error(), "engine is gone") {
		t.Fatalf("%s, %v", outcome, err)
	}
}

// The byte channel carries lines both ways.
func TestChannel(t *testing.T) {
	own, theirs := socketpair(t)
	m, con := direct(t, "channel", nil, func(c *Config, f *Files) { c.TPM, f.Channel = NoTPM, theirs })
	con.wait("GUEST UP channel", bootLimit)
	if _, err := own.WriteString("hello\n"); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	buf := make([]byte, 64)
	for !strings.Contains(got.String(), "\n") {
		n, err := own.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q\n%s", err, got.String(), con)
		}
		got.Write(buf[:n])
	}
	if got.String() != "answer hello\n" {
		t.Errorf("channel: %q", got.String())
	}
	wantOutcome(t, m, con, PowerOff)
	if !strings.Contains(con.String(), "CHANNEL hello "+ChannelName) {
		t.Errorf("port has another name:\n%s", con)
	}
}

// A QEMU that dies is a crash with the reason.
func TestKilled(t *testing.T) {
	root(t)
	pid := make(chan int, 1)
	m := New(Config{Name: "idle", Memory: 64 << 20, CPUs: 1, Firmware: SeaBIOS, TPM: NoTPM}, Hooks{})
	m.onStart = func(p int) { pid <- p }
	startMachine(t, m, Files{}, nil)
	if err := unix.Kill(<-pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if o, err := m.Wait(); o != Crash || err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("%s, %v", o, err)
	}
}

// The end of the context ends QEMU.
func TestCancel(t *testing.T) {
	root(t)
	ctx, cancel := context.WithCancel(context.Background())
	m := New(Config{Name: "idle", Memory: 64 << 20, CPUs: 2, Firmware: SeaBIOS, TPM: NoTPM}, Hooks{})
	if err := m.Start(ctx, Files{}, nil); err != nil {
		t.Fatal(err)
	}
	cancel()
	if o, err := m.Wait(); o != Stopped || err != nil {
		t.Fatalf("%s, %v", o, err)
	}
}

// What QEMU says when it refuses to start comes back.
func TestStartFails(t *testing.T) {
	root(t)
	_, theirs := newConsole(t)
	m := New(Config{Name: "bad", Memory: 64 << 20, CPUs: 1, TPM: NoTPM, CommandLine: "x"}, Hooks{})
	err := m.Start(context.Background(), Files{Kernel: tempFile(t, "kernel", []byte("no kernel")), Console: theirs}, nil)
	if err == nil || err.Error() != "qemu bad: qemu: invalid kernel header" {
		t.Fatal(err)
	}
	ram := tempFile(t, "ram", make([]byte, 4096))
	err = New(Config{Name: "bad", Memory: 64 << 20, CPUs: 1, TPM: NoTPM}, Hooks{}).Start(context.Background(), Files{
		Kernel: tempFile(t, "kernel", nil), RAM: ram,
	}, nil)
	if err == nil || !strings.Contains(err.Error(), "4096 bytes") {
		t.Fatal(err)
	}
	if _, err := ram.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a failed start kept a descriptor: %v", err)
	}
}
