package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/network/nettest"
	"redoubt.dev/redoubt/virtio"
)

// A netDriver is a guest's network driver over a Frontend: two rings of queueSize entries, each
// entry with one buffer of its own. With NetFeatureMergeable those that receive are too short for most frames. Its back ends are in this process; a pair of sockets plays the tap.
type netDriver struct {
	*front
	e     *Frontend
	bells [2]*os.File // kicks
	calls [2]*os.File
	wire  *os.File // the other end of the tap
	head  int      // length of the header before each of its frames
	make  func() (virtio.Backend, error)
	room  int    // of each receive buffer
	sent  uint16 // of the transmit ring
	given uint16 // of the receive ring
	heard uint16

	cancel context.CancelFunc
	ended  chan error
}

const (
	txRing  = 0x4000 // the receive ring is at 0
	netBufs = 0x10000
	netBuf  = 0x800
	netHead = 12

	netMergeable = virtio.NetFeatureMergeable | virtio.NetFeatureGuestCsum | virtio.NetFeatureGuestTSO4 | virtio.NetFeatureGuestTSO6 | virtio.NetFeatureGuestECN
)

func newNetDriver(t testing.TB, features uint64) *netDriver {
	t.Helper()
	d := &netDriver{front: newFront(t), e: NewFrontend(2, queueSize), room: netBuf}
	if features&virtio.NetFeatureMergeable != 0 {
		d.room = netBuf / 4
	}
	t.Cleanup(func() {
		if err := d.e.Close(); err != nil {
			t.Error(err)
		}
		d.stop()
	})
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	port := os.NewFile(uintptr(fds[1]), "port")
	d.wire, d.head = os.NewFile(uintptr(fds[0]), "wire"), netHead
	t.Cleanup(func() { d.wire.Close(); port.Close() })
	d.make = func() (virtio.Backend, error) {
		return virtio.NewNet(virtio.NetPort{File: copyFile(t, port)}, testMAC, 1500)
	}
	if err := errors.Join(d.e.SetFeatures(virtio.FeatureVersion1|features), d.e.SetMemory([]Region{{Guest: guestBase, Size: memSize, File: d.mem}})); err != nil {
		t.Fatal(err)
	}
	for i := range d.bells {
		d.bells[i], d.calls[i] = eventfd(t), eventfd(t)
		at := uint64(guestBase + i*txRing)
		q := QueueSetup{Size: queueSize, Areas: [3]uint64{at, at + atAvail, at + atUsed}, Kick: d.bells[i], Call: d.calls[i]}
		if err := d.e.StartQueue(i, q); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// replace ends the back end, if there is one, and connects the next.
func (d *netDriver) replace() {
	d.t.Helper()
	d.stop()
	b, err := d.make()
	if err != nil {
		d.t.Fatal(err)
	}
	own, theirs := socketpair(d.t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	d.cancel, d.ended = cancel, ended
	go func() {
		err := Serve(ctx, theirs, b, Options{Memory: d.whitelist()})
		ended <- errors.Join(err, b.Close())
	}()
	if _, err := d.e.Connect(own); err != nil {
		d.t.Fatal(err)
	}
}

// copyFile duplicates a file that does not block.
func copyFile(t testing.TB, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true) // Fd made it wait
	}
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// overTap puts the driver's device onto a real tap: own path or, with vhost, the kernel's.
func (d *netDriver) overTap(vhost bool) {
	d.t.Helper()
	ns := nettest.Namespace(d.t)
	var tun *os.File
	if err := ns.Do(func() (err error) {
		if tun, err = network.OpenTun(); err != nil {
			return err
		}
		tap, err := network.NewTap(copyFile(d.t, tun), "test0")
		if err != nil {
			return err
		}
		defer tap.File.Close()
		l, err := netlink.LinkByName("test0")
		if err != nil {
			return err
		}
		// No word of the host's own.
		if err := errors.Join(netlink.LinkSetIP6AddrGenMode(l, nl.IN6_ADDR_GEN_MODE_NONE), netlink.LinkSetUp(l)); err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		d.wire.Close()
		d.wire, d.head = os.NewFile(uintptr(fd), "wire"), 0
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: l.Attrs().Index})
	}); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { tun.Close() })
	d.make = func() (virtio.Backend, error) {
		tap, err := network.NewTap(copyFile(d.t, tun), "test0")
		if err != nil {
			return nil, err
		}
		if !vhost {
			return virtio.NewNet(tap.Port(), testMAC, 1500)
		}
		v, err := network.OpenVhost()
		if err != nil {
			return nil, err
		}
		return network.NewKernelNet(tap, v, testMAC, 1500)
	}
}

