package virtio

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// netBase are the features of every network driver here.
const netBase = FeatureVersion1

// A netGuest is a driver of a Net whose port is one end of a pair of sockets that keep frames apart.
// Each entry of its receive ring has room for a buffer of so many bytes, and for a guard behind it.
type netGuest struct {
	*guest
	net    *Net
	wire   *os.File
	rx, tx *vq
	room   uint64
	base   uint64
	sizes  []int // of the buffers that are offered, oldest first
}

func newNetGuest(t testing.TB, features uint64, entries uint16, room int) *netGuest {
	t.Helper()
	n, wire := newNetPort(t)
	g := &netGuest{guest: newGuest(t, n), net: n, wire: wire, room: uint64(room) + 1}
	g.base = g.alloc(g.room*uint64(entries), 16)
	g.up(features, entries)
	return g
}

// newNetPort makes a Net and the other end of its port.
func newNetPort(t testing.TB) (*Net, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	n, err := NewNet(NetPort{File: os.NewFile(uintptr(fds[1]), "port")}, [6]byte{2, 0, 0, 0, 0, 1}, 1500)
	if err != nil {
		t.Fatal(err)
	}
	wire := os.NewFile(uintptr(fds[0]), "wire")
	t.Cleanup(func() { wire.Close() })
	return n, wire
}

// up starts the driver.
func (g *netGuest) up(features uint64, entries uint16) {
	g.t.Helper()
	qs := g.start(features, entries)
	g.rx, g.tx, g.sizes = qs[netReceive], qs[netTransmit], nil
}

// offer makes receive buffers available and says so.
func (g *netGuest) offer(sizes ...int) {
	g.give(sizes...)
	g.rx.kick()
}

// give makes them available.
func (g *netGuest) give(sizes ...int) {
	for _, n := range sizes {
		p := g.base + uint64(g.rx.availIdx%g.rx.size)*g.room
		clear(g.bytes(p, g.room))
		g.rx.offer(g.rx.chain(buf{p, uint32(n), true}))
		g.sizes = append(g.sizes, n)
	}
}

// come makes a packet come over the wire: a header and a frame.
func (g *netGuest) come(packet []byte) {
	g.t.Helper()
	if _, err := g.wire.Write(packet); err != nil {
		g.t.Fatal(err)
	}
}

// packetOf is a packet whose frame has so many bytes.
func packetOf(kind byte, frame int) []byte {
	p := make([]byte, netHeader, netHeader+frame)
	if kind != gsoNone {
		p[0], p[1] = hdrNeedsCsum, kind
	}
	for i := range frame {
		p = append(p, byte(i*7+i>>8+frame))
	}
	return p
}

// hear takes the next packet from the used ring as a driver does, and says over how many buffers it
// came.
func (g *netGuest) hear() (packet []byte, buffers int) {
	g.t.Helper()
	for i := 0; ; i++ {
		at := g.base + uint64(g.rx.seen%g.rx.size)*g.room
		_, n := g.rx.take()
		size := g.sizes[0]
		g.sizes = g.sizes[1:]
		b := g.bytes(at, g.room)
		if int(n) > size || b[size] != 0 {
			g.t.Fatalf("%d bytes in a buffer of %d", n, size)
		}
		if packet = append(packet, b[:n]...); i == 0 {
			buffers = int(binary.LittleEndian.Uint16(packet[10:]))
		}
		if i == buffers-1 {
			return packet, buffers
		}
		if int(n) != size {
			g.t.Fatalf("buffer %d of %d has %d bytes of %d", i, buffers, n, size)
		}
	}
}

// expect holds the next packet against what was sent, and against the fewest buffers that hold it.
func (g *netGuest) expect(sent []byte) {
	g.t.Helper()
	want := 0
	for left := len(sent); left > 0; want++ {
		left -= g.sizes[want]
	}
	got, buffers := g.hear()
	got[10], got[11] = 0, 0
	if buffers != want || !bytes.Equal(got, sent) {
		g.t.Fatalf("a packet of %d bytes came as %d bytes in %d buffers, want %d", len(sent), len(got), buffers, want)
	}
}

const netMergeable = netBase | NetFeatureMergeable | NetFeatureGuestCsum | NetFeatureGuestTSO4 | NetFeatureGuestTSO6 | NetFeatureGuestECN

