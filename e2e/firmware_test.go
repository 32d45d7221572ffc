package e2e

import (
	"encoding/base64"
	"os"
	"testing"

	"redoubt.dev/redoubt/lab/bootdisk"
	"redoubt.dev/redoubt/lab/debian"
)

// TestFirmware: a guest that boots its disk through firmware waits at the same gate, and is
// attested by the host's measurements and its firmware's own log together.
func TestFirmware(t *testing.T) {
	h := newHost(t)
	kernel, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	disk := h.path("boot.img")
	err = bootdisk.Make(t.Context(), h.cache, disk, h.dir, kernel, initrd(t, h.cache, debian.Usual, false), debian.Cmdline+" e2e=wait")
	if err != nil {
		t.Fatal(err)
	}
	for _, firmware := range []string{"seabios", "ovmf"} {
		t.Run(firmware, func(t *testing.T) {
			h := &host{t, h.dir, h.cache}
			h.must("run", "--name", firmware, "--firmware", firmware, "--disk", disk, "--memory", "512MiB", "--unsafe-vtpm-delay", "3s")
			c := h.await(firmware, "READY", 2*bootTime)
			f := readFacts(c)
			f.keptTrust(t)
			attest := []string{"attest", firmware}
			if firmware == "ovmf" { // its log is in no place that the host knows
				log, err := base64.StdEncoding.DecodeString(f.log)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(h.path("ovmf.log"), log, 0o600); err != nil {
					t.Fatal(err)
				}
				h.fails1(attest...)
				attest = append(attest, "--guest-log", h.path("ovmf.log"))
			}
			t.Log("\n" + h.must(attest...))
			h.must("stop", firmware, "--grace", "0s")
		})
	}
}

// fails1 runs a check that has to fail with a report.
func (h *host) fails1(args ...string) {
	h.t.Helper()
	if r := h.run(args...); r.status != 1 {
		h.t.Errorf("redoubt %v: exit status %d\n%s%s", args, r.status, r.out, r.err)
	}
}
