package virtio

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"
	"time"
)

// Console device: virtio 1.2 §5.3, with one named port and no terminal: a byte channel between
// a program on the host and one in the guest.

const (
	conMultiport uint64 = 1 << 1

	conQueueSize = 64
	conBuffer    = 32 << 10 // bytes read from the host at once
	conHeader    = 8        // of a control message: id u32, event u16, value u16
	conMaxQueued = 16       // control messages that wait for the driver's buffers
	conMaxName   = 64
)

// Queues (§5.3.2): port 0's, the control queues. The driver expects no more with one port.
const (
	conReceive = iota // device → driver
	conTransmit
	conControlReceive
	conControlTransmit
)

// Control events (§5.3.6.2).
const (
	conDeviceReady = 0
	conPortAdd     = 1
	conPortReady   = 3
	conPortOpen    = 6
	conPortName    = 7
)

// A Channel is the back end of the byte channel: /dev/virtio-ports/NAME in the guest.
//
// Bytes from the guest go to the host's connection; the guest waits while the host does not
// read. Bytes from the host wait for the guest's buffers, and the host waits while there are
// none. It owns one goroutine, ended by Close.
type Channel struct {
	host net.Conn
	name string
	wg   sync.WaitGroup

	order sync.Mutex // over flush; above mu

	mu      sync.Mutex
	cond    *sync.Cond // room, running, closed change
	running bool
	opened  bool // the guest's program has the port open
	closed  bool
	gone    bool       // the host hung up
	room    []*Chain   // the driver's empty buffers
	ctlRoom []*Chain   // the same of the control queue
	queued  []conEvent // control messages without a buffer
}

type conEvent struct {
	event, value uint16
	text         string
}

// NewChannel takes over host, a stream; name is the port's.
func NewChannel(host net.Conn, name string) (*Channel, error) {
	if name == "" || len(name) > conMaxName {
		return nil, fmt.Errorf("virtio-console: port name of %d bytes: want 1 to %d", len(name), conMaxName)
	}
	c := &Channel{host: host, name: name}
	c.cond = sync.NewCond(&c.mu)
	c.wg.Add(1)
	go c.pump()
	return c, nil
}

// Info implements Backend.
func (c *Channel) Info() Info {
	return Info{
		Name: "virtio-console", ID: 3, Class: 0x078000, Features: conMultiport,
		Queues: []uint16{conQueueSize, conQueueSize, conQueueSize, conQueueSize},
	}
}

// ReadConfig implements Backend (§5.3.4): cols, rows, max_nr_ports, emerg_wr.
func (c *Channel) ReadConfig(offset uint64, p []byte) {
	var b [12]byte
	binary.LittleEndian.PutUint32(b[4:], 1)
	if offset < uint64(len(b)) {
		copy(p, b[offset:])
	}
}

// Start implements Backend.
func (c *Channel) Start(uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// No error that matters: a connection that is gone fails its next use.
	_ = c.host.SetWriteDeadline(time.Time{})
	c.running, c.opened, c.queued = true, false, nil
	c.cond.Broadcast()
}

// Stop implements Backend.
func (c *Channel) Stop() {
	c.mu.Lock()
	c.running = false
	held := append(c.room, c.ctlRoom...)
	c.room, c.ctlRoom, c.queued = nil, nil, nil
	_ = c.host.SetWriteDeadline(time.Unix(1, 0)) // a Handle that waits for the host returns
	c.cond.Broadcast()
	c.mu.Unlock()
	for _, ch := range held {
		ch.Done(0)
	}
}

// Close implements Backend.
func (c *Channel) Close() error {
	c.mu.Lock()
	c.closed = true
	c.cond.Broadcast()
	c.mu.Unlock()
	err := c.host.Close()
	c.wg.Wait()
	return err
}

// Handle implements Backend.
func (c *Channel) Handle(queue int, ch *Chain) error {
	switch queue {
	case conReceive:
		if c.hold(&c.room, ch) {
			return nil
		}
	case conControlReceive:
		if c.hold(&c.ctlRoom, ch) {
			c.flush()
			return nil
		}
	case conTransmit:
		c.send(ch)
	case conControlTransmit:
		return c.control(ch)
	}
	ch.Done(0)
	return nil
}

