package emulator

import (
	"errors"
	"fmt"
	"net"

	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/virtio"
)

// devices makes the native monitor's functions: a random number generator, the byte channel, then
// the disks and the NICs in their order. After an error nothing is left open.
func (g *guest) devices() (all []*pci.Function, err error) {
	var made []*virtio.Device
	defer func() {
		if err != nil {
			for _, d := range made {
				err = errors.Join(err, d.Close())
			}
		}
	}()
	add := func(b virtio.Backend) error {
		d, f, err := virtio.New(b)
		if err != nil {
			return err
		}
		made, all = append(made, d), append(all, f)
		return nil
	}
	if err := add(virtio.NewRNG()); err != nil {
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
	if err := add(ch); err != nil {
		return nil, err
	}
	remote := func(kind string, i int, r remoteDevice) error {
		d, f, err := virtio.NewRemote(r)
		if err != nil {
			return fmt.Errorf("%s[%d]: %w", kind, i, err)
		}
		made, all = append(made, d), append(all, f)
		return nil
	}
	for i, front := range g.disks {
		if err := remote("disks", i, remoteDevice{front, blockInfo}); err != nil {
			return nil, err
		}
	}
	for i, front := range g.nics {
		if err := remote("nics", i, remoteDevice{front, virtio.NetInfo()}); err != nil {
			return nil, err
		}
	}
	return all, nil
}
