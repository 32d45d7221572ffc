package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Network device: virtio 1.2 §5.1.

// Feature bits of a network device (virtio 1.2 §5.1.3).
const (
	NetFeatureCsum      uint64 = 1 << 0  // the device takes packets with partial checksums
	NetFeatureGuestCsum uint64 = 1 << 1  // the driver does
	NetFeatureMTU       uint64 = 1 << 3  //
	NetFeatureMAC       uint64 = 1 << 5  //
	NetFeatureHostTSO4  uint64 = 1 << 11 // the device cuts TCP segments
	NetFeatureHostTSO6  uint64 = 1 << 12 //
	NetFeatureHostECN   uint64 = 1 << 13 //
	NetFeatureStatus    uint64 = 1 << 16 //

	netFeatures = NetFeatureCsum | NetFeatureGuestCsum | NetFeatureMTU | NetFeatureMAC |
		NetFeatureHostTSO4 | NetFeatureHostTSO6 | NetFeatureHostECN | NetFeatureStatus
)

// NetQueueSize is the most entries of each of the two queues; 0 receives, 1 transmits (§5.1.2).
const NetQueueSize = 256

// The queues, seen from the guest.
const (
	netReceive = iota
	netTransmit
)

// Header of each packet (§5.1.6).
const (
	netHeader       = 12 // with num_buffers
	netHeaderLegacy = 10 // without VERSION_1
	ethernetHeader  = 14
	maxFrame        = ethernetHeader + 4 + 65535

	hdrNeedsCsum = 1
	gsoNone      = 0
	gsoTCPv4     = 1
	gsoTCPv6     = 4
	gsoECN       = 0x80
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

// Net is the back end of a network device over a port. Each queue's packets pass one by one and
// in order, so that at any instant the used index says what has passed; a packet that is on its
// way when this process is killed may be lost or sent twice, as in any network.
//
// It copies no payload: frames go between the port and the guest's buffers. Of what the driver
// writes it uses a header's copy, checked against the features that the driver took.
type Net struct {
	port    NetPort
	raw     syscall.RawConn
	mac     [6]byte
	mtu     uint16
	header  atomic.Int32  // length of the header
	taken   atomic.Uint64 // features
	failed  atomic.Pointer[error]
	dropped atomic.Uint64
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

// Dropped counts the packets of the guest that were malformed or that the port did not take.
func (n *Net) Dropped() uint64 { return n.dropped.Load() }

// Start implements Backend.
func (n *Net) Start(features uint64) {
	header := netHeader
	if features&FeatureVersion1 == 0 {
		header = netHeaderLegacy
	}
	n.header.Store(int32(header))
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

// StartQueue implements QueueStopper.
func (n *Net) StartQueue(queue int) { n.deadline(queue, time.Time{}) }

// StopQueue implements QueueStopper.
func (n *Net) StopQueue(queue int) { n.deadline(queue, time.Unix(1, 0)) }

func (n *Net) deadline(queue int, t time.Time) {
	if queue == netReceive { // errors: only a closed file's, whose reads end anyway
		_ = n.port.File.SetReadDeadline(t)
		return
	}
	_ = n.port.File.SetWriteDeadline(t)
}

// Close implements Backend.
func (n *Net) Close() error { return n.port.File.Close() }

// Handle implements Backend: it waits for a frame, or until the port has taken one.
func (n *Net) Handle(queue int, c *Chain) error {
	if err := n.Failed(); err != nil {
		return err
	}
	if queue == netReceive {
		return n.receive(c)
	}
	return n.transmit(c)
}

func (n *Net) receive(c *Chain) error {
	header := int(n.header.Load())
	if room := Length(c.Writable); room < uint64(header+ethernetHeader) {
		return fmt.Errorf("%w: %d bytes for a packet", ErrRing, room)
	}
	var got int
	var failed error
	err := n.raw.Read(func(fd uintptr) bool {
		got, failed = again(func() (int, error) { return unix.Readv(int(fd), c.Writable) })
		return !errors.Is(failed, unix.EAGAIN)
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.Return()
		return nil
	case err != nil:
		return fmt.Errorf("port: %w", err)
	case failed != nil:
		return fmt.Errorf("port: read: %w", failed)
	case got < header:
		return fmt.Errorf("port: a frame of %d bytes", got)
	}
	n.completeHeader(c.Writable, header)
	c.Done(uint32(got))
	return nil
}

// completeHeader sets what the port does not know of: flags are 0 for a driver that takes no
// checksums, and a packet is in one buffer (§5.1.6.4.1).
func (n *Net) completeHeader(segments [][]byte, header int) {
	if n.taken.Load()&NetFeatureGuestCsum == 0 {
		Scatter(segments, []byte{0})
	}
	if header == netHeader {
		_, rest := Cut(segments, netHeaderLegacy)
		Scatter(rest, []byte{1, 0})
	}
}

func (n *Net) transmit(c *Chain) error {
	size := int(n.header.Load())
	length := Length(c.Readable)
	var header [netHeader]byte
	if length < uint64(size+ethernetHeader) || length > uint64(size+maxFrame) {
		return n.drop(c)
	}
	Gather(header[:size], c.Readable)
	if !headerAllowed(&header, n.taken.Load()) {
		return n.drop(c)
	}
	_, frame := Cut(c.Readable, uint64(size))
	frame = append([][]byte{header[:size]}, frame...)
	var failed error
	err := n.raw.Write(func(fd uintptr) bool {
		_, failed = again(func() (int, error) { return unix.Writev(int(fd), frame) })
		return !errors.Is(failed, unix.EAGAIN)
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.Return()
		return nil
	case err != nil:
		return fmt.Errorf("port: %w", err)
	case errors.Is(failed, unix.EBADFD) || errors.Is(failed, unix.EBADF): // the interface behind it was deleted
		return fmt.Errorf("port: write: %w", failed)
	case failed != nil: // refused: what the guest wrote, or the interface is down
		return n.drop(c)
	}
	c.Done(0)
	return nil
}

// headerAllowed takes out of a driver's header what is not its business and reports whether the
// rest is covered by the features.
func headerAllowed(h *[netHeader]byte, features uint64) bool {
	h[0] &= hdrNeedsCsum
	h[10], h[11] = 0, 0
	if h[0] != 0 && features&NetFeatureCsum == 0 {
		return false
	}
	var need uint64
	switch h[1] &^ gsoECN {
	case gsoNone:
		return h[1] == gsoNone
	case gsoTCPv4:
		need = NetFeatureHostTSO4
	case gsoTCPv6:
		need = NetFeatureHostTSO6
	default:
		return false
	}
	if h[1]&gsoECN != 0 {
		need |= NetFeatureHostECN
	}
	return features&need == need && h[0]&hdrNeedsCsum != 0
}

func (n *Net) drop(c *Chain) error {
	n.dropped.Add(1)
	c.Done(0)
	return nil
}

// again repeats a call that a signal interrupted.
func again(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