func (d *netDriver) stop() {
	if d.cancel == nil {
		return
	}
	d.cancel()
	if err := <-d.ended; err != nil && !errors.Is(err, context.Canceled) {
		d.t.Errorf("back end: %v", err)
	}
	d.cancel = nil
}

func (d *netDriver) buffer(queue int, i uint16) []byte {
	return d.ram[netBufs+(queue*queueSize+int(i%queueSize))*netBuf:][:netBuf]
}

// add makes a buffer available.
func (d *netDriver) add(queue int, index *uint16, length int, flags uint16) {
	le := binary.LittleEndian
	head := *index % queueSize
	ring := d.ram[queue*txRing:]
	le.PutUint64(ring[16*int(head):], uint64(guestBase+netBufs+(queue*queueSize+int(head))*netBuf))
	le.PutUint32(ring[16*int(head)+8:], uint32(length))
	le.PutUint16(ring[16*int(head)+12:], flags)
	le.PutUint16(ring[atAvail+4+2*int(head):], head)
	*index++
	le.PutUint16(ring[atAvail+2:], *index)
	if _, err := d.bells[queue].Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		d.t.Fatal(err)
	}
}

func (d *netDriver) used(queue int) uint16 {
	return binary.LittleEndian.Uint16(d.ram[queue*txRing+atUsed+2:])
}

// wait waits until the used index of a queue is want.
func (d *netDriver) wait(queue int, want uint16) {
	d.t.Helper()
	if err := d.calls[queue].SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		d.t.Fatal(err)
	}
	var b [8]byte
	for d.used(queue) != want {
		if _, err := d.calls[queue].Read(b[:]); err != nil {
			d.t.Fatalf("queue %d: used index %d, want %d: %v", queue, d.used(queue), want, err)
		}
	}
}

// transmit sends a frame behind a header.
func (d *netDriver) transmit(header []byte, frame []byte) {
	b := d.buffer(1, d.sent)
	clear(b[:netHead])
	copy(b, header)
	copy(b[netHead:], frame)
	d.add(1, &d.sent, netHead+len(frame), 0)
}

func testFrame(i int) []byte {
	return append(bytes.Repeat([]byte{2}, 14), binary.BigEndian.AppendUint64(bytes.Repeat([]byte{byte(i)}, i%1400), uint64(i))...)
}

// TestNetReplaced: back ends that are replaced in good order lose nothing and repeat nothing, either
// way, at whatever instant.
func TestNetReplaced(t *testing.T) {
	for name, features := range map[string]uint64{"pair": 0, "mergeable pair": netMergeable} {
		t.Run(name, func(t *testing.T) { newNetDriver(t, features).replaced() })
	}
	for name, features := range map[string]uint64{"tap": 0, "mergeable tap": netMergeable} {
		t.Run(name, func(t *testing.T) {
			d := newNetDriver(t, features)
			d.overTap(false)
			d.replaced()
		})
	}
}

// TestVhostNetReplaced: as TestNetReplaced with the kernel between tap and guest. It takes the lab for a host with vhost-net.
func TestVhostNetReplaced(t *testing.T) {
	lab.NeedsKVM(t)
	for name, features := range map[string]uint64{"frames": 0, "mergeable": netMergeable} {
		t.Run(name, func(t *testing.T) {
			d := newNetDriver(t, features)
			d.overTap(true)
			d.replaced()
		})
	}
}

func (d *netDriver) replaced() {
	t := d.t
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	buf := make([]byte, 4096)
	if err := d.wire.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	d.replace()
	for round := range 40 {
		k := 1 + random.IntN(queueSize/d.buffers(make([]byte, 1500))/2)
		for i := range k {
			d.transmit(nil, testFrame(round*100+i))
			if random.IntN(8) == 0 {
				d.replace()
			}
		}
		for i := range k {
			n, err := d.wire.Read(buf)
			if err != nil || !bytes.Equal(buf[d.head:n], testFrame(round*100+i)) {
				t.Fatalf("round %d: sent frame %d arrived as % x, %v", round, i, buf[:max(n, 0)], err)
			}
		}
		d.wait(1, d.sent)
		for i := range k {
			for range d.buffers(testFrame(round*100 + i)) {
				d.add(0, &d.given, d.room, 2)
			}
			if _, err := d.wire.Write(append(make([]byte, d.head), testFrame(round*100+i)...)); err != nil {
				t.Fatal(err)
			}
			if random.IntN(8) == 0 {
				d.replace()
			}
		}
		d.wait(0, d.given)
		for i := range k {
			want := testFrame(round*100 + i)
			got, n := d.hear()
			if !bytes.Equal(got[netHead:], want) || n != d.buffers(want) {
				t.Fatalf("round %d: heard frame %d as %d bytes in %d buffers", round, i, len(got), n)
			}
		}
	}
}

