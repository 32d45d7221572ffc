package emulator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/monitor"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/vhostuser"
	"redoubt.dev/redoubt/virtio"
)

// Disks are BlkBack's, NICs NetBack's. This process has each one's front end, which stays while back ends come
// and go: the native monitor's device sits on it, and QEMU's is relayed to it.

// connectDevices makes the front ends and connects them.
func (g *guest) connectDevices() (err error) {
	defer func() {
		if err != nil {
			g.closeDevices()
		}
	}()
	if len(g.files[protocol.FileBlock])+len(g.files[protocol.FileNetwork]) > 0 && g.in.Emulator == spec.Native {
		// The monitor takes the descriptor it is given over.
		fd, err := unix.FcntlInt(one(g.files, protocol.FileMemory).Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("guest memory: %w", err)
		}
		g.memory = os.NewFile(uintptr(fd), "memory")
	}
	for i, f := range g.files[protocol.FileBlock] {
		front := vhostuser.NewFrontend(1, virtio.BlockQueueSize)
		g.disks = append(g.disks, front)
		if err := g.connect(topology.Disk, i, front, f); err != nil {
			return fmt.Errorf("disks[%d]: %w", i, err)
		}
	}
	for i, f := range g.files[protocol.FileNetwork] {
		front := vhostuser.NewFrontend(len(virtio.NetInfo().Queues), virtio.NetQueueSize)
		g.nics = append(g.nics, front)
		if err := g.connect(topology.NIC, i, front, f); err != nil {
			return fmt.Errorf("nics[%d]: %w", i, err)
		}
	}
	return nil
}

// maxConnects bounds the back ends that a device is connected with before its guest runs.
const maxConnects = 5

// connect makes the first connection of a front end. A back end that has died meanwhile is no reason not
// to start: the Builder has the next one.
func (g *guest) connect(kind topology.Kind, i int, front *vhostuser.Frontend, f *os.File) error {
	err := connect(front, f)
	for n := 1; errors.Is(err, vhostuser.ErrBackEnd) && n < maxConnects; n++ {
		files, cerr := g.service.peer.Call(g.service.ctx, protocol.MethodBackEnd, protocol.BackEnd{Kind: kind, Index: i}, nil)
		if cerr != nil {
			return errors.Join(err, cerr)
		}
		if len(files) != 1 {
			for _, f := range files {
				f.Close()
			}
			return errors.Join(err, fmt.Errorf("%d descriptors for another back end", len(files)))
		}
		err = connect(front, files[0])
	}
	if err != nil {
		return err
	}
	if g.in.Emulator != spec.Native {
		return nil // QEMU will tell where it has its memory
	}
	return front.SetMemory(g.regions())
}

// regions is where the native monitor has the guest's memory.
func (g *guest) regions() (all []vhostuser.Region) {
	for _, r := range monitor.Regions(g.in.Memory) {
		all = append(all, vhostuser.Region{Guest: r.Guest, Size: r.Size, Offset: r.Offset, File: g.memory})
	}
	return all
}

// connect takes f over.
func connect(front *vhostuser.Frontend, f *os.File) error {
	c, err := ipc.Socket(f)
	if err != nil {
		return err
	}
	_, err = front.Connect(c)
	return err
}

func (g *guest) closeDevices() {
	for i, d := range append(append([]*vhostuser.Frontend(nil), g.disks...), g.nics...) {
		if err := d.Close(); err != nil {
			g.service.log.Warn("device", "index", i, "err", err)
		}
	}
	if g.memory != nil {
		g.memory.Close()
	}
}

// reconnect brings a new back end to where the last one of a device was.
func (s *service) reconnect(kind string, all func() []*vhostuser.Frontend, i int, f *os.File) error {
	s.mu.Lock()
	fronts := all()
	s.mu.Unlock()
	if f == nil || i < 0 || i >= len(fronts) {
		if f != nil {
			f.Close()
		}
		return rpc.Errorf(rpc.Invalid, "emulator: no %s %d", kind, i)
	}
	return connect(fronts[i], f)
}

// relayDisks gives QEMU a socket for each disk. ended is to be called when QEMU has ended.
func (g *guest) relayDisks(ctx context.Context) (disks []qemu.Disk, ended func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	ended = func() { cancel(); wg.Wait() }
	defer func() {
		if err != nil {
			for _, d := range disks {
				d.Socket.Close()
			}
			ended()
		}
	}()
	memory, err := one(g.files, protocol.FileMemory).Stat()
	if err != nil {
		return nil, nil, err
	}
	for i, front := range g.disks {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return disks, ended, fmt.Errorf("disks[%d]: %w", i, err)
		}
		disks = append(disks, qemu.Disk{Socket: os.NewFile(uintptr(fds[0]), "disk")})
		c, err := ipc.Socket(os.NewFile(uintptr(fds[1]), "disk"))
		if err != nil {
			return disks, ended, fmt.Errorf("disks[%d]: %w", i, err)
		}
		wg.Go(func() {
			if err := vhostuser.Relay(ctx, c, front, vhostuser.RelayOptions{Memory: vhostuser.Whitelist{memory}}); err != nil && ctx.Err() == nil {
				g.service.log.Warn("disk", "index", i, "err", err)
			}
		})
	}
	return disks, ended, nil
}

// remoteDevice is a device of the native monitor that a back end serves.
type remoteDevice struct {
	front *vhostuser.Frontend
	info  virtio.Info // but for its features
}

var blockInfo = virtio.Info{Name: "virtio-blk", ID: 2, Class: 0x018000, Queues: []uint16{virtio.BlockQueueSize}}

func (d remoteDevice) Info() virtio.Info {
	d.info.Features = d.front.Offered() &^ (virtio.FeatureIndirect | virtio.FeatureEventIdx | virtio.FeatureVersion1)
	return d.info
}

func (d remoteDevice) ReadConfig(offset uint64, p []byte) { d.front.ReadConfig(offset, p) }

func (d remoteDevice) Start(features uint64, queues []virtio.RemoteQueue) error {
	if err := d.front.SetFeatures(features); err != nil {
		return err
	}
	for _, q := range queues {
		err := d.front.StartQueue(q.Index, vhostuser.QueueSetup{Size: q.Size, Areas: q.Areas, Kick: q.Kick, Call: q.Call})
		if err != nil {
			return err
		}
	}
	return nil
}

func (d remoteDevice) Stop() {
	for i := range d.info.Queues {
		d.front.DropQueue(i)
	}
}

// Close: the front end is closed with the guest.
func (d remoteDevice) Close() error { return nil }
