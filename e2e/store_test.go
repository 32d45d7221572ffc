package e2e

import (
	"context"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/client"
)

// The store's process may be killed at any moment: no guest ends for it.

const storeProgram = "redoubt-store-state"

// killStore ends the store and waits until another one answers.
func (h *host) killStore() {
	h.t.Helper()
	h.kill("store", storeProgram)
	h.storeAnswers()
}

func (h *host) storeAnswers() {
	h.t.Helper()
	if err := h.askStore(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) askStore() error {
	for deadline := time.Now().Add(time.Minute); ; {
		// A connection may still be to the store that was killed.
		nc, err := net.Dial("unix", h.path("run", "xenstored"))
		if err != nil {
			return err
		}
		c := client.New(nc)
		_, err = c.List("/local/domain")
		c.Close()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// TestStoreKilledUnderGuestsQEMU: guests that run go on, attested ones can be attested, one that
// reboots comes up again, a new one starts, and all end in order.
func TestStoreKilledUnderGuestsQEMU(t *testing.T) {
	h := newHost(t)
	disk := h.path("reboot.img")
	h.must("disk", "create", disk, "8MiB")
	h.start(start{name: "button", emulator: "qemu", what: "wait"})
	h.start(start{name: "reboot", emulator: "qemu", what: "reboot", cmdline: "no_timer_check", args: []string{"--disk", disk}})
	h.await("button", "READY", 2*bootTime)
	for range 3 {
		h.killStore()
	}
	h.must("attest", "button")
	h.start(start{name: "second", emulator: "qemu", what: "off"})
	h.killStore()
	for name, starts := range map[string]int{"reboot": 2, "second": 1} {
		g := h.awaitDown(name, 4*bootTime)
		if g.State != "stopped" || g.Starts != starts {
			t.Errorf("%s is %s after %d starts: %s\n%s", name, g.State, g.Starts, g.Reason, lastLines(h.console(name), 20))
		}
		readFacts(h.console(name)).keptTrust(t)
	}
	h.killStore()
	h.must("stop", "button", "--grace", "60s")
	if g := h.show("button"); g.State != "stopped" || !strings.Contains(h.console("button"), "PRESSED") {
		t.Errorf("button is %s: %s", g.State, g.Reason)
	}
	h.nothingInStore()
}

// nothingInStore: guests that are gone leave nothing.
func (h *host) nothingInStore() {
	h.t.Helper()
	nc, err := net.Dial("unix", h.path("run", "xenstored"))
	if err != nil {
		h.t.Fatal(err)
	}
	c := client.New(nc)
	defer c.Close()
	for path, want := range map[string]string{"/local/domain": "0", "/local/domain/0/backend/vtpm": "", "/": "local"} {
		names, err := c.List(path)
		if err != nil || strings.Join(names, " ") != want {
			h.t.Errorf("%s has %v (%v), want %q", path, names, err, want)
		}
	}
}

// TestStoreKilledDuringStartQEMU kills the store at each moment of a guest's start that an event
// tells of: before and after the front end is connected, the instance number written, the engine
// up and the gate open. The vTPM is late, so that the guest waits at its gate in most of them.
func TestStoreKilledDuringStartQEMU(t *testing.T) {
	killedDuringStart(t, "7s", (*host).killStore, "vtpm-asked", "tpm-first-access", "vtpm-started", "vtpm-ready")
}

// killedDuringStart kills what guests outlive at each moment of a start, of a guest each, that an
// event tells of. The vTPM is late, so that the guest waits at its gate in most of them.
func killedDuringStart(t *testing.T, delay string, kill func(*host), moments ...string) {
	h := newHost(t)
	for _, moment := range moments {
		t.Run(moment, func(t *testing.T) {
			h := &host{t, h.dir, h.cache}
			h.start(start{name: moment, emulator: "qemu", what: "off", args: []string{"--unsafe-vtpm-delay", delay}})
			h.followEvents(moment)(moment, 2*bootTime)
			kill(h)
			g := h.awaitDown(moment, 2*bootTime)
			if g.State != "stopped" {
				t.Fatalf("guest is %s: %s\n%s", g.State, g.Reason, lastLines(h.console(moment), 20))
			}
			readFacts(h.console(moment)).keptTrust(t)
		})
	}
	h.nothingInStore()
}

// TestStoreUnderFireQEMU kills the store at random moments, all the time, from before the first
// of two guests is asked for until both have booted twice. Guests on a machine this busy are told
// not to judge their timers by it (no_timer_check).
func TestStoreUnderFireQEMU(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	var fire sync.WaitGroup
	kills := 0
	fire.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			// No more than twenty in ten seconds: that is the bound at which the Builder gives up.
			case <-time.After(550*time.Millisecond + rand.N(600*time.Millisecond)):
			}
			for _, pid := range h.processes(storeProgram) {
				if unix.Kill(pid, unix.SIGKILL) == nil {
					kills++
				}
			}
			if rand.IntN(4) > 0 { // else the next one may be killed while it starts
				if err := h.askStore(); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	defer fire.Wait()
	defer cancel()
	names := []string{"one", "two"}
	for _, name := range names {
		disk := h.path(name + ".img")
		h.must("disk", "create", disk, "8MiB")
		h.start(start{name: name, emulator: "qemu", what: "reboot", cmdline: "no_timer_check", args: []string{"--disk", disk}})
	}
	for _, name := range names {
		g := h.awaitDown(name, 4*bootTime)
		if g.State != "stopped" || g.Starts != 2 {
			t.Errorf("%s is %s after %d starts: %s\n%s", name, g.State, g.Starts, g.Reason, lastLines(h.console(name), 20))
		}
		readFacts(h.console(name)).keptTrust(t)
	}
	cancel()
	fire.Wait()
	t.Logf("the store was killed %d times", kills)
	h.storeAnswers()
	h.nothingInStore()
}