// TestNetSpread: packets of every length about the borders of buffers, over buffers of one or of several
// lengths, come whole, in no more buffers than they need and with nothing behind them.
func TestNetSpread(t *testing.T) {
	for name, c := range map[string]struct {
		entries uint16
		sizes   []int
	}{
		"pages": {64, []int{4096}}, "frames": {64, []int{1526}}, "mixed": {128, []int{1526, netHeader, 4096, 13, 300}},
		"huge": {16, []int{netHeader + maxFrame}}, "headers": {256, []int{netHeader}},
	} {
		for set, features := range map[string]uint64{"plain": 0, "event": FeatureEventIdx, "all": transportFeatures} {
			t.Run(name+"/"+set, func(t *testing.T) {
				g := newNetGuest(t, netMergeable|features, c.entries, slices.Max(c.sizes))
				next := 0
				fill := func() {
					for len(g.sizes) < int(c.entries) {
						g.offer(c.sizes[next%len(c.sizes)])
						next++
					}
				}
				for step := range 150 {
					fill()
					// One byte around the end of some buffer, or a usual length.
					sum := 0
					for _, n := range g.sizes[:1+step%len(g.sizes)] {
						sum += n
					}
					length := sum + step/3%3 - 1
					if usual := []int{60, 1514, maxFrame}; step%5 == 0 {
						length = netHeader + usual[step/5%3]
					}
					room := 0
					for _, n := range g.sizes {
						room += n
					}
					packet := packetOf(gsoTCPv4, min(max(length-netHeader, 0), room-netHeader, maxFrame))
					g.come(packet)
					g.expect(packet)
				}
				if n := g.net.Dropped(); n != 0 {
					t.Errorf("%d packets were dropped", n)
				}
			})
		}
	}
}

// TestNetWhole: at no instant does the used index stand within a packet, so that whoever looks at the ring
// of a device that was killed finds whole ones only.
func TestNetWhole(t *testing.T) {
	const entries, room = 256, 64
	g := newNetGuest(t, netMergeable|transportFeatures, entries, room)
	whole := map[uint16]bool{0: true} // where packets end
	var over atomic.Bool
	var watching sync.WaitGroup
	seen := map[uint16]bool{}
	watching.Go(func() {
		for !over.Load() {
			seen[uint16(loadHeader(g.bytes(g.rx.used, 4))>>16)] = true
		}
	})
	end := uint16(0)
	for i := range 400 {
		for len(g.sizes) < entries {
			g.offer(room)
		}
		packet := packetOf(gsoNone, room*(2+i*37%200))
		end += uint16((len(packet) + room - 1) / room)
		whole[end] = true
		g.come(packet)
		g.expect(packet)
	}
	over.Store(true)
	watching.Wait()
	for at := range seen {
		if !whole[at] {
			t.Errorf("the used index was %d, within a packet", at)
		}
	}
}

// A bareNet is a netGuest without a device between: serve is the transport.
type bareNet struct {
	*netGuest
	ring *Ring
	q    *Queue
}

func newBareNet(t testing.TB, features uint64, entries uint16, room int) *bareNet {
	t.Helper()
	n, wire := newNetPort(t)
	t.Cleanup(func() { _ = n.Close() })
	g := &netGuest{guest: &guest{t: t, ram: make(testRAM, 4<<20), next: ramBase}, net: n, wire: wire, room: uint64(room) + 1}
	g.base = g.alloc(g.room*uint64(entries), 16)
	b := &bareNet{netGuest: g}
	b.begin(features, entries)
	return b
}

// begin is the start of a driver.
func (b *bareNet) begin(features uint64, entries uint16) {
	b.t.Helper()
	b.rx, b.sizes = b.queue(0, entries), nil
	r, err := NewRing(b.ram, entries, [3]uint64{b.rx.desc, b.rx.avail, b.rx.used}, features)
	if err != nil {
		b.t.Fatal(err)
	}
	b.ring, b.q = r, NewQueue(r, func() {})
	b.net.Start(features)
}

func (b *bareNet) used() uint16 { return uint16(loadHeader(b.bytes(b.rx.used, 4)) >> 16) }

