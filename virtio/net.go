package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// Network device: virtio 1.2 §5.1.

// Feature bits of a network device (virtio 1.2 §5.1.3).
const (
	NetFeatureCsum      uint64 = 1 << 0  // the device takes packets with partial checksums
	NetFeatureGuestCsum uint64 = 1 << 1  // the driver does
	NetFeatureMTU       uint64 = 1 << 3  //
	NetFeatureMAC       uint64 = 1 << 5  //
	NetFeatureGuestTSO4 uint64 = 1 << 7  // the driver takes TCP segments that are cut by nobody
	NetFeatureGuestTSO6 uint64 = 1 << 8  //
	NetFeatureGuestECN  uint64 = 1 << 9  //
	NetFeatureHostTSO4  uint64 = 1 << 11 // the device cuts TCP segments
	NetFeatureHostTSO6  uint64 = 1 << 12 //
	NetFeatureHostECN   uint64 = 1 << 13 //
	NetFeatureMergeable uint64 = 1 << 15 // the driver puts a packet together from several buffers
	NetFeatureStatus    uint64 = 1 << 16 //

	// No UFO, which Linux makes no more, and no USO, which taps have from Linux 6.2 on only.
	netFeatures = NetFeatureCsum | NetFeatureGuestCsum | NetFeatureMTU | NetFeatureMAC |
		NetFeatureGuestTSO4 | NetFeatureGuestTSO6 | NetFeatureGuestECN |
		NetFeatureHostTSO4 | NetFeatureHostTSO6 | NetFeatureHostECN | NetFeatureMergeable | NetFeatureStatus
)

// NetQueueSize is the most entries of each of the two queues; 0 receives, 1 transmits (§5.1.2).
const NetQueueSize = 256

// The queues, seen from the guest.
const (
	netReceive = iota
	netTransmit
)

const (
	netConfigSize = 12
	netLinkUp     = 1
)

// A NetPort is the host's end of a network device.
type NetPort struct {
	// File gives a frame with each read and takes one with each write, behind a virtio_net_hdr: a
	// tap with IFF_VNET_HDR. It does not block.
	File *os.File
	// Configure tells it which features the driver took and how long the header is, before frames
	// pass. May be nil.
	Configure func(features uint64, header int) error
}

// Net is the back end of a network device over a port. Each queue's packets pass in order and are
// given back each with one store of the used index, so that at any instant this says which packets
// have passed, whole. A packet that is on its way when this process is killed may be lost or sent
// twice, as in any network.
//
// It holds at most one packet, the one to be received next: see receiver. Frames from the guest go to
// the port without a copy. Of a header it uses a copy, either way, checked against the features that
// the driver took.
type Net struct {
	port    NetPort
	raw     syscall.RawConn
	mac     [6]byte
	mtu     uint16
	header  atomic.Int32  // length of the header
	taken   atomic.Uint64 // features
	failed  atomic.Pointer[error]
	dropped atomic.Uint64
	in      receiver
	out     sender
}

// NewNet makes a network device of this MAC address and MTU in bytes. It takes the port over.
func NewNet(port NetPort, mac [6]byte, mtu uint16) (*Net, error) {
	if mac[0]&1 != 0 || mac == [6]byte{} {
		return nil, fmt.Errorf("virtio-net: % x is no station's address", mac)
	}
	if mtu < 68 { // §5.1.4.1
		return nil, fmt.Errorf("virtio-net: MTU %d", mtu)
	}
	raw, err := port.File.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("virtio-net: port: %w", err)
	}
	// Only a file that can be waited for has deadlines; the transport needs to interrupt reads.
	if err := port.File.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("virtio-net: port: %w", err)
	}
	n := &Net{port: port, raw: raw, mac: mac, mtu: mtu}
	n.in.n, n.out.n = n, n
	n.header.Store(netHeader)
	return n, nil
}

// NetInfo is Net's Info: what a front end needs that has the device served elsewhere.
func NetInfo() Info {
	return Info{
		Name: "virtio-net", ID: 1, Class: 0x020000, Features: netFeatures,
		Queues: []uint16{NetQueueSize, NetQueueSize}, InOrder: true,
	}
}

// Info implements Backend.
func (n *Net) Info() Info { return NetInfo() }

// ReadConfig implements Backend (§5.1.4).
func (n *Net) ReadConfig(offset uint64, p []byte) {
	if offset >= netConfigSize {
		return
	}
	var c [netConfigSize]byte
	le := binary.LittleEndian
	copy(c[:], n.mac[:])
	le.PutUint16(c[6:], netLinkUp)
	le.PutUint16(c[8:], 1)
	le.PutUint16(c[10:], n.mtu)
	copy(p, c[offset:])
}

// Dropped counts the packets of the guest that were malformed or that the port did not take, and those
// for it that its driver could not take.
func (n *Net) Dropped() uint64 { return n.dropped.Load() }

// Start implements Backend.
func (n *Net) Start(features uint64) {
	header := netHeader
	if features&(FeatureVersion1|NetFeatureMergeable) == 0 {
		header = netHeaderLegacy
	}
	if n.header.Swap(int32(header)) != int32(header) {
		n.in.held = 0 // what was read for another driver, as that would have had it
	}
	n.taken.Store(features)
	n.failed.Store(nil)
	if n.port.Configure == nil {
		return
	}
	if err := n.port.Configure(features, header); err != nil {
		n.failed.Store(&err)
	}
}

// Failed is why the port could not be configured for the driver; nil where it could.
func (n *Net) Failed() error {
	if err := n.failed.Load(); err != nil {
		return fmt.Errorf("port: %w", *err)
	}
	return nil
}

// Stop implements Backend: StopQueue does it.
func (n *Net) Stop() {}

// StartQueue implements QueueServer.
func (n *Net) StartQueue(queue int) {
	if queue == netTransmit {
		n.out.stopped.Store(false)
	}
	n.deadline(queue, time.Time{})
}

// StopQueue implements QueueServer.
func (n *Net) StopQueue(queue int) {
	if queue == netTransmit {
		n.out.stopped.Store(true)
	}
	n.deadline(queue, time.Unix(1, 0))
}

func (n *Net) deadline(queue int, t time.Time) {
	if queue == netReceive { // errors: only a closed file's, whose reads end anyway
		_ = n.port.File.SetReadDeadline(t)
		return
	}
	_ = n.port.File.SetWriteDeadline(t)
}

// Close implements Backend.
func (n *Net) Close() error { return n.port.File.Close() }

// Handle implements Backend: it is not called, since this is a QueueServer.
func (n *Net) Handle(int, *Chain) error {
	return errors.New("virtio-net: chains are taken by ServeQueue")
}

// ServeQueue implements QueueServer: where there is a buffer it waits for a packet, and where there is
// a packet until the port has taken it.
func (n *Net) ServeQueue(queue int, q *Queue) error {
	if err := n.Failed(); err != nil {
		return err
	}
	if queue == netReceive {
		return n.in.serve(q)
	}
	return n.out.serve(q)
}
