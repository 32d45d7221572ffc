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
	killedDuringStart(t, "2s", func(h *host) { h.kill("vTPM", vtpmProgram) },
		"vtpm-asked", "tpm-first-access", "vtpm-started", "vtpm-ready", "ima")
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