// waits makes sure that the device cannot go on with the buffers it has: it has touched none, counts none
// as taken and has asked to be told of the next.
func (b *bareNet) waits(buffers int) {
	b.t.Helper()
	if err := b.net.ServeQueue(netReceive, b.q); err != nil {
		b.t.Fatal(err)
	}
	if n := len(b.sizes) - int(b.used()-b.rx.seen); n != buffers {
		b.t.Fatalf("%d buffers are left, want %d", n, buffers)
	}
	for i := range buffers {
		at := b.base + uint64((b.used()+uint16(i))%b.rx.size)*b.room
		if p := b.bytes(at, b.room); !bytes.Equal(p, make([]byte, len(p))) {
			b.t.Fatalf("buffer %d of %d was written to", i, buffers)
		}
	}
	if available, used := b.ring.Positions(); available != b.used() || used != b.used() {
		b.t.Fatalf("positions %d and %d, want %d", available, used, b.used())
	}
	asked := loadHeader(b.bytes(b.rx.used, 4))&usedNoNotify == 0
	if b.ring.eventIdx {
		asked = load16(b.bytes(b.rx.used+4+8*uint64(b.rx.size), 2)) == b.rx.availIdx
	}
	if !asked {
		b.t.Fatal("the driver was not asked to notify")
	}
}

// TestNetExhausted: a packet for which there are not buffers enough waits, whole, until there are; a
// driver that starts anew gets it, too, if it can take it.
func TestNetExhausted(t *testing.T) {
	for set, features := range map[string]uint64{"plain": 0, "event": FeatureEventIdx} {
		t.Run(set, func(t *testing.T) {
			features |= netMergeable
			b := newBareNet(t, features, 64, 4096)
			small, big := packetOf(gsoNone, 60), packetOf(gsoTCPv6, 40_000)
			for _, again := range []bool{false, true, false} {
				b.give(4096, 4096, 4096)
				b.come(small)
				b.come(big)
				b.come(small)
				b.waits(2)
				b.expect(small)
				for n := 3; n < 10; n++ {
					b.give(4096)
					b.waits(n)
				}
				if again {
					b.begin(features, 64)
					b.give(slices.Repeat([]int{4096}, 9)...)
					b.waits(9)
				}
				b.give(4096)
				b.waits(0)
				b.expect(big)
				b.give(4096)
				b.waits(0)
				b.expect(small)
			}
			b.come(big)
			b.come(small)
			b.give(4096)
			b.waits(1)
			b.begin(features&^NetFeatureGuestTSO6, 64)
			b.give(4096)
			b.waits(0)
			b.expect(small)
			if n := b.net.Dropped(); n != 1 {
				t.Errorf("%d packets were dropped, want the one that is not for this driver", n)
			}
		})
	}
}

// TestNetTooLong: a packet that will never fit is dropped, and the next one comes.
func TestNetTooLong(t *testing.T) {
	for name, c := range map[string]struct {
		features uint64
		packet   int
	}{
		"one buffer a packet":  {netMergeable &^ NetFeatureMergeable, 989},
		"the ring's length":    {netMergeable, 8*1000 - netHeader + 1},
		"more than any packet": {netMergeable, maxFrame + 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBareNet(t, c.features, 8, 1000)
			b.give(slices.Repeat([]int{1000}, 8)...)
			fits := packetOf(gsoNone, c.packet-1)
			if c.packet > maxFrame {
				fits = packetOf(gsoNone, 60)
			}
			b.come(packetOf(gsoNone, c.packet))
			b.come(fits)
			for range 8 { // uses the others up
				b.come(packetOf(gsoNone, 988))
			}
			b.waits(0)
			b.expect(fits)
			if n := b.net.Dropped(); n != 1 {
				t.Errorf("%d packets were dropped", n)
			}
		})
	}
}

// TestNetSmallBuffers: a buffer that has no room for what must be in one breaks the rules (§5.1.6.3.1).
func TestNetSmallBuffers(t *testing.T) {
	for name, c := range map[string]struct {
		features uint64
		size     int
		refused  bool
	}{
		"header":                       {netMergeable, netHeader, false},
		"less":                         {netMergeable, netHeader - 1, true},
		"nothing":                      {netMergeable, 0, true},
		"frame, one buffer a packet":   {netBase, netHeader + ethernetHeader, false},
		"less, one buffer a packet":    {netBase, netHeader + ethernetHeader - 1, true},
		"nothing, one buffer a packet": {netBase, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBareNet(t, c.features, 8, 64)
			packet := packetOf(gsoNone, ethernetHeader)
			b.come(packet)
			b.give(64, c.size)
			b.come(packetOf(gsoNone, 60)) // takes the second buffer, and waits for a third or is dropped
			b.come(packet)
			b.come(packet)
			err := b.net.ServeQueue(netReceive, b.q)
			if refused := errors.Is(err, ErrRing); refused != c.refused || !refused && err != nil {
				t.Fatalf("a buffer of %d bytes: %v", c.size, err)
			}
			b.expect(packet)
			if c.refused && b.used() != 1 {
				t.Errorf("used index %d", b.used())
			}
		})
	}
}

