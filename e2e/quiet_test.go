package e2e

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
)

// TestWaitingCostsNothingQEMU: while a guest waits for its vTPM, none of our processes runs.
func TestWaitingCostsNothingQEMU(t *testing.T) { waitingCostsNothing(t, "qemu") }

// TestWaitingCostsNothingNative is the same under the native monitor.
func TestWaitingCostsNothingNative(t *testing.T) {
	lab.NeedsKVM(t)
	waitingCostsNothing(t, "native")
}

func waitingCostsNothing(t *testing.T, emulator string) {
	h := newHost(t)
	h.start(start{emulator: emulator, what: "off", args: []string{"--unsafe-vtpm-delay", "100s"}})
	starter{host: h}.follow("guest", "paused") // QEMU: at once; native: after 10 s at the gate
	var pids []int
	for _, p := range []string{"redoubt-supervisor", "redoubt-builder", "redoubt-store-state", "redoubt-vtpm", "redoubt-toolstack", "redoubt-emulator", "qemu-system-x86_64", "swtpm"} {
		pids = append(pids, h.processes(p)...)
	}
	// A tick is 10 ms: one may fall to a timer of QEMU's own. On a busy host the last of the start may reach into a window; what is
	// done again and again is in all of them.
	const window, most = 8 * time.Second, 3
	used := most + 1
	for n := 0; n < 3 && used > most; n++ {
		before := ticks(t, pids)
		<-time.After(window) // what is measured is that nothing happens
		used = ticks(t, pids) - before
		t.Logf("%d processes used %d ms in %v", len(pids), used*10, window)
	}
	if used > most {
		t.Errorf("%d processes used %d ms of processor time in %v of waiting", len(pids), used*10, window)
	}
	h.must("stop", "guest", "--grace", "0s")
}

// ticks is the processor time of processes, in hundredths of a second.
func ticks(t *testing.T, pids []int) int {
	t.Helper()
	sum := 0
	for _, pid := range pids {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		for _, i := range []int{11, 12} { // utime, stime
			n, err := strconv.Atoi(f[i])
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
	}
	return sum
}

// TestHostTPM: the root key is sealed to the host's TPM; another TPM, or none, does not open it,
// and is refused with the reason.
func TestHostTPM(t *testing.T) {
	h := newDownHost(t)
	first, second := hostTPM(h, "tpm-a"), hostTPM(h, "tpm-b")
	h.must("up", "--host-tpm", first)
	ca, err := os.ReadFile(h.path("state", "vtpm", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	h.must("down")
	h.fails(1, "vTPM manager", "up", "--host-tpm", second)
	h.fails(1, "vTPM manager", "up", "--host-tpm", "none")
	h.must("up", "--host-tpm", first)
	again, err := os.ReadFile(h.path("state", "vtpm", "ca.pem"))
	if err != nil || string(again) != string(ca) {
		t.Errorf("another CA after a restart (%v)", err)
	}
	h.must("down")
}

// hostTPM runs an swtpm that stands for a host's TPM and returns its socket.
func hostTPM(h *host, name string) string {
	h.t.Helper()
	dir := h.path(name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	sock := filepath.Join(dir, "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		h.t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		h.t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	defer f.Close()
	ctx, cancel := context.WithCancel(context.Background())
	c := h.cache.Command(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,fd=3", "--flags", "not-need-init,startup-clear")
	c.ExtraFiles = []*os.File{f}
	if err := c.Start(); err != nil {
		cancel()
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { cancel(); _ = c.Wait() })
	return sock
}
