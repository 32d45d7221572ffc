package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkHostUp: how long after its start the Builder serves the API: all services run, in their
// sandboxes. The first start on a state directory, which makes keys too, is not counted but told (-v).
func BenchmarkHostUp(b *testing.B) {
	h := newDownHost(b)
	first := h.up()
	var all []time.Duration
	for b.Loop() {
		all = append(all, h.up())
	}
	for len(all) < 5 {
		all = append(all, h.up())
	}
	b.Logf("first %v, then %v", first.Round(time.Millisecond), rounded(all))
	b.ReportMetric(float64(median(all).Microseconds())/1000, "ms")
	b.ReportMetric(0, "ns/op")
}

// up starts the Builder as `redoubt up` does, waits until it is ready, and ends it.
func (h *host) up() time.Duration {
	h.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Close()
	c := exec.Command(filepath.Join(programsDir, "redoubt-supervisor"), "-lock", h.path("run", "lock"), "-ready-fd", "3",
		"--", "-run-dir", h.path("run"), "-state-dir", h.path("state"))
	c.Env = append(os.Environ(), "REDOUBT_TOOLS="+h.cache.Tools())
	c.ExtraFiles = []*os.File{w}
	begin := time.Now()
	err = c.Start()
	w.Close()
	if err != nil {
		h.t.Fatal(err)
	}
	line, err := bufio.NewReader(r).ReadString('\n')
	took := time.Since(begin)
	if line != "ready\n" {
		h.t.Errorf("the Builder says %q: %v", line, err)
	}
	if err := c.Process.Signal(unix.SIGTERM); err != nil {
		h.t.Error(err)
	}
	if err := c.Wait(); err != nil {
		h.t.Error(err)
	}
	return took
}

// BenchmarkServiceMemory: the memory of the Builder and of all services with no guest; what processes
// share is counted once (PSS).
func BenchmarkServiceMemory(b *testing.B) {
	h := newHost(b)
	h.settled()
	var sum uint64
	for b.Loop() {
		by := map[string]uint64{}
		sum = 0
		for _, p := range h.family() {
			n := sharedMemory(b, p.pid)
			by[p.name] += n >> 10
			sum += n
		}
		b.Logf("KiB: %v", by)
	}
	b.ReportMetric(float64(sum)/(1<<20), "MiB")
	b.ReportMetric(0, "ns/op")
}

// sharedMemory is a process's proportional set size in bytes (proc_pid_smaps_rollup(5)).
func sharedMemory(t testing.TB, pid int) uint64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(text)) {
		if f := strings.Fields(l); len(f) == 3 && f[0] == "Pss:" {
			kb, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatalf("process %d: no Pss", pid)
	return 0
}
