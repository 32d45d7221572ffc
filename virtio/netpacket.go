package virtio

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// A network device's packets, one way and the other.

// Header of each packet (§5.1.6).
const (
	netHeader       = 12 // with num_buffers
	netHeaderLegacy = 10 // without VERSION_1
	ethernetHeader  = 14
	maxFrame        = ethernetHeader + 4 + 65535

	hdrNeedsCsum = 1
	hdrDataValid = 2
	gsoNone      = 0
	gsoTCPv4     = 1
	gsoTCPv6     = 4
	gsoECN       = 0x80
)

// After so many packets, or bytes, the driver is interrupted though more may follow at once.
const (
	batchPackets = 32
	batchBytes   = 64 << 10
)

// batch counts what has passed since the last interrupt.
type batch struct{ packets, bytes int }

// passed counts a packet and interrupts the driver at a batch's end.
func (b *batch) passed(q *Queue, bytes int) {
	b.packets++
	b.bytes += bytes
	if b.packets >= batchPackets || b.bytes >= batchBytes {
		b.end(q)
	}
}

func (b *batch) end(q *Queue) {
	*b = batch{}
	q.Interrupt()
}

// A receiver brings packets from the port into the receive queue.
//
// It reads a packet only when there is a buffer, so that what waits does so in the port, where it
// outlives this process. How long the packet is it learns only then: one for which there are not
// buffers enough is held, with nothing of it in the guest's memory, until the driver has made enough
// available, and lost with this process.
type receiver struct {
	n      *Net
	packet []byte   // with its header, and one more byte: a longer one is seen as such
	held   int      // length of the packet; 0: there is none
	chains []*Chain // taken and not given back, while serve runs
	room   int      // in them
	used   []Used
	batch  batch
}

// serve implements ServeQueue.
func (r *receiver) serve(q *Queue) error {
	defer func() {
		q.Return(r.chains...)
		clear(r.chains)
		r.chains, r.room = r.chains[:0], 0
		r.batch.end(q)
	}()
	if r.packet == nil { // not for a port whose packets the kernel moves
		r.packet = make([]byte, netHeader+maxFrame+1)
	}
	for {
		if len(r.chains) == 0 {
			if more, err := r.take(q); !more {
				return err
			}
		}
		if r.held == 0 {
			if more, err := r.read(q); !more {
				return err
			}
		}
		if !receivable(r.packet[:r.held], int(r.n.header.Load()), r.n.taken.Load()) {
			r.drop()
			continue
		}
		for r.room < r.held && r.mergeable() && len(r.chains) < q.Size() {
			if more, err := r.take(q); !more {
				return err
			}
		}
		if r.room < r.held { // never will it fit
			r.drop()
			continue
		}
		r.deliver(q)
	}
}

func (r *receiver) mergeable() bool { return r.n.taken.Load()&NetFeatureMergeable != 0 }

// take takes another buffer, if there is one.
func (r *receiver) take(q *Queue) (bool, error) {
	c, err := q.Take()
	if c == nil || err != nil {
		return false, err
	}
	least := int(r.n.header.Load())
	if !r.mergeable() {
		least += ethernetHeader
	}
	room := Length(c.Writable)
	if room < uint64(least) { // §5.1.6.3.1
		return false, fmt.Errorf("%w: %d bytes for a packet", ErrRing, room)
	}
	r.chains = append(r.chains, c)
	r.room += int(room)
	return true, nil
}

