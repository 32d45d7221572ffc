package e2e

import (
	"context"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/pidfd"
	"redoubt.dev/redoubt/services"
)

func TestBuilderKilledQEMU(t *testing.T) { builderKilled(t, "qemu") }

func TestBuilderKilledNative(t *testing.T) {
	lab.NeedsKVM(t)
	builderKilled(t, "native")
}

// builderKilled kills the Builder, and replaces it in good order: a guest goes on in the same processes, the next
// Builder knows it, and what can be done with guests can still be done. TestKills… does so at any moment.
func builderKilled(t *testing.T, emulator string) {
	h := newHost(t)
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "4MiB")
	v := &verifier{host: h, name: "steady", facts: map[string]string{}}
	h.start(start{name: v.name, emulator: emulator, what: "verify", cmdline: "no_timer_check", withGuest: true, args: []string{"--disk", disk}})
	h.await(v.name, "ROUND 2\n", 2*bootTime)
	h.must("attest", v.name, "--save-policy", h.path("good.yaml"))
	for _, end := range []func(){
		func() { h.kill("Builder", "redoubt-builder") },
		func() { h.must("reset", "builder") },
	} {
		before := h.pids()
		timeline := h.show(v.name).Timeline
		end()
		h.must("services") // which waits for the next Builder; nothing differs from what is declared
		after := h.pids()
		for i := range services.Table {
			s := &services.Table[i]
			kept, replaced := 0, 0
			for pid, program := range before {
				if program == s.Program && after[pid] == program {
					kept++
				} else if program == s.Program {
					replaced++
				}
			}
			if s.Outlives() && replaced > 0 || !s.Outlives() && kept > 0 {
				t.Errorf("%s: %d processes are the same, %d are not", s.Name, kept, replaced)
			}
		}
		v.goesOn()
		h.must("attest", v.name, "--policy", h.path("good.yaml"))
		if now := h.show(v.name).Timeline; len(now) < len(timeline)-1 || now[0].Kind != timeline[0].Kind && now[0].Kind != timeline[1].Kind {
			t.Errorf("of its timeline\n%v\nis left\n%v", timeline, now) // what the toolstack itself noted is lost
		}
	}
	h.must("stop", v.name, "--grace", "60s")
	v.check()
	if g := h.show(v.name); g.State != "stopped" || !strings.Contains(h.console(v.name), "PRESSED") {
		t.Errorf("%s is %s: %s", v.name, g.State, g.Reason)
	}
	h.must("run", v.name)
	h.await(v.name, "FOUND", 2*bootTime)
	h.must("stop", v.name, "--grace", "0s")
	h.must("rm", v.name)
	h.nothingInStore()
	h.must("audit", "verify")
}

// pids are all processes' programs.
func (h *host) pids() map[int]string {
	h.t.Helper()
	all := map[int]string{}
	for i := range services.Table {
		for _, pid := range h.processes(services.Table[i].Program) {
			all[pid] = services.Table[i].Program
		}
	}
	return all
}

// TestNoBuilder: what happens to guests while there is no Builder is found by the next one: a power off and an
// emulator's death.
func TestNoBuilder(t *testing.T) {
	h := newHost(t)
	h.start(start{name: "dying", emulator: "qemu", what: "deaf", args: []string{"--no-tpm"}})
	h.await("dying", "READY\n", bootTime)
	h.start(start{name: "napping", emulator: "qemu", what: "nap", args: []string{"--no-tpm"}})
	h.await("napping", "READY\n", bootTime)
	qemus := h.processes("qemu-system-x86_64")
	if len(qemus) != 2 {
		t.Fatalf("QEMUs %v", qemus)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*bootTime)
	defer cancel()
	ended := make(chan error, len(qemus))
	for _, pid := range qemus {
		f := openPIDFD(t, pid)
		go func() { ended <- pidfd.Await(ctx, f) }()
	}
	emulator := h.process("emulator-dying")
	goOn := h.holdStill("redoubt-supervisor")
	h.kill("Builder", "redoubt-builder")
	if err := unix.Kill(emulator, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// The napping one's QEMU ends by itself; nobody is there to end the other's.
	if err := <-ended; err != nil {
		t.Fatalf("no guest powers off: %v", err)
	}
	goOn()
	h.must("services")
	for name, want := range map[string]string{"dying": "failed", "napping": "stopped"} {
		g := h.awaitDown(name, bootTime)
		if g.State != want || name == "dying" && !strings.Contains(g.Reason, "nobody was told how") {
			t.Errorf("%s is %s: %s", name, g.State, g.Reason)
		}
	}
	if err := <-ended; err != nil {
		t.Errorf("one of the QEMUs %v is left: %v", qemus, err)
	}
	// It is known for good.
	h.kill("Builder", "redoubt-builder")
	if g := h.show("dying"); g.State != "failed" || !strings.Contains(g.Reason, "nobody was told how") {
		t.Errorf("a Builder later dying is %s: %s", g.State, g.Reason)
	}
	h.must("run", "napping")
	h.await("napping", "READY\n", bootTime)
	h.must("stop", "napping", "--grace", "0s")
	h.nothingInStore()
	h.must("audit", "verify")
}
