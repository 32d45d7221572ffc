package e2e

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
)

func TestAttestQEMU(t *testing.T) { attestation(t, "qemu") }

func TestAttestNative(t *testing.T) {
	lab.NeedsKVM(t)
	attestation(t, "native")
}

// attestation: a guest that boots as the policy says passes; another command line, another
// kernel, a stale nonce do not, and the report names the register.
func attestation(t *testing.T, emulator string) {
	h := newHost(t)
	policy := h.path("policy.yaml")
	boot := func(kernel, cmdline string) {
		h.start(start{emulator: emulator, kernel: kernel, what: "wait", cmdline: cmdline})
		h.await("guest", "READY", bootTime)
	}
	stop := func() { h.must("stop", "guest", "--grace", "0s") }

	boot(debian.Usual, "measured")
	h.must("attest", "guest", "--save-policy", policy)
	out := h.must("attest", "guest", "--policy", policy, "--out", h.path("evidence"), "--nonce", strings.Repeat("5a", 32))
	t.Log("\n" + out)
	checkWithTools(h, h.path("evidence"), strings.Repeat("5a", 32))

	// The guest sees the same log and the same registers.
	f := readFacts(h.console("guest"))
	log, err := base64.StdEncoding.DecodeString(f.log)
	if err != nil || len(log) == 0 {
		t.Fatalf("the guest has no event log: %v", err)
	}
	logFile := h.path("guest.log")
	if err := os.WriteFile(logFile, log, 0o600); err != nil {
		t.Fatal(err)
	}
	var replayed struct {
		PCRs []struct {
			Bank string         `json:"bank"`
			PCRs map[int]string `json:"pcrs"`
		} `json:"pcrs"`
	}
	if err := json.Unmarshal([]byte(h.must("attest", "replay", "--event-log", logFile, "--json")), &replayed); err != nil {
		t.Fatal(err)
	}
	compared := 0
	for _, b := range replayed.PCRs {
		if b.Bank != "sha256" {
			continue
		}
		for n, v := range b.PCRs {
			compared++
			if f.pcrs[n] != v {
				t.Errorf("PCR %d is %s in the guest, the log it was given says %s", n, f.pcrs[n], v)
			}
		}
	}
	if compared < 8 {
		t.Errorf("only %d registers compared", compared)
	}
	inspected(h, h.console("guest"), policy)
	stop()
	h.fails(1, "is down: only one that runs can be inspected", "inspect", "guest", "kernel")

	for _, c := range []struct{ name, kernel, cmdline, pcr string }{
		{"command line", debian.Usual, "init=/bin/sh.evil", "PCR 8"},
		{"kernel", "6.12-cloud", "measured", "PCR 4"},
	} {
		boot(c.kernel, c.cmdline)
		r := h.run("attest", "guest", "--policy", policy)
		if r.status != 1 || !strings.Contains(r.out, c.pcr) || !strings.Contains(r.out, "failed") {
			t.Errorf("another %s: exit status %d, want 1 and %s named\n%s%s", c.name, r.status, c.pcr, r.out, r.err)
		}
		stop()
	}
}

