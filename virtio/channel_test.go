package virtio

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

func TestRNG(t *testing.T) {
	g := newGuest(t, NewRNG())
	q := g.start(g.features(), 8)[0]
	p := g.alloc(8192, 16)
	if n := q.do(q.chain(buf{p, 8192, true})); n != rngChunk {
		t.Errorf("%d bytes", n)
	}
	got := bytes.Clone(g.bytes(p, rngChunk))
	if bytes.Count(got, []byte{0}) > 100 || !bytes.Equal(g.bytes(p+rngChunk, 16), make([]byte, 16)) {
		t.Error("not random, or past what was said")
	}
	if n := q.do(q.chain(buf{p, 3, false})); n != 0 {
		t.Errorf("%d bytes into no room", n)
	}
	// A greedy guest is held back: 64 chunks beyond the burst take their time.
	begin := time.Now()
	for range 64 {
		q.do(q.chain(buf{p, rngChunk, true}))
	}
	if d, least := time.Since(begin), 64*rngChunk*time.Second/rngRate-2*rngBurst; d < least {
		t.Errorf("64 chunks in %v, want at least %v", d, least)
	}
}

// A chanGuest drives the console as Linux does.
type chanGuest struct {
	*guest
	qs   []*vq
	host net.Conn
	ctl  map[uint16]uint64 // head → buffer
}

func newChanGuest(t *testing.T) *chanGuest {
	t.Helper()
	host, theirs := net.Pipe()
	c, err := NewChannel(theirs, "redoubt.0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	g := &chanGuest{guest: newGuest(t, c), host: host, ctl: map[uint16]uint64{}}
	g.connect()
	return g
}

func (g *chanGuest) connect() {
	g.qs = g.start(transportFeatures|conMultiport, 16)
	clear(g.ctl)
	for range 4 {
		p := g.alloc(128, 16)
		head := g.qs[conControlReceive].chain(buf{p, 128, true})
		g.ctl[head] = p
		g.qs[conControlReceive].offer(head)
	}
	g.qs[conControlReceive].kick()
}

func (g *chanGuest) say(event, value uint16) {
	m := binary.LittleEndian.AppendUint32(nil, 0)
	m = binary.LittleEndian.AppendUint16(m, event)
	m = binary.LittleEndian.AppendUint16(m, value)
	g.qs[conControlTransmit].do(g.qs[conControlTransmit].chain(buf{g.put(m), 8, false}))
}

func (g *chanGuest) expect(event, value uint16, text string) {
	g.t.Helper()
	head, n := g.qs[conControlReceive].take()
	m := g.bytes(g.ctl[head], uint64(n))
	if e, v := binary.LittleEndian.Uint16(m[4:]), binary.LittleEndian.Uint16(m[6:]); e != event || v != value || string(m[8:]) != text {
		g.t.Fatalf("control message %d %d %q, want %d %d %q", e, v, m[8:], event, value, text)
	}
}

func (g *chanGuest) open() {
	g.t.Helper()
	g.say(conDeviceReady, 1)
	g.expect(conPortAdd, 1, "")
	g.say(conPortReady, 1)
	g.expect(conPortName, 1, "redoubt.0")
	g.expect(conPortOpen, 1, "")
	g.say(conPortOpen, 1)
}

func TestChannel(t *testing.T) {
	g := newChanGuest(t)
	g.open()
	// Guest to host: larger than the device's own buffer.
	text := strings.Repeat("from the guest. ", 4096)
	got := make(chan string, 1)
	go func() {
		b := make([]byte, len(text))
		_, _ = io.ReadFull(g.host, b)
		got <- string(b)
	}()
	g.qs[conTransmit].do(g.qs[conTransmit].chain(buf{g.put([]byte(text)), uint32(len(text)), false}))
	if <-got != text {
		t.Error("guest to host differs")
	}
	// Host to guest: in pieces of the guest's buffers.
	go func() { _, _ = g.host.Write([]byte("to the guest")) }()
	var in []byte
	for len(in) < 12 {
		p := g.alloc(8, 8)
		n := g.qs[conReceive].do(g.qs[conReceive].chain(buf{p, 8, true}))
		in = append(in, g.bytes(p, uint64(n))...)
	}
	if string(in) != "to the guest" {
		t.Errorf("host to guest: %q", in)
	}
	// The host's end is told.
	if err := g.host.Close(); err != nil {
		t.Fatal(err)
	}
	g.expect(conPortOpen, 0, "")
}

// A host that does not read holds the guest's writer, but not a reset; afterwards all works.
func TestChannelReset(t *testing.T) {
	g := newChanGuest(t)
	g.open()
	tx := g.qs[conTransmit]
	tx.offer(tx.chain(buf{g.put([]byte("nobody reads this")), 17, false}))
	tx.kick()
	rx := g.qs[conReceive]
	rx.offer(rx.chain(buf{g.alloc(8, 8), 8, true}))
	rx.kick()
	g.reset()
	g.connect()
	g.open()
	go func() {
		b := make([]byte, 2)
		_, _ = io.ReadFull(g.host, b)
		_, _ = g.host.Write(b)
	}()
	g.qs[conTransmit].do(g.qs[conTransmit].chain(buf{g.put([]byte("ok")), 2, false}))
	p := g.alloc(8, 8)
	if n := g.qs[conReceive].do(g.qs[conReceive].chain(buf{p, 8, true})); string(g.bytes(p, uint64(n))) != "ok" {
		t.Errorf("after the reset: %q", g.bytes(p, uint64(n)))
	}
}

func TestChannelMalformed(t *testing.T) {
	g := newChanGuest(t)
	q := g.qs[conControlTransmit]
	q.offer(q.chain(buf{ramBase, 7, false}))
	q.kick()
	g.waitNeedsReset()
}

func FuzzChannel(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 6, 0, 1, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := net.Pipe()
		defer a.Close()
		c, err := NewChannel(b, "x")
		if err != nil {
			t.Fatal(err)
		}
		c.Start(conMultiport)
		answers := 0
		for len(data) > 0 {
			m := data[:min(8, len(data))]
			data = data[len(m):]
			ch := &Chain{Readable: [][]byte{m}, done: func(*Chain, uint32) {}}
			if err := c.Handle(conControlTransmit, ch); (err != nil) != (len(m) < 8) {
				t.Fatalf("message of %d bytes: %v", len(m), err)
			}
			room := &Chain{Writable: [][]byte{make([]byte, 32)}, done: func(*Chain, uint32) { answers++ }}
			if err := c.Handle(conControlReceive, room); err != nil {
				t.Fatal(err)
			}
		}
		c.Stop()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
