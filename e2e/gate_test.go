package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
)

var delays = []time.Duration{0, 50 * time.Millisecond, time.Second, 5 * time.Second, 30 * time.Second}

// TestGateQEMU: however late the vTPM is, and on every kernel, the guest keeps its trust.
func TestGateQEMU(t *testing.T) { gateDelays(t, "qemu", debian.Usual, "6.12") }

// TestGateNative is the same under the native monitor.
func TestGateNative(t *testing.T) {
	lab.NeedsKVM(t)
	gateDelays(t, "native", debian.Usual, "6.12-cloud")
}

// gateDelays tries each delay on each kernel: on one processor, on two (0 and 5 s, where one runs on
// while the other waits) and on four (30 s, all of which are paused).
func gateDelays(t *testing.T, emulator string, kernels ...string) {
	h := newHost(t)
	cpus := map[time.Duration]int{0: 2, 50 * time.Millisecond: 1, time.Second: 1, 5 * time.Second: 2, 30 * time.Second: 4}
	name := func(kernel string, delay time.Duration) string {
		return strings.ReplaceAll(fmt.Sprintf("g-%s-%d", kernel, delay.Milliseconds()), ".", "-")
	}
	// Those that wait for longest do so, asleep, while the others are tested.
	longest := delays[len(delays)-1]
	for _, kernel := range kernels {
		h.late(name(kernel, longest), emulator, kernel, longest, cpus[longest])
	}
	for _, delay := range delays {
		for _, kernel := range kernels {
			t.Run(fmt.Sprintf("%s/%v", kernel, delay), func(t *testing.T) {
				h := &host{t, h.dir, h.cache}
				if delay != longest {
					h.late(name(kernel, delay), emulator, kernel, delay, cpus[delay])
				}
				h.gated(name(kernel, delay), delay)
			})
		}
	}
}

// late starts a guest whose vTPM is late.
func (h *host) late(name, emulator, kernel string, delay time.Duration, cpus int) {
	h.t.Helper()
	h.start(start{name: name, emulator: emulator, kernel: kernel, what: "off", args: []string{"--unsafe-vtpm-delay", delay.String(), "--cpus", strconv.Itoa(cpus)}})
}

// gated checks that a guest whose vTPM is late keeps its trust.
func (h *host) gated(name string, delay time.Duration) {
	h.t.Helper()
	g := h.awaitDown(name, bootTime+delay)
	if g.State != "stopped" || !strings.Contains(h.console(name), "E2E-DONE") {
		h.t.Fatalf("guest is %s: %s\n%s", g.State, g.Reason, lastLines(h.console(name), 30))
	}
	readFacts(h.console(name)).keptTrust(h.t)
	access, ok := g.at("tpm-first-access")
	ready, ok2 := g.at("vtpm-ready")
	ima, ok3 := g.at("ima")
	if !ok || !ok2 || !ok3 {
		h.t.Fatalf("the timeline lacks a moment: %+v", g.Timeline)
	}
	if ready < delay || ima < ready {
		h.t.Errorf("ready after %v of a delay of %v, IMA after %v", ready, delay, ima)
	}
	_, waited := g.at("gate-waited")
	if delay-access > 100*time.Millisecond && !waited {
		h.t.Errorf("first access at %v, ready at %v: nothing says that the guest waited", access, ready)
	}
	// What is long enough for a guest's watchdog stops its clock.
	if _, paused := g.at("paused"); delay-access > 11*time.Second && !paused {
		h.t.Errorf("waited %v and was not paused", delay-access)
	}
}

// TestGateUnderLoadQEMU: the same while both processors are busy elsewhere.
func TestGateUnderLoadQEMU(t *testing.T) { gateUnderLoad(t, "qemu") }

// TestGateUnderLoadNative is the same under the native monitor.
func TestGateUnderLoadNative(t *testing.T) {
	lab.NeedsKVM(t)
	gateUnderLoad(t, "native")
}

func gateUnderLoad(t *testing.T, emulator string) {
	h := newHost(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for range 2 {
		c := exec.CommandContext(ctx, "sh", "-c", "while :; do :; done")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { cancel(); _ = c.Wait() }()
	}
	h.late("loaded", emulator, debian.Usual, 20*time.Second, 1)
	h.gated("loaded", 20*time.Second)
}

// TestWithoutGateTrustIsLost shows what the gate is for: without it a late vTPM costs the
// guest its trust for the whole boot, silently.
func TestWithoutGateTrustIsLost(t *testing.T) {
	h := newHost(t)
	h.start(start{emulator: "qemu", what: "off", args: []string{"--unsafe-no-gate", "--unsafe-vtpm-delay", "60s"}})
	h.awaitDown("guest", bootTime)
	f := readFacts(h.console("guest"))
	if !strings.Contains(strings.Join(f.kernel, "\n"), "TPM-bypass") || strings.Trim(f.agg, "sha1256:0") != "" {
		t.Fatalf("no bypass without the gate? boot_aggregate %q\n%s", f.agg, strings.Join(f.kernel, "\n"))
	}
}

// TestGateFailsClosed: a vTPM that does not come fails its guest, which never goes on.
func TestGateFailsClosed(t *testing.T) {
	h := newHost(t)
	spec := h.path("late.yaml")
	h.writeSpec(spec, "late", "qemu", "off", "tpm: {timeout: 12s}\n")
	h.must("run", spec, "--unsafe-vtpm-delay", "5m")
	g := h.awaitDown("late", bootTime)
	if g.State != "failed" || !strings.Contains(g.Reason, "not ready in time") {
		t.Fatalf("guest is %s: %s", g.State, g.Reason)
	}
	if c := h.console("late"); strings.Contains(c, "AGG ") {
		t.Fatalf("the guest went on without its vTPM:\n%s", lastLines(c, 20))
	}
}
