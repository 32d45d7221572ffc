package monitor

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
)

// swtpm is a real TPM behind a socket, one command at a time.
type swtpm struct {
	mu    sync.Mutex
	conn  net.Conn
	first func() // before the first command goes out
}

func startTPM(t testing.TB) *swtpm {
	t.Helper()
	dir := t.TempDir()
	socket := filepath.Join(dir, "data")
	cmd := cache(t).Command(t.Context(), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	ready, err := cmd.StderrPipe() // closed with the process
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	go func() { _, _ = io.Copy(io.Discard, ready) }()
	deadline := time.Now().Add(10 * time.Second)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			t.Cleanup(func() { _ = conn.Close() })
			return &swtpm{conn: conn}
		}
		if time.Now().After(deadline) {
			t.Fatalf("swtpm does not answer: %v", err)
		}
		<-time.After(10 * time.Millisecond) // a foreign program without a readiness event
	}
}

func (s *swtpm) Execute(locality uint8, command []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first != nil {
		s.first()
		s.first = nil
	}
	if locality != 0 {
		return nil, fmt.Errorf("locality %d", locality)
	}
	if _, err := s.conn.Write(command); err != nil {
		return nil, err
	}
	r := make([]byte, 4096)
	if _, err := io.ReadFull(s.conn, r[:10]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(r[2:])
	if n < 10 || n > 4096 {
		return nil, fmt.Errorf("response of %d bytes", n)
	}
	_, err := io.ReadFull(s.conn, r[10:n])
	return r[:n], err
}

// Both kernels' drivers find the TPM before IMA looks for it, also when its first command
// waits, and then with the whole guest paused.
func TestTPM(t *testing.T) {
	lab.NeedsKVM(t)
	type late struct {
		kernel string
		wait   time.Duration
		pause  bool
		vcpus  int
	}
	boots := func(c late) {
		t.Run(fmt.Sprintf("%s-%v", c.kernel, c.wait), func(t *testing.T) {
			tpm := startTPM(t)
			accessed := 0
			g := boot{
				kernel: c.kernel, vcpus: c.vcpus, what: "tpm", extra: "ima_policy=tcb",
				change: func(cfg *Config) { cfg.TPM, cfg.OnTPMAccess = tpm, func() { accessed++ } },
			}.build(t)
			tpm.first = func() {
				if c.pause {
					if err := g.Pause(); err != nil {
						t.Error(err)
					}
				}
				<-time.After(c.wait)
				if err := g.SetEventLog([]byte("not a log")); err != nil {
					t.Error(err)
				}
				if c.pause {
					if err := g.Resume(); err != nil {
						t.Error(err)
					}
				}
			}
			g.expect(t, PowerOff)
			out := g.console.String()
			for _, bad := range []string{"TPM-bypass", "lockup", "stall", "timed out", "tpm_crb MSFT0101:00: error"} {
				if strings.Contains(out, bad) {
					t.Errorf("the guest complains of %q", bad)
				}
			}
			aggregate := g.console.value("BOOTAGG")
			if !strings.Contains(aggregate, "boot_aggregate") || strings.Contains(aggregate, "0000000000000000000000") {
				t.Errorf("boot_aggregate: %q", aggregate)
			}
			if accessed != 1 {
				t.Errorf("OnTPMAccess was called %d times", accessed)
			}
			if t.Failed() {
				t.Logf("console:\n%s", out)
			}
		})
	}
	// The one that waits for longest does so, asleep, while the others are tested.
	var longest sync.WaitGroup
	longest.Go(func() { boots(late{"6.12", 30 * time.Second, true, 2}) })
	for _, c := range []late{{"6.1", 0, false, 1}, {"6.12", 0, false, 2}, {"6.1", 3 * time.Second, false, 2}} {
		boots(c)
	}
	longest.Wait()
}

// A TPM that fails ends the guest: it must not run on without.
func TestTPMFails(t *testing.T) {
	lab.NeedsKVM(t)
	g := boot{what: "tpm", change: func(c *Config) { c.TPM = brokenTPM{} }}.build(t)
	if o := g.run(t); o.Kind != Crash || !strings.Contains(o.Reason, "gone") {
		t.Errorf("outcome %v", o)
	}
}

type brokenTPM struct{}

func (brokenTPM) Execute(uint8, []byte) ([]byte, error) { return nil, fmt.Errorf("gone") }

// A guest whose TPM never answers can still be stopped, paused or not: Run closes the transport.
func TestTPMStuck(t *testing.T) {
	lab.NeedsKVM(t)
	tpm := stuckTPM{make(chan struct{}), make(chan struct{})}
	g := boot{vcpus: 2, what: "tpm", change: func(c *Config) { c.TPM = tpm }}.build(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-tpm.asked
		if err := g.Pause(); err != nil {
			t.Error(err)
		}
		cancel()
	}()
	if o, err := g.Run(ctx); err != nil || o.Kind != Stopped {
		t.Errorf("outcome %v, %v", o, err)
	}
}

// stuckTPM never answers, until closed.
type stuckTPM struct {
	asked, closed chan struct{}
}

func (s stuckTPM) Execute(uint8, []byte) ([]byte, error) {
	close(s.asked)
	<-s.closed
	return nil, io.EOF
}

func (s stuckTPM) Close() error { close(s.closed); return nil }