// hold keeps an empty buffer; false when the device does not run.
func (c *Channel) hold(list *[]*Chain, ch *Chain) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.running {
		return false
	}
	*list = append(*list, ch) // at most the queue's size
	c.cond.Broadcast()
	return true
}

// send writes the guest's bytes to the host. With the host gone they are dropped, as into a
// line that nobody holds.
func (c *Channel) send(ch *Chain) {
	buf := make([]byte, conBuffer)
	for rest := ch.Readable; len(rest) > 0; {
		n := Gather(buf, rest)
		if _, err := c.host.Write(buf[:n]); err != nil {
			return
		}
		_, rest = Cut(rest, uint64(n))
	}
}

// control answers one of the driver's control messages (§5.3.6.2). Unknown ones are ignored.
func (c *Channel) control(ch *Chain) error {
	var m [conHeader]byte
	if n := Gather(m[:], ch.Readable); n < conHeader {
		return fmt.Errorf("%w: console control message of %d bytes, want %d", ErrRing, n, conHeader)
	}
	ch.Done(0)
	port := binary.LittleEndian.Uint32(m[0:])
	event, value := binary.LittleEndian.Uint16(m[4:]), binary.LittleEndian.Uint16(m[6:])
	switch {
	case event == conDeviceReady && value == 1:
		c.tell(conEvent{event: conPortAdd, value: 1})
	case event == conPortReady && port == 0 && value == 1:
		c.tell(conEvent{event: conPortName, value: 1, text: c.name})
		c.mu.Lock()
		gone := c.gone
		c.mu.Unlock()
		if !gone {
			c.tell(conEvent{event: conPortOpen, value: 1})
		}
	case event == conPortOpen && port == 0:
		c.mu.Lock()
		c.opened = value != 0
		c.cond.Broadcast()
		c.mu.Unlock()
	}
	return nil
}

// tell queues a control message. A driver that asks without giving buffers loses the rest.
func (c *Channel) tell(e conEvent) {
	c.mu.Lock()
	if c.running && len(c.queued) < conMaxQueued {
		c.queued = append(c.queued, e)
	}
	c.mu.Unlock()
	c.flush()
}

// flush puts queued control messages into the driver's buffers, in order. Chains are given back
// outside mu: Start takes mu below the transport's own locks.
func (c *Channel) flush() {
	c.order.Lock()
	defer c.order.Unlock()
	for {
		e, ch := c.nextMessage()
		if ch == nil {
			return
		}
		m := binary.LittleEndian.AppendUint32(nil, 0)
		m = binary.LittleEndian.AppendUint16(m, e.event)
		m = binary.LittleEndian.AppendUint16(m, e.value)
		ch.Done(uint32(Scatter(ch.Writable, append(m, e.text...))))
	}
}

func (c *Channel) nextMessage() (conEvent, *Chain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queued) == 0 || len(c.ctlRoom) == 0 {
		return conEvent{}, nil
	}
	e, ch := c.queued[0], c.ctlRoom[0]
	c.queued, c.ctlRoom = c.queued[1:], c.ctlRoom[1:]
	return e, ch
}

// pump owns the host's reading side.
func (c *Channel) pump() {
	defer c.wg.Done()
	buf := make([]byte, conBuffer)
	for {
		n, err := c.host.Read(buf)
		if !c.deliver(buf[:n]) {
			return
		}
		if err != nil {
			c.mu.Lock()
			c.gone = true
			c.mu.Unlock()
			c.tell(conEvent{event: conPortOpen, value: 0})
			return
		}
	}
}

// deliver waits until the guest has taken all of p; false when the device was closed. Bytes
// wait for a program in the guest to open the port: the driver drops them otherwise.
func (c *Channel) deliver(p []byte) bool {
	for len(p) > 0 {
		c.mu.Lock()
		for !c.closed && (len(c.room) == 0 || !c.opened) {
			c.cond.Wait()
		}
		if c.closed {
			c.mu.Unlock()
			return false
		}
		ch := c.room[0]
		c.room = c.room[1:]
		c.mu.Unlock()
		n := Scatter(ch.Writable, p)
		ch.Done(uint32(n))
		p = p[n:]
	}
	return true
}
