package emulator

import (
	"errors"
	"fmt"
	"net"

	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/virtio"
)

// devices makes the native monitor's functions: a random number generator, the byte channel, then
// the disks and the NICs in their order, each in the place that it was assigned. A topology that is not
// for just these devices is refused. After an error nothing is left open.
func (g *guest) devices() (all []pci.Placed, err error) {
	var made []*virtio.Device
	defer func() {
		if err != nil {
			for _, d := range made {
				err = errors.Join(err, d.Close())
			}
		}
	}()
	place := func(kind topology.Kind, i int, d *virtio.Device, f *pci.Function) error {
		made = append(made, d)
		p, ok := g.in.PCI.Find(kind, i)
		if !ok {
			return fmt.Errorf("pci: %s[%d] has no place", kind, i)
		}
		all = append(all, pci.Placed{Function: f, Place: p})
		return nil
	}
	add := func(kind topology.Kind, b virtio.Backend) error {
		d, f, err := virtio.New(b)
		if err != nil {
			return err
		}
		return place(kind, 0, d, f)
	}
	if err := add(topology.RNG, virtio.NewRNG()); err != nil {
		return nil, err
	}
	conn, err := net.FileConn(one(g.files, protocol.FileChannel))
	if err != nil {
		return nil, fmt.Errorf("byte channel: %w", err)
	}
	ch, err := virtio.NewChannel(conn, qemu.ChannelName)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("byte channel: %w", err), conn.Close())
	}
	if err := add(topology.Channel, ch); err != nil {
		return nil, err
	}
	remote := func(kind topology.Kind, i int, r remoteDevice) error {
		d, f, err := virtio.NewRemote(r)
		if err != nil {
			return fmt.Errorf("%s[%d]: %w", kind, i, err)
		}
		return place(kind, i, d, f)
	}
	for i, front := range g.disks {
		if err := remote(topology.Disk, i, remoteDevice{front, blockInfo}); err != nil {
			return nil, err
		}
	}
	for i, front := range g.nics {
		if err := remote(topology.NIC, i, remoteDevice{front, virtio.NetInfo()}); err != nil {
			return nil, err
		}
	}
	if len(all) != len(g.in.PCI.Places) {
		return nil, fmt.Errorf("pci: %d places for %d devices", len(g.in.PCI.Places), len(all))
	}
	return all, nil
}