// checkWithTools has tpm2-tools judge the evidence.
func checkWithTools(h *host, dir, nonce string) {
	h.t.Helper()
	ctx := context.Background()
	for _, args := range [][]string{
		{"tpm2_checkquote", "-u", "ak.pub", "-m", "quote.msg", "-s", "quote.sig", "-f", "quote.pcrs", "-q", nonce, "-g", "sha256"},
		{"tpm2_eventlog", "eventlog.bin"},
	} {
		c := h.cache.Command(ctx, args[0], args[1:]...)
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil {
			h.t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	// The same tool refuses another nonce: the check above can fail.
	c := h.cache.Command(ctx, "tpm2_checkquote", "-u", "ak.pub", "-m", "quote.msg", "-s", "quote.sig", "-f", "quote.pcrs", "-q", strings.Repeat("00", 32), "-g", "sha256")
	c.Dir = dir
	if err := c.Run(); err == nil {
		h.t.Error("tpm2_checkquote takes any nonce")
	}
}

func TestSealQEMU(t *testing.T) { sealing(t, "qemu") }

func TestSealNative(t *testing.T) {
	lab.NeedsKVM(t)
	sealing(t, "native")
}

// sealing: what a guest seals to its boot opens after a restart of everything, and not after
// its measured boot changed; and a guest that clears its TPM can still be attested.
func sealing(t *testing.T, emulator string) {
	h := newHost(t)
	disk := h.path("seal.img")
	h.must("disk", "create", disk, "8MiB")
	boot := func(what, cmdline string) string {
		h.start(start{emulator: emulator, what: what, cmdline: cmdline, withGuest: true, args: []string{"--disk", disk}})
		h.awaitDown("guest", bootTime)
		if g := h.show("guest"); g.State != "stopped" {
			h.t.Errorf("the guest is %s: %s", g.State, g.Reason)
		}
		return h.console("guest")
	}
	// The same command line both times: the disk says whether there is something to open.
	if c := boot("sealed", ""); !strings.Contains(c, "SEALED") {
		t.Fatalf("not sealed:\n%s", lastLines(c, 20))
	}
	h.must("down", "--grace", "0s")
	h.must("up")
	if c := boot("sealed", ""); !strings.Contains(c, "OPENED opened only by") {
		t.Fatalf("not opened after a restart:\n%s", lastLines(c, 20))
	}
	if c := boot("sealed", "extra"); !strings.Contains(c, "STAYS CLOSED") || strings.Contains(c, "OPENED") {
		t.Fatalf("opened by another command line:\n%s", lastLines(c, 20))
	}
	if c := boot("clear", ""); !strings.Contains(c, "CLEARED") {
		t.Fatalf("the guest could not clear its TPM:\n%s", lastLines(c, 20))
	}
	h.start(start{emulator: emulator, what: "wait"})
	h.await("guest", "READY", bootTime)
	t.Log("\n" + h.must("attest", "guest"))
}

// TestStateIsNeverReplaced: a vTPM whose state is damaged, foreign or missing is refused with
// the reason, the guest does not start, and the damaged state stays as it was.
func TestStateIsNeverReplaced(t *testing.T) {
	h := newHost(t)
	h.start(start{emulator: "qemu", what: "deaf"})
	h.await("guest", "READY", bootTime)
	h.must("stop", "guest", "--grace", "0s")
	files, err := filepath.Glob(h.path("state", "vtpm", "manager", "guests", "*", "tpm", "tpm2-00.permall"))
	if err != nil || len(files) != 1 {
		t.Fatalf("vTPM state files: %v %v", files, err)
	}
	good, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"flipped": func(b []byte) []byte { c := append([]byte(nil), b...); c[len(c)/2] ^= 1; return c },
		"cut":     func(b []byte) []byte { return b[:len(b)/2] },
		"empty":   func([]byte) []byte { return nil },
		"missing": nil,
	} {
		var bad []byte
		if damage == nil {
			err = os.Remove(files[0])
		} else {
			bad = damage(good)
			err = os.WriteFile(files[0], bad, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if r := h.run("run", "guest", "--wait"); r.status == 0 {
			t.Errorf("%s: the guest started", name)
			h.must("stop", "guest", "--grace", "0s")
		} else {
			t.Logf("%s: %s", name, strings.TrimSpace(r.err))
		}
		after, err := os.ReadFile(files[0])
		if damage == nil && !os.IsNotExist(err) || damage != nil && string(after) != string(bad) {
			t.Errorf("%s: the state was changed (%v)", name, err)
		}
	}
	if err := os.WriteFile(files[0], good, 0o600); err != nil {
		t.Fatal(err)
	}
	h.must("run", "guest", "--wait")
}
