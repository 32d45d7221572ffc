package emulator

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
	"redoubt.dev/redoubt/virtio"
)

// build has a guest with two disks and a NIC build a bus as it was assigned.
func build(t *testing.T, top topology.Topology) error {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	host, its := os.NewFile(uintptr(fds[0]), "host"), os.NewFile(uintptr(fds[1]), "channel")
	defer host.Close()
	defer its.Close()
	g := &guest{in: protocol.Start{PCI: top}, files: map[string][]*os.File{protocol.FileChannel: {its}}}
	for range 2 {
		g.disks = append(g.disks, vhostuser.NewFrontend(1, virtio.BlockQueueSize))
	}
	g.nics = append(g.nics, vhostuser.NewFrontend(len(virtio.NetInfo().Queues), virtio.NetQueueSize))
	for _, f := range slices.Concat(g.disks, g.nics) {
		defer func() {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}()
	}
	all, err := g.devices()
	if err != nil {
		return err
	}
	bus, err := pci.NewBus(pci.Host{}, make([]byte, pci.ECAMSize))
	if err != nil {
		t.Fatal(err)
	}
	return errors.Join(bus.Build(all...), bus.Close())
}

// TestTopology: what package topology asks for Redoubt's devices is what they need; the emulator builds that
// and refuses everything else.
func TestTopology(t *testing.T) {
	for want, change := range map[string]func(*topology.Topology){
		"":                func(*topology.Topology) {},
		"overlap: slot 3": func(t *topology.Topology) { t.Places[3].Slot = 3 },
		"nic[0] has no":   func(t *topology.Topology) { t.Places = t.Places[:4] },
		"6 places for 5": func(t *topology.Topology) {
			t.Places = append(t.Places, topology.Place{Kind: topology.NIC, Index: 1, Slot: 20})
		},
		"rng[0] has no":      func(t *topology.Topology) { *t = topology.Topology{} },
		"and needs 32768":    func(t *topology.Topology) { t.Places[2].Size = 65536 },
		"4 vectors and need": func(t *topology.Topology) { t.Places[4].Vectors = 4 },
	} {
		top, err := topology.Assign(topology.Guest(topology.Native, 2, 1, true))
		if err != nil {
			t.Fatal(err)
		}
		change(&top)
		err = build(t, top)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", want, err)
		}
	}
}