// read waits for a packet of the port. It reports none when the queue is being stopped.
func (r *receiver) read(q *Queue) (bool, error) {
	header := int(r.n.header.Load())
	var got int
	var failed error
	err := r.n.raw.Read(func(fd uintptr) bool {
		got, failed = eintr.Value(func() (int, error) { return unix.Read(int(fd), r.packet[:header+maxFrame+1]) })
		if errors.Is(failed, unix.EAGAIN) {
			r.batch.end(q)
			return false
		}
		return true
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("port: %w", err)
	case failed != nil:
		return false, fmt.Errorf("port: read: %w", failed)
	case got < header:
		return false, fmt.Errorf("port: a frame of %d bytes", got)
	}
	r.held = got
	return true, nil
}

// deliver spreads the packet over the buffers that it needs and gives those to the driver, all at
// once. All but the last are full (§5.1.6.4.1).
func (r *receiver) deliver(q *Queue) {
	r.used = r.used[:0]
	for left := r.held; left > 0; {
		c := r.chains[len(r.used)]
		n := min(left, int(Length(c.Writable)))
		r.used = append(r.used, Used{c, uint32(n)})
		left -= n
	}
	if r.n.header.Load() == netHeader {
		r.packet[10], r.packet[11] = byte(len(r.used)), byte(len(r.used)>>8)
	}
	at := 0
	for _, u := range r.used {
		Scatter(u.Chain.Writable, r.packet[at:at+int(u.Written)])
		at += int(u.Written)
		r.room -= int(Length(u.Chain.Writable))
	}
	q.Put(r.used...)
	rest := copy(r.chains, r.chains[len(r.used):])
	clear(r.chains[rest:])
	r.chains = r.chains[:rest]
	r.batch.passed(q, r.held)
	r.held = 0
}

func (r *receiver) drop() {
	r.n.dropped.Add(1)
	r.held = 0
}

// receivable reports whether the driver takes a packet of the port, and takes out of its header what
// the driver did not ask for. What waited in the port may have been meant for another driver.
func receivable(packet []byte, header int, features uint64) bool {
	if len(packet) > header+maxFrame {
		return false
	}
	if features&NetFeatureGuestCsum == 0 {
		if packet[0]&hdrNeedsCsum != 0 {
			return false
		}
		packet[0] = 0
	}
	packet[0] &= hdrNeedsCsum | hdrDataValid
	return segments(packet, features, NetFeatureGuestTSO4, NetFeatureGuestTSO6, NetFeatureGuestECN)
}

// segments reports whether the features cover a header's kind of segments.
func segments(h []byte, features, tso4, tso6, ecn uint64) bool {
	var need uint64
	switch h[1] &^ gsoECN {
	case gsoNone:
		return h[1] == gsoNone
	case gsoTCPv4:
		need = tso4
	case gsoTCPv6:
		need = tso6
	default:
		return false
	}
	if h[1]&gsoECN != 0 {
		need |= ecn
	}
	return features&need == need && h[0]&hdrNeedsCsum != 0
}

// A sender brings packets from the transmit queue to the port.
type sender struct {
	n       *Net
	stopped atomic.Bool // looked at before each packet: what is refused does not wait for the port
	batch   batch
}

// serve implements ServeQueue.
func (s *sender) serve(q *Queue) error {
	defer s.batch.end(q)
	for !s.stopped.Load() {
		c, err := q.Take()
		if c == nil || err != nil {
			return err
		}
		sent, err := s.send(q, c)
		if err != nil {
			return err
		}
		if !sent {
			q.Return(c)
			return nil
		}
		q.Put(Used{Chain: c})
		s.batch.passed(q, int(c.bytes))
	}
	return nil
}

// send gives a packet to the port. What the port or the rules refuse counts as sent; what is not sent
// is because the queue is being stopped.
func (s *sender) send(q *Queue, c *Chain) (bool, error) {
	size := int(s.n.header.Load())
	length := Length(c.Readable)
	var header [netHeader]byte
	if length < uint64(size+ethernetHeader) || length > uint64(size+maxFrame) {
		return s.drop()
	}
	Gather(header[:size], c.Readable)
	if !sendable(&header, s.n.taken.Load()) {
		return s.drop()
	}
	_, frame := Cut(c.Readable, uint64(size))
	frame = append([][]byte{header[:size]}, frame...)
	var failed error
	err := s.n.raw.Write(func(fd uintptr) bool {
		_, failed = eintr.Value(func() (int, error) { return unix.Writev(int(fd), frame) })
		if errors.Is(failed, unix.EAGAIN) {
			s.batch.end(q)
			return false
		}
		return true
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("port: %w", err)
	case errors.Is(failed, unix.EBADFD) || errors.Is(failed, unix.EBADF): // the interface behind it was deleted
		return false, fmt.Errorf("port: write: %w", failed)
	case failed != nil: // refused: what the guest wrote, or the interface is down
		return s.drop()
	}
	return true, nil
}

func (s *sender) drop() (bool, error) {
	s.n.dropped.Add(1)
	return true, nil
}

// sendable takes out of a driver's header what is not its business and reports whether the rest is
// covered by the features.
func sendable(h *[netHeader]byte, features uint64) bool {
	h[0] &= hdrNeedsCsum
	h[10], h[11] = 0, 0
	if h[0] != 0 && features&NetFeatureCsum == 0 {
		return false
	}
	return segments(h[:], features, NetFeatureHostTSO4, NetFeatureHostTSO6, NetFeatureHostECN)
}
