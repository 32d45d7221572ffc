package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/services"
)

func TestPCIQEMU(t *testing.T) { buses(t, "qemu") }

func TestPCINative(t *testing.T) {
	lab.NeedsKVM(t)
	buses(t, "native")
}

var (
	pciLine = regexp.MustCompile(`(?m)^PCI (0000:\S+) (\S+) (\S+) (\S+)\n`)
	isLine  = regexp.MustCompile(`(?m)^IS (\S+) (0000:\S+)\n`)
)

// buses: a guest's bus is what was assigned and nothing else, at its first start, after its reboot, when
// it is started again, and for another guest with the same devices and more. A PCIBack lived for each
// start, none for the reboot, and none is left.
func buses(t *testing.T, emulator string) {
	h := newHost(t)
	var args []string
	for _, d := range []string{"a.img", "b.img"} {
		h.must("disk", "create", h.path(d), "8MiB")
		args = append(args, "--disk", h.path(d))
	}
	h.start(start{name: "first", emulator: emulator, what: "pci", args: append(args, "--no-tpm", "--nic", "vlan=10")})
	h.await("first", "READY\n", 3*bootTime)
	boots := strings.SplitAfter(h.console("first"), "FIRST\n")
	if len(boots) != 2 {
		t.Fatalf("it did not reboot once\n%s", lastLines(h.console("first"), 20))
	}
	h.must("stop", "first", "--grace", "0s")
	h.must("run", "first")
	boots = append(boots, h.await("first", "READY\n", 2*bootTime))
	for i, b := range boots {
		holds(t, fmt.Sprintf("boot %d", i+1), emulator, b, 2, 1)
	}
	h.must("stop", "first", "--grace", "0s")
	h.start(start{name: "second", emulator: emulator, what: "pci", args: append(args[:2:2], "--no-tpm", "--nic", "vlan=10", "--nic", "vlan=20")})
	h.await("second", "READY\n", 2*bootTime)
	holds(t, "second", emulator, h.console("second"), 1, 2)

	if n := h.instances("first", services.PCIBack); n != 2 {
		t.Errorf("the first guest depended on %d PCIBacks, for two starts", n)
	}
	ends := 0
	for r, err := range audit.Records(h.path("state", audit.Dir)) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Object == services.PCIBack && r.Act == audit.ActInstanceEnd {
			ends++
			if r.Detail["reason"] != "ended in order" {
				t.Errorf("a PCIBack: %s", r.Detail["reason"])
			}
		}
	}
	if ends != 3 {
		t.Errorf("%d PCIBacks have ended of three", ends)
	}
	if pids := h.processes("redoubt-pciback"); len(pids) != 0 {
		t.Errorf("PCIBacks still run: %v", pids)
	}
}

// holds compares what a guest said of its bus with what is to be there.
func holds(t *testing.T, what, emulator, console string, disks, nics int) {
	t.Helper()
	machine := topology.Native
	want := []string{"0000:00:00.0"} // the host bridge
	if emulator == "qemu" {
		machine = topology.QEMU
		want = append(want, "0000:00:1f.0", "0000:00:1f.2", "0000:00:1f.3") // and the chipset
	}
	top, err := topology.Assign(topology.Guest(machine, disks, nics, false))
	if err != nil {
		t.Fatal(err)
	}
	ids := map[topology.Kind]string{topology.RNG: "0x1044", topology.Channel: "0x1043", topology.Disk: "0x1042", topology.NIC: "0x1041"}
	names := map[string]string{}
	var got []string
	all := map[string][]string{}
	for _, m := range pciLine.FindAllStringSubmatch(console, -1) {
		got, all[m[1]] = append(got, m[1]), m[2:]
	}
	for _, p := range top.Places {
		at := fmt.Sprintf("0000:00:%02x.0", p.Slot)
		want = append(want, at)
		f := all[at]
		if len(f) != 3 || f[0] != "0x1af4" || f[1] != ids[p.Kind] {
			t.Errorf("%s: at %s is %v, want %s[%d]", what, at, f, p.Kind, p.Index)
		} else if base := fmt.Sprintf("0x%016x", p.BAR); machine == topology.Native && f[2] != base {
			t.Errorf("%s: %s has its registers at %s, want %s", what, at, f[2], base)
		}
		switch p.Kind {
		case topology.Disk:
			names[fmt.Sprintf("vd%c", 'a'+p.Index)] = at
		case topology.NIC:
			names[fmt.Sprintf("eth%d", p.Index)] = at
		}
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s: the bus has %v, want %v", what, got, want)
	}
	for _, m := range isLine.FindAllStringSubmatch(console, -1) {
		if names[m[1]] != m[2] {
			t.Errorf("%s: %s is at %s, want %s", what, m[1], m[2], names[m[1]])
		}
		delete(names, m[1])
	}
	if len(names) != 0 {
		t.Errorf("%s: nothing heard of %v", what, names)
	}
}