// buffers is how many a frame takes.
func (d *netDriver) buffers(frame []byte) int { return (netHead + len(frame) + d.room - 1) / d.room }

// hear takes the next packet from the used ring, whose entries are there, and says over how many buffers it came.
func (d *netDriver) hear() (packet []byte, buffers int) {
	for i := 0; i <= buffers; i++ {
		entry := d.ram[atUsed+4+8*int(d.heard%queueSize):]
		n := binary.LittleEndian.Uint32(entry[4:])
		packet = append(packet, d.buffer(0, d.heard)[:min(n, netBuf)]...)
		d.heard++
		if buffers = int(binary.LittleEndian.Uint16(packet[10:])) - 1; d.head == 0 && d.room == netBuf {
			buffers = 0 // vhost-net leaves the field alone
		}
	}
	return packet, buffers + 1
}

// TestNetHeaders: what the driver did not negotiate, or cannot mean, does not reach the tap.
func TestNetHeaders(t *testing.T) {
	all := virtio.NetFeatureCsum | virtio.NetFeatureHostTSO4 | virtio.NetFeatureHostTSO6 | virtio.NetFeatureHostECN
	for _, c := range []struct {
		name     string
		features uint64
		header   []byte
		length   int
		passes   bool
	}{
		{"plain", 0, nil, 60, true},
		{"checksum, negotiated", all, []byte{1}, 60, true},
		{"checksum", 0, []byte{1}, 60, false},
		{"segments, negotiated", all, []byte{1, 1}, 60, true},
		{"segments with ECN, negotiated", all, []byte{1, 0x81}, 60, true},
		{"segments with ECN", all &^ virtio.NetFeatureHostECN, []byte{1, 0x81}, 60, false},
		{"IPv6 segments", all &^ virtio.NetFeatureHostTSO6, []byte{1, 4}, 60, false},
		{"segments without checksum", all, []byte{0, 1}, 60, false},
		{"UDP fragments", all, []byte{1, 3}, 60, false},
		{"unknown kind", all, []byte{1, 0x7f}, 60, false},
		{"flags of a device", 0, []byte{0xfe, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9}, 60, true},
		{"no frame", 0, nil, 0, false},
		{"half a header of Ethernet", 0, nil, 13, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newNetDriver(t, c.features)
			d.replace()
			d.transmit(c.header, make([]byte, c.length))
			marker := testFrame(1)
			d.transmit(nil, marker)
			d.wait(1, 2)
			if err := d.wire.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 4096)
			passed := false
			for {
				n, err := d.wire.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				if bytes.Equal(buf[netHead:n], marker) {
					break
				}
				if passed = true; buf[0]&^1 != 0 || buf[10] != 0 {
					t.Errorf("the header arrived as % x", buf[:netHead])
				}
			}
			if passed != c.passes {
				t.Errorf("passed: %v", passed)
			}
		})
	}
}

