package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/services"
)

func TestServicesQEMU(t *testing.T) { sandboxes(t, "qemu") }

func TestServicesNative(t *testing.T) {
	lab.NeedsKVM(t)
	sandboxes(t, "native")
}

// sandboxes: what is in force for every process is what the table declares, as `redoubt services`
// says; and where something is changed it says that.
func sandboxes(t *testing.T, emulator string) {
	h := newHost(t)
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "8MiB")
	h.start(start{emulator: emulator, what: "deaf", args: []string{"--wait", "--disk", disk, "--nic", "vlan=10"}})
	type process struct {
		Service     string   `json:"service"`
		Label       string   `json:"label"`
		PID         int      `json:"pid"`
		Differences []string `json:"differences"`
	}
	list := func(status int) map[string]process {
		r := h.run("services", "--json")
		if r.status != status {
			t.Errorf("redoubt services: exit status %d: %s%s", r.status, r.out, r.err)
		}
		var all []process
		if err := json.Unmarshal([]byte(r.out), &all); err != nil {
			t.Fatalf("%v: %s", err, r.out)
		}
		by := map[string]process{}
		for _, p := range all {
			by[p.Service] = p
		}
		return by
	}
	h.must("inspect", "guest", "modules") // from here on one waits for the next question
	all := list(0)
	for range 100 { // a worker is there for one response: all may just be being replaced; and an inspector still be being started
		if all[services.StoreLogic].PID != 0 && all[services.Inspector].PID != 0 {
			break
		}
		all = list(0)
	}
	for i := range services.Table {
		name := services.Table[i].Name
		if services.Table[i].Leaves && name != services.Inspector || name == services.QEMU && emulator != "qemu" {
			continue
		}
		if p, ok := all[name]; !ok || p.PID == 0 || len(p.Differences) > 0 {
			t.Errorf("%s: %+v", name, p)
		}
	}
	blkback := all[services.BlkBack].PID
	if err := unix.Prlimit(blkback, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 512, Max: 512}, nil); err != nil {
		t.Fatal(err)
	}
	if p := list(1)[services.BlkBack]; len(p.Differences) != 1 || !strings.Contains(p.Differences[0], "512") {
		t.Errorf("a changed limit is not told: %+v", p)
	}
	if r := h.run("services"); !strings.Contains(r.out, "DIFFERS") || !strings.Contains(r.out, "as declared") {
		t.Error(r.out, r.err)
	}
}
