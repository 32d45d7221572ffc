package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/virtio"
)

// VhostDevice is the device of the kernel's own data path.
const VhostDevice = "/dev/vhost-net"

// OpenVhost opens it for one NIC. [ErrUnsupported] says that the kernel has none.
func OpenVhost() (*os.File, error) {
	fd, err := unix.Open(VhostDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: %s", ErrUnsupported, VhostDevice)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: VhostDevice, Err: err}
	}
	return os.NewFile(uintptr(fd), VhostDevice), nil
}

// KernelNet is virtio.Net with the kernel between tap and guest (vhost-net): this process only
// sets it up, and the kernel checks every address against the memory it was told of. It offers
// the same features as virtio.Net, so that either can take over from the other.
//
// What a driver writes into a packet's header is the kernel's to check here.
type KernelNet struct {
	*virtio.Net
	tap *Tap

	mu       sync.Mutex
	vhost    *os.File
	owner    bool
	running  int
	features uint64 // the driver's
}

// NewKernelNet makes the device of a tap and an open VhostDevice. It takes both over.
func NewKernelNet(tap *Tap, vhost *os.File, mac MAC, mtu uint16) (*KernelNet, error) {
	n, err := virtio.NewNet(tap.Port(), mac, mtu)
	if err != nil {
		return nil, err
	}
	return &KernelNet{Net: n, tap: tap, vhost: vhost}, nil
}

// Start implements virtio.Backend.
func (k *KernelNet) Start(features uint64) {
	k.mu.Lock()
	k.features = features
	k.mu.Unlock()
	k.Net.Start(features)
}

// Close implements virtio.Backend.
func (k *KernelNet) Close() error { return errors.Join(k.vhost.Close(), k.Net.Close()) }

// Handle implements virtio.Backend.
func (k *KernelNet) Handle(int, *virtio.Chain) error { return errors.New("the kernel's queue") }

// RunQueue implements virtio.Delegate.
func (k *KernelNet) RunQueue(q virtio.DelegatedQueue) (stop func() error, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.Failed(); err != nil {
		return nil, err
	}
	fd := int(k.vhost.Fd())
	if k.running == 0 {
		if err := k.setUp(fd, q.Memory); err != nil {
			return nil, err
		}
	}
	le := binary.LittleEndian
	i := uint32(q.Index)
	pair := func(v uint32) []byte { return le.AppendUint32(le.AppendUint32(nil, i), v) }
	areas := pair(0)
	for _, a := range [...][]byte{q.Areas[0], q.Areas[2], q.Areas[1]} {
		areas = le.AppendUint64(areas, address(a))
	}
	areas = le.AppendUint64(areas, 0)
	for _, s := range []struct {
		name string
		req  uint
		arg  []byte
	}{
		{"SET_VRING_NUM", vhostSetVringNum, pair(uint32(q.Size))},
		{"SET_VRING_BASE", vhostSetVringBase, pair(uint32(q.Base))},
		{"SET_VRING_ADDR", vhostSetVringAddr, areas},
		{"SET_VRING_CALL", vhostSetVringCall, pair(uint32(q.Call.Fd()))},
		{"SET_VRING_KICK", vhostSetVringKick, pair(uint32(q.Kick.Fd()))},
		{"NET_SET_BACKEND", vhostNetSetBackend, pair(uint32(k.tap.File.Fd()))},
	} {
		if err := ioctlBytes(fd, s.req, s.arg); err != nil {
			return nil, fmt.Errorf("vhost-net: %s of queue %d: %w", s.name, q.Index, err)
		}
	}
	// Fd made them block for everybody who shares them.
	if err := errors.Join(nonblock(q.Call), nonblock(q.Kick), nonblock(k.tap.File)); err != nil {
		return nil, err
	}
	k.running++
	return func() error {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.running--
		// The kernel waits for its worker before it answers.
		if err := ioctlBytes(fd, vhostNetSetBackend, pair(^uint32(0))); err != nil {
			return fmt.Errorf("vhost-net: stop queue %d: %w", q.Index, err)
		}
		return nil
	}, nil
}

func nonblock(f *os.File) error { return unix.SetNonblock(int(f.Fd()), true) }

// setUp tells the kernel features and memory; no queue runs. k.mu is held.
func (k *KernelNet) setUp(fd int, memory []virtio.MappedMemory) error {
	le := binary.LittleEndian
	if !k.owner {
		if err := ioctlBytes(fd, vhostSetOwner, nil); err != nil {
			return fmt.Errorf("vhost-net: SET_OWNER: %w", err)
		}
		k.owner = true
	}
	own := make([]byte, 8)
	if err := ioctlBytes(fd, vhostGetFeatures, own); err != nil {
		return fmt.Errorf("vhost-net: GET_FEATURES: %w", err)
	}
	// The rest is between the driver and the tap.
	rings := virtio.FeatureIndirect | virtio.FeatureEventIdx | virtio.FeatureVersion1 | virtio.NetFeatureMergeable
	take := k.features & rings
	if miss := take &^ le.Uint64(own); miss != 0 {
		return fmt.Errorf("%w: vhost-net features %#x", ErrUnsupported, miss)
	}
	if err := ioctlBytes(fd, vhostSetFeatures, le.AppendUint64(nil, take)); err != nil {
		return fmt.Errorf("vhost-net: SET_FEATURES: %w", err)
	}
	table := le.AppendUint64(nil, uint64(len(memory)))
	for _, m := range memory {
		for _, v := range [...]uint64{m.Guest, uint64(len(m.Data)), address(m.Data), 0} {
			table = le.AppendUint64(table, v)
		}
	}
	if err := ioctlBytes(fd, vhostSetMemTable, table); err != nil {
		return fmt.Errorf("vhost-net: SET_MEM_TABLE: %w", err)
	}
	return nil
}
