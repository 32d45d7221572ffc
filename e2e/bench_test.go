package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
)

// BenchmarkStartParallel: the ratio of the time from the request to IMA's initialisation of a
// guest started beside its vTPM and gated, to that of one started when its vTPM was ready. The
// vTPM takes as long as a guest takes to its first TPM access, measured in the same run.
func BenchmarkStartParallel(b *testing.B) {
	eachEmulator(b, func(b *testing.B, s starter) {
		delay := s.delay()
		ours, peer := paired(b, s.to("ima", delay), s.to("ima", delay, "--unsafe-vtpm-first"))
		reportRatio(b, ours, peer)
	})
}

// BenchmarkStartPolling: the ratio of the same start with a poll of 100 ms in the gate's place
// to the gated one.
func BenchmarkStartPolling(b *testing.B) {
	eachEmulator(b, func(b *testing.B, s starter) {
		delay := s.delay()
		polled, gated := paired(b, s.to("ima", delay, "--unsafe-poll", "100ms"), s.to("ima", delay))
		reportRatio(b, polled, gated)
	})
}

// BenchmarkStartNoTPM: the ratio of the time from the request to the first program of a guest
// whose vTPM is made at once, to that of a guest without a TPM.
func BenchmarkStartNoTPM(b *testing.B) {
	eachEmulator(b, func(b *testing.B, s starter) {
		with, without := paired(b, s.to("init"), s.to("init", "--no-tpm"))
		reportRatio(b, with, without)
	})
}

// to makes a measurement of starts: how long after the request the event came.
func (s starter) to(kind string, args ...string) func() time.Duration {
	return func() time.Duration { return s.until(kind, args...)[kind] }
}

// delay makes the vTPM as late as a guest is at its first TPM access. The first start of all is
// not counted: it finds no program and no kernel in memory.
func (s starter) delay() string {
	s.t.Helper()
	s.until("tpm-first-access")
	var access []time.Duration
	for range minRounds {
		access = append(access, s.until("tpm-first-access")["tpm-first-access"])
	}
	s.t.Logf("first TPM access %v after the request", rounded(access))
	return "--unsafe-vtpm-delay=" + median(access).Round(time.Millisecond).String()
}

// BenchmarkBootToInit: the ratio of the native monitor's time from the request to the first
// program to the peer's from its start, same kernel, initrd, command line, memory, one vCPU.
// Ours is the product's whole way: the API's call, the sealed copies, the emulator's process.
func BenchmarkBootToInit(b *testing.B) {
	lab.NeedsKVM(b)
	for _, p := range peerMonitors {
		b.Run(p.name, func(b *testing.B) {
			s := starter{newHost(b), "native"}
			peer := p.prepare(b, s.host)
			ours, theirs := paired(b, s.to("init", "--no-tpm"), peer)
			reportRatio(b, ours, theirs)
		})
	}
}

// BenchmarkMonitorMemory: the resident memory of the emulator's process of a native guest with
// one vCPU and 128 MiB, without the guest's memory.
func BenchmarkMonitorMemory(b *testing.B) {
	lab.NeedsKVM(b)
	h := newHost(b)
	var resident uint64
	n := 0
	for b.Loop() {
		n++
		name := fmt.Sprintf("memory-%d", n)
		h.start(start{name: name, emulator: "native", what: "deaf", args: []string{"--memory", "128MiB"}})
		h.await(name, "READY", bootTime)
		pids := h.processes("redoubt-emulator")
		if len(pids) != 1 {
			b.Fatalf("emulator processes: %v", pids)
		}
		own, guest := residentMemory(b, pids[0], "/memfd:redoubt-"+name)
		if guest < 32<<20 {
			b.Fatalf("%d bytes of the guest's memory are resident: it is not where it is looked for", guest)
		}
		resident = max(resident, own)
		h.must("stop", name, "--grace", "0s")
	}
	b.ReportMetric(float64(resident)/(1<<20), "MiB")
	b.ReportMetric(0, "ns/op")
}

// residentMemory sums the resident bytes of a process by its mappings (proc_pid_smaps(5)): those
// of the guest's memory, named, and all others.
func residentMemory(t testing.TB, pid int, guestMemory string) (own, guest uint64) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "smaps"))
	if err != nil {
		t.Fatal(err)
	}
	of := &own
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		switch {
		case len(f) >= 5 && strings.Contains(f[0], "-"): // begin-end perms offset device inode [path]
			of = &own
			if len(f) >= 6 && f[5] == guestMemory {
				of = &guest
			}
		case len(f) == 3 && f[0] == "Rss:":
			kb, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			*of += kb << 10
		}
	}
	return own, guest
}