// TestNetStopped: a queue that is being stopped takes no more, were it only what is refused: a driver
// that never stops adding keeps nobody waiting.
func TestNetStopped(t *testing.T) {
	b := newBareNet(t, netBase, 8, 64)
	b.tx = b.rx
	for range 3 {
		b.tx.offer(b.tx.chain(buf{b.base, 5, false})) // no frame
	}
	b.net.StopQueue(netTransmit)
	if err := b.net.ServeQueue(netTransmit, b.q); err != nil || b.used() != 0 {
		t.Fatalf("%d packets were taken, %v", b.used(), err)
	}
	b.net.StartQueue(netTransmit)
	if err := b.net.ServeQueue(netTransmit, b.q); err != nil || b.used() != 3 || b.net.Dropped() != 3 {
		t.Fatalf("%d packets were taken, %v", b.used(), err)
	}
}

// FuzzNetReceive holds receiving against a model, over buffers and packets of any lengths and headers.
// Two bytes each are a buffer's length, three a packet's length and its kind of segments.
func FuzzNetReceive(f *testing.F) {
	f.Add([]byte{6, 0, 6, 0, 6, 0}, []byte{0, 60, 0, 12, 0, 1, 8, 0, 0x84}, true, true)
	f.Add([]byte{0, 12, 0, 12, 0, 11}, []byte{0, 1, 0, 0, 60, 0}, true, true)
	f.Add([]byte{16, 0, 16, 0}, []byte{40, 0, 4, 0, 60, 3}, true, false)
	f.Add([]byte{5, 0xf6, 5, 0xf6, 0, 26}, []byte{5, 0xea, 0, 0, 100, 1, 0, 14, 0}, false, true)
	f.Add(bytes.Repeat([]byte{0, 12}, 16), []byte{1, 0, 0, 0, 60, 0}, true, true)
	f.Fuzz(func(t *testing.T, buffers, packets []byte, mergeable, segments bool) {
		features := netBase
		least := netHeader + ethernetHeader
		if mergeable {
			features |= NetFeatureMergeable
			least = netHeader
		}
		if segments {
			features |= netMergeable &^ NetFeatureMergeable &^ NetFeatureGuestTSO6
		}
		const entries, room = 16, 1 << 14
		b := newBareNet(t, features, entries, room)
		for ; len(buffers) >= 2 && len(b.sizes) < entries; buffers = buffers[2:] {
			b.give(int(binary.BigEndian.Uint16(buffers)) % room)
		}
		var want [][]byte // what each buffer that is used has
		sum, broken := 0, false
		enough := func(n int) bool { // for so many bytes, from the first buffer that is not used
			got := 0
			for i, size := range b.sizes[len(want):] {
				if size < least {
					broken = true
					return false
				}
				if got += size; got >= n {
					return true
				}
				if !mergeable && i == 0 {
					return false
				}
			}
			return false
		}
		ended := false
		for ; len(packets) >= 3 && sum < 100_000; packets = packets[3:] {
			p := packetOf(packets[2], int(binary.BigEndian.Uint16(packets)))
			sum += len(p)
			b.come(p)
			if ended || !enough(1) { // no buffer: the device does not read
				ended = true
				continue
			}
			if k := p[1]; k != gsoNone && (!segments || k&^gsoECN != gsoTCPv4) {
				continue
			}
			if !enough(len(p)) {
				// What can never fit is dropped; else it waits.
				ended = broken || mergeable && len(b.sizes)-len(want) < entries
				continue
			}
			first := len(want)
			for at := 0; at < len(p); {
				n := min(b.sizes[len(want)], len(p)-at)
				want = append(want, bytes.Clone(p[at:at+n]))
				at += n
			}
			want[first][10] = byte(len(want) - first)
		}
		if !ended {
			enough(1)
		}
		if err := b.wire.Close(); err != nil {
			t.Fatal(err)
		}
		// It ends for want of a buffer, or because the port does.
		if err := b.net.ServeQueue(netReceive, b.q); broken != errors.Is(err, ErrRing) {
			t.Fatalf("ended with %v, broken: %v", err, broken)
		}
		if n := int(b.used()); n != len(want) {
			t.Fatalf("%d buffers are used, want %d", n, len(want))
		}
		for i, w := range want {
			if head, n := b.rx.take(); int(head) != i || !bytes.Equal(b.bytes(b.base+uint64(i)*b.room, uint64(n)), w) {
				t.Fatalf("buffer %d is used as number %d with %d bytes, want %d", head, i, n, len(w))
			}
		}
	})
}
