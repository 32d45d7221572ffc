package e2e

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab"
)

func TestStatusQEMU(t *testing.T) { status(t, "qemu") }

func TestStatusNative(t *testing.T) {
	lab.NeedsKVM(t)
	status(t, "native")
}

// status: a guest that says at a known address that it writes is not validated before it says that it does not.
func status(t *testing.T, emulator string) {
	h := newHost(t)
	key := h.path("web.key")
	h.must("baseline", "key", key)
	disk := h.rootDisk("web")
	h.fails(2, "validation.status: 0x10000000: not the guest's memory", "run",
		h.validatedSpec("beyond", emulator, disk, "", "validation:\n  status: 0x10000000\n"))
	h.must("run", h.validatedSpec("web", emulator, disk, "memmap=4K$0x8000000 iomem=relaxed", "validation:\n  tries: 20\n  status: 0x8000000\n"))
	h.await("web", "READY", bootTime)
	sh := h.shell("web")
	sh.does("devmem 0x8000000 32 0")
	h.must("baseline", "create", "web", "--key", key)
	if v := h.validate("web"); len(v.Findings) != 0 || !strings.Contains(v.Snapshots[0].Why, "none in progress by the guest's own status") {
		t.Errorf("%+v", v)
	}
	if out := sh.does("devmem 0x8000000 32 5; devmem 0x8000000"); !strings.Contains(out, "0x00000005") {
		t.Fatalf("the guest cannot say it\n%s", out)
	}
	h.fails(1, "a write is in progress by the guest's own status (0x5)", "validate", "web")
	if v := h.validate("web", "--force"); v.Snapshots[0].Safe || !strings.HasPrefix(v.Snapshots[0].Why, "forced: ") || !strings.Contains(v.Snapshots[0].Why, "a write is in progress") {
		t.Errorf("%+v", v)
	}
	sh.does("devmem 0x8000000 32 0")
	if v := h.validate("web"); !v.Snapshots[0].Safe {
		t.Errorf("%+v", v)
	}
	h.must("stop", "web", "--grace", "0s")
}