// TestNetReceivedHeaders: what waited in the tap for another driver, or makes no sense, does not reach a
// driver that did not negotiate it.
func TestNetReceivedHeaders(t *testing.T) {
	const all = netMergeable
	for _, c := range []struct {
		name     string
		features uint64
		header   []byte
		length   int
		passes   bool
	}{
		{"plain", 0, nil, 60, true},
		{"checksum, negotiated", all, []byte{1}, 60, true},
		{"checksum", 0, []byte{1}, 60, false},
		{"checksum that was checked", 0, []byte{2}, 60, true},
		{"segments, negotiated", all, []byte{1, 1}, 9000, true},
		{"segments", virtio.NetFeatureGuestCsum, []byte{1, 1}, 60, false},
		{"segments that fit no buffer", all &^ virtio.NetFeatureMergeable, []byte{1, 1}, 9000, false},
		{"segments with ECN, negotiated", all, []byte{1, 0x84}, 9000, true},
		{"segments with ECN", all &^ virtio.NetFeatureGuestECN, []byte{1, 0x81}, 9000, false},
		{"IPv6 segments", all &^ virtio.NetFeatureGuestTSO6, []byte{1, 4}, 9000, false},
		{"segments without checksum", all, []byte{0, 1}, 9000, false},
		{"UDP fragments", all, []byte{1, 3}, 9000, false},
		{"UDP segments", all, []byte{1, 5}, 9000, false},
		{"the longest", all, []byte{1, 1}, 14 + 4 + 65535, false}, // of 64 short buffers
		{"more than the longest", all, []byte{1, 1}, 14 + 4 + 65535 + 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newNetDriver(t, c.features)
			d.replace()
			defer d.stop()
			for range queueSize {
				d.add(0, &d.given, d.room, 2)
			}
			first := make([]byte, netHead+c.length)
			copy(first, c.header)
			marker := append(make([]byte, netHead), testFrame(1)...)
			for _, p := range [][]byte{first, marker} {
				if _, err := d.wire.Write(p); err != nil {
					t.Fatal(err)
				}
			}
			want := uint16(d.buffers(testFrame(1)))
			if c.passes {
				want += uint16(d.buffers(first[netHead:]))
			}
			d.wait(0, want)
			got, _ := d.hear()
			if c.passes {
				if len(got) != len(first) || got[0] != first[0]&1 && c.features == 0 || got[1] != first[1] {
					t.Errorf("%d bytes came, the header is % x", len(got), got[:netHead])
				}
				got, _ = d.hear()
			}
			if !bytes.Equal(got[netHead:], marker[netHead:]) {
				t.Errorf("the next one came as % x", got)
			}
		})
	}
}

// FuzzNetRings lets both rings and all buffers hold anything, for a driver that takes packets in several
// buffers and for one that does not. Whatever it is, the session ends when it is told to.
func FuzzNetRings(f *testing.F) {
	ok := make([]byte, 64)
	binary.LittleEndian.PutUint64(ok, guestBase+netBufs)
	binary.LittleEndian.PutUint32(ok[8:], 100)
	f.Add(ok, ok, uint16(1), uint16(1))
	loop := append([]byte(nil), ok...)
	loop[12] = 1
	f.Add(loop, loop, uint16(3), uint16(3))
	far := append([]byte(nil), ok...)
	far[7], far[12] = 0xff, 2
	f.Add(far, ok, uint16(1), uint16(70))
	// Buffers that are long enough together, for one packet only, all of them, the last too short.
	ring := make([]byte, atAvail+4+2*queueSize)
	for i := range queueSize {
		copy(ring[16*i:], ok[:12])
		ring[16*i+12] = 2
		ring[atAvail+4+2*i] = byte(i)
	}
	for _, n := range []uint16{2, 5, queueSize} {
		f.Add(ring, ok, n, uint16(1))
	}
	short := append([]byte(nil), ring...)
	short[16*3+8] = netHead - 1
	f.Add(short, ok, uint16(queueSize), uint16(1))
	f.Fuzz(func(t *testing.T, rx, tx []byte, rxCount, txCount uint16) {
		for _, features := range []uint64{0, netMergeable, netMergeable | virtio.FeatureEventIdx | virtio.FeatureIndirect} {
			fuzzRings(t, features, rx, tx, rxCount, txCount)
		}
	})
}

func fuzzRings(t *testing.T, features uint64, rx, tx []byte, rxCount, txCount uint16) {
	d := newNetDriver(t, features)
	const part = atAvail + 4 + 2*queueSize
	copy(d.ram[:part], rx)
	copy(d.ram[txRing:txRing+part], tx)
	binary.LittleEndian.PutUint16(d.ram[atAvail+2:], rxCount)
	binary.LittleEndian.PutUint16(d.ram[txRing+atAvail+2:], txCount)
	for _, n := range []int{80, 400, 30_000, 80} {
		if _, err := d.wire.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	d.replace()
	d.e.DropQueue(0) // ends work on both in good order, or finds the session ended by the lie
	d.e.DropQueue(1)
	d.cancel()
	err := <-d.ended
	d.cancel = nil
	if err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, virtio.ErrRing) {
		t.Fatalf("ended with %v", err)
	}
	if err := d.wire.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
}
