package e2e

import (
	"os"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/spec"
)

func TestDropDevicesQEMU(t *testing.T) { dropDevices(t, "qemu") }

func TestDropDevicesNative(t *testing.T) {
	lab.NeedsKVM(t)
	dropDevices(t, "native")
}

// dropDevices: a guest whose devices a verdict drops reads and writes nothing any more, over a killed BlkBack, a replaced Builder
// and its own restart, until it is released.
func dropDevices(t *testing.T, emulator string) {
	h := newHost(t)
	key := h.path("web.key")
	h.must("baseline", "key", key)
	data := h.path("data.img")
	if err := os.WriteFile(data, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	web := h.validatedSpec("web", emulator, h.rootDisk("web"), "", "- path: "+data+"\nvalidation:\n  respond:\n    critical: [drop-devices]\n")
	h.must("run", web)
	h.await("web", "READY", bootTime)
	sh := h.shell("web")
	h.must("baseline", "create", "web", "--key", key)
	marker := 0
	// transfers says what becomes of a read and of a write that reach the disk.
	transfers := func(when, want string) {
		t.Helper()
		marker++
		out := sh.does("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdb of=/dev/null bs=4k count=1 2>/dev/null && echo READ-OK || echo READ-FAILED; " +
			"yes marker-" + string(rune('a'+marker)) + " | dd of=/dev/vdb bs=4k seek=512 count=4 conv=fsync 2>/dev/null && echo WRITE-OK || echo WRITE-FAILED")
		b, err := os.ReadFile(data)
		if err != nil {
			t.Fatal(err)
		}
		written := strings.Contains(string(b), "marker-"+string(rune('a'+marker)))
		if !strings.Contains(out, "READ-"+want) || !strings.Contains(out, "WRITE-"+want) || written != (want == "OK") {
			t.Errorf("%s: it should be %s, and written is %v\n%s", when, want, written, out)
		}
	}
	transfers("at first", "OK")
	sh.does("echo backdoor >/disk/usr/bin/login; sync")
	if v := h.validate("web"); len(v.Responses) == 0 || v.Responses[len(v.Responses)-1] != spec.DropDevices {
		t.Fatalf("the report is %+v", v)
	}
	transfers("dropped", "FAILED")
	h.kill("BlkBack", "redoubt-blkback")
	transfers("after BlkBack was killed", "FAILED")
	h.must("reset", "blkback", "web")
	transfers("after BlkBack was replaced", "FAILED")
	h.must("reset", "builder")
	sh = h.shellAgain(sh)
	transfers("after the Builder was replaced", "FAILED")
	if v := h.validate("web"); !found(v)["content disk0:/usr/bin/login"] {
		t.Errorf("validated while its disks are dropped, the report is %+v", v)
	}
	h.must("stop", "web", "--grace", "0s")
	h.must("run", "web")
	h.await("web", "READY", bootTime)
	sh = h.shell("web")
	transfers("after its restart", "FAILED")
	h.must("release", "web")
	transfers("released", "OK")
	h.must("stop", "web", "--grace", "0s")
}
