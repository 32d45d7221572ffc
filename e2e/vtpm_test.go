package e2e

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The vTPM manager's process may be killed at any moment: no guest loses its vTPM for it.

const vtpmProgram = "redoubt-vtpm"

// TestVTPMKilledDuringStartQEMU kills the manager at each moment of a guest's start that an event
// tells of: before its engine is there, while the guest waits at its gate, once it is ready, let in
// and measures.
func TestVTPMKilledDuringStartQEMU(t *testing.T) {
	h := newHost(t)
	for _, moment := range []string{"vtpm-asked", "tpm-first-access", "vtpm-started", "vtpm-ready", "ima"} {
		t.Run(moment, func(t *testing.T) {
			h := &host{t, h.dir, h.cache}
			h.start(start{name: moment, emulator: "qemu", what: "off", args: []string{"--unsafe-vtpm-delay", "2s"}})
			h.followEvents(moment)(moment, 2*bootTime)
			h.kill("vTPM", vtpmProgram)
			g := h.awaitDown(moment, 2*bootTime)
			if g.State != "stopped" {
				t.Fatalf("guest is %s: %s\n%s", g.State, g.Reason, lastLines(h.console(moment), 20))
			}
			readFacts(h.console(moment)).keptTrust(t)
		})
	}
	h.nothingInStore()
}

// TestVTPMKilledUnderGuestQEMU kills the manager at random moments under a guest that extends a
// register without end and holds it to what it must be, and under a verifier's requests, each of
// which is answered.
func TestVTPMKilledUnderGuestQEMU(t *testing.T) {
	h := newHost(t, "--reset", "vtpm=3s")
	v := &verifier{host: h, name: "chain", facts: map[string]string{}}
	disk := h.path("chain.img")
	h.must("disk", "create", disk, "1MiB")
	h.start(start{name: v.name, emulator: "qemu", what: "verify", cmdline: "no_timer_check", withGuest: true, args: []string{"--disk", disk}})
	h.await(v.name, "ROUND 1\n", 2*bootTime)
	h.must("attest", v.name, "--save-policy", h.path("good.yaml"))

	ctx, cancel := context.WithTimeout(t.Context(), killsFor/2)
	defer cancel()
	var fire sync.WaitGroup
	kills, quotes := 0, 0
	fire.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			// No more than twenty in ten seconds, see fire.
			case <-time.After(550*time.Millisecond + rand.N(600*time.Millisecond)):
			}
			for _, pid := range h.processes(vtpmProgram) {
				if unix.Kill(pid, unix.SIGKILL) == nil {
					kills++
				}
			}
		}
	})
	for ctx.Err() == nil {
		h.must("attest", v.name, "--policy", h.path("good.yaml"))
		quotes++
	}
	fire.Wait()
	t.Logf("the manager was killed %d times, %d quotes", kills, quotes)
	if kills < 5 || quotes < 5 {
		t.Error("this shows little")
	}
	v.goesOn()
	h.must("attest", v.name, "--policy", h.path("good.yaml"))
	h.must("reset", "vtpm")
	h.must("stop", v.name, "--grace", "60s")
	v.check()
	if g := h.show(v.name); g.State != "stopped" {
		t.Errorf("%s is %s: %s", v.name, g.State, g.Reason)
	}
	// Another start finds the same vTPM.
	h.must("run", v.name)
	h.await(v.name, "ROUND", 2*bootTime)
	h.must("attest", v.name, "--policy", h.path("good.yaml"))
	h.must("stop", v.name, "--grace", "0s")
	h.must("audit", "verify")
	h.must("services")
	h.nothingInStore()
}
