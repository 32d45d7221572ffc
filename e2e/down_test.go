package e2e

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/pidfd"
)

// TestUpDown: both are idempotent, and nothing is left running.
func TestUpDown(t *testing.T) {
	h := newDownHost(t)
	h.fails(1, "start it with `redoubt up`", "ps")
	h.must("down")
	h.fails(2, "--store-reset", "up", "--store-reset", "0")
	h.must("up", "--store-reset", "off")
	h.must("up")
	h.start(start{emulator: "qemu", what: "deaf"})
	pid := h.lockHolder()
	supervisor := openPIDFD(t, pid)
	h.must("down", "--grace", "0s")
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // it has ended, or has not
	if err := pidfd.Await(ctx, supervisor); err != nil {
		t.Errorf("the Supervisor, process %d, outlives `redoubt down`: %v", pid, err)
	}
	h.must("up")
	if out := h.must("ps", "--all"); !strings.Contains(out, "stopped") {
		t.Errorf("the guest is forgotten: %s", out)
	}
	h.must("rm", "guest")
	h.must("down")
}

// TestDownAll: every tenant's guests are asked to power off.
func TestDownAll(t *testing.T) {
	h := newHost(t)
	pool := h.makeTenant("acme")
	h.start(start{name: "button", emulator: "qemu", what: "wait", args: []string{"--no-tpm"}})
	h.must("--tenant", "acme", "run", "--name", "button", "--emulator", "qemu", "--no-tpm", "--kernel", pool+"/kernel", "--initrd", pool+"/initrd",
		"--memory", "256MiB", "--cmdline", debian.Cmdline+" e2e=wait")
	h.await("button", "READY\n", 2*bootTime)
	h.awaitTenant("acme", "button", "READY")
	h.must("down", "--grace", "60s")
	for _, name := range []string{"button", "acme.button"} {
		if out := h.console(name); !strings.Contains(out, "PRESSED") {
			t.Errorf("%s was not asked to power off:\n%s", name, lastLines(out, 20))
		}
	}
}

// TestDownUnanswered: where nobody answers it ends in time, with a word, and later succeeds.
func TestDownUnanswered(t *testing.T) {
	h := newHost(t)
	goOn := h.holdStill("redoubt-supervisor")
	h.kill("Builder", "redoubt-builder") // nobody starts the next one
	r := h.run("down", "--grace", "0s", "--timeout", "1s")
	for _, want := range []string{"guests are not asked to power off: no answer in 1s", "has not ended in 1s", "kill -KILL"} {
		if r.status != 1 || !strings.Contains(r.err, want) {
			t.Errorf("exit status %d, want 1 and %q: %s", r.status, want, r.err)
		}
	}
	goOn()
	h.must("down", "--grace", "0s")
	h.fails(1, "start it with `redoubt up`", "ps")
}

// TestDeafEmulator: an emulator that answers nothing and reads nothing is ended, when the guest's grace is over.
func TestDeafEmulator(t *testing.T) {
	h := newHost(t)
	h.start(start{emulator: "qemu", what: "deaf", args: []string{"--no-tpm"}})
	h.holdStill("redoubt-emulator")
	h.must("stop", "guest", "--grace", "1s")
	if g := h.show("guest"); g.State != "failed" && g.State != "stopped" {
		t.Errorf("guest is %s: %s", g.State, g.Reason)
	}
	h.nothingInStore()
}

// TestDownTakenOver: the Builder that goes on with guests can be told to end before it has come so far.
func TestDownTakenOver(t *testing.T) {
	h := newDownHost(t)
	for range 8 {
		h.must("up")
		h.start(start{emulator: "qemu", what: "deaf", args: []string{"--no-tpm"}})
		supervisor := openPIDFD(t, h.lockHolder())
		h.kill("Builder", "redoubt-builder")
		<-time.After(rand.N(60 * time.Millisecond)) // any moment
		if err := pidfd.Signal(supervisor, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		err := pidfd.Await(ctx, supervisor)
		cancel()
		if err != nil {
			h.dumpLogs()
			t.Fatalf("the Supervisor: %v", err)
		}
		h.must("up")
		h.must("rm", "guest")
		h.must("down")
	}
}
