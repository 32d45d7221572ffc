package virtio

import (
	"encoding/binary"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/pci/topology"
)

// ramBase is where the test guest's only RAM begins: not at 0, so that null is outside.
const ramBase = 0x10_0000

// testRAM is guest memory.
type testRAM []byte

func (m testRAM) Slice(gpa, n uint64) ([]byte, error) {
	if gpa < ramBase || gpa-ramBase > uint64(len(m)) || n > uint64(len(m))-(gpa-ramBase) {
		return nil, fmt.Errorf("%#x+%d: %w", gpa, n, pci.ErrMemory)
	}
	return m[gpa-ramBase : gpa-ramBase+n : gpa-ramBase+n], nil
}

// A line is an interrupt that a test can wait for.
type line struct{ f *os.File }

func (l line) File() *os.File              { return l.f }
func (l line) Unmask(uint64, uint32) error { return nil }
func (l line) Mask() error                 { return nil }
func (l line) Pending() bool               { return false }
func (l line) Close() error                { return l.f.Close() }

type lines struct{ all []line }

func (l *lines) NewLine(uint32) (pci.Line, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	n := line{os.NewFile(uintptr(fd), "irq")}
	l.all = append(l.all, n)
	return n, nil
}

// A guest is a driver written against the specification, and free to break it.
type guest struct {
	t    testing.TB
	ram  testRAM
	next uint64 // of the bump allocator
	irq  lines
	bus  *pci.Bus
	dev  *Device
	base uint64
}

const barWindow = topology.WindowBase

func newGuest(t testing.TB, backend Backend) *guest {
	t.Helper()
	return newGuestOf(t, func() (*Device, *pci.Function, error) { return New(backend) })
}

func newGuestOf(t testing.TB, create func() (*Device, *pci.Function, error)) *guest {
	t.Helper()
	g := &guest{t: t, ram: make(testRAM, 4<<20), next: ramBase, base: barWindow}
	var err error
	g.bus, err = pci.NewBus(pci.Host{Memory: g.ram, Interrupts: &g.irq}, make([]byte, pci.ECAMSize))
	if err != nil {
		t.Fatal(err)
	}
	dev, f, err := create()
	if err != nil {
		t.Fatal(err)
	}
	g.dev = dev
	bar, vectors := f.Needs()
	place := topology.Place{Kind: topology.Disk, Slot: 1, BAR: barWindow, Size: bar, Route: topology.FirstRoute, Vectors: vectors}
	if err := g.bus.Build(pci.Placed{Function: f, Place: place}); err != nil {
		t.Fatal(err)
	}
	g.bus.WriteConfig(8*pci.ConfigSize+4, []byte{6, 0}) // decode memory, master
	t.Cleanup(func() {
		if err := g.bus.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func (g *guest) write(off uint64, width int, v uint64) {
	g.t.Helper()
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	if !g.bus.Write(g.base+off, b[:width]) {
		g.t.Fatalf("BAR write at %#x not decoded", off)
	}
}

func (g *guest) read(off uint64, width int) uint64 {
	g.t.Helper()
	var b [8]byte
	if !g.bus.Read(g.base+off, b[:width]) {
		g.t.Fatalf("BAR read at %#x not decoded", off)
	}
	return binary.LittleEndian.Uint64(b[:])
}

func (g *guest) alloc(n, align uint64) uint64 {
	g.next = (g.next + align - 1) &^ (align - 1)
	p := g.next
	g.next += n
	return p
}

func (g *guest) bytes(gpa, n uint64) []byte {
	b, err := g.ram.Slice(gpa, n)
	if err != nil {
		g.t.Fatal(err)
	}
	return b
}

// put puts data into fresh memory.
func (g *guest) put(data []byte) uint64 {
	p := g.alloc(uint64(len(data)), 16)
	copy(g.bytes(p, uint64(len(data))), data)
	return p
}

func (g *guest) status() uint8 { return uint8(g.read(regStatus, 1)) }

// features are what the device offers.
func (g *guest) features() uint64 {
	g.write(regDeviceFeatureSelect, 4, 0)
	lo := g.read(regDeviceFeature, 4)
	g.write(regDeviceFeatureSelect, 4, 1)
	return lo | g.read(regDeviceFeature, 4)<<32
}

// negotiate goes to FEATURES_OK and reports whether the device agreed.
func (g *guest) negotiate(features uint64) bool {
	g.write(regStatus, 1, 1)
	g.write(regStatus, 1, 3)
	g.write(regDriverFeatureSelect, 4, 0)
	g.write(regDriverFeature, 4, features&0xffff_ffff)
	g.write(regDriverFeatureSelect, 4, 1)
	g.write(regDriverFeature, 4, features>>32)
	g.write(regStatus, 1, 11)
	return g.status()&statusFeaturesOK != 0
}

// start negotiates, sets up all queues of the size wished and goes to DRIVER_OK.
func (g *guest) start(features uint64, size uint16) []*vq {
	g.t.Helper()
	if !g.negotiate(features) {
		g.t.Fatalf("features %#x refused", features)
	}
	g.write(regConfigVector, 2, 0)
	var qs []*vq
	for i := range g.read(regNumQueues, 2) {
		q := g.queue(uint16(i), size)
		q.event = features&FeatureEventIdx != 0
		g.program(q)
		qs = append(qs, q)
	}
	g.write(regStatus, 1, 15)
	return qs
}

// reset resets the device and waits for it.
func (g *guest) reset() {
	g.t.Helper()
	g.write(regStatus, 1, 0)
	deadline := time.Now().Add(10 * time.Second)
	for g.status() != 0 {
		if time.Now().After(deadline) {
			g.t.Fatal("reset does not end")
		}
	}
}

// waitNeedsReset waits for the configuration interrupt that tells of a broken queue.
func (g *guest) waitNeedsReset() {
	g.t.Helper()
	g.wait(0)
	if g.status()&statusNeedsReset == 0 {
		g.t.Fatalf("status %#x after a configuration interrupt, want NEEDS_RESET", g.status())
	}
}

// wait waits for one interrupt of a vector.
func (g *guest) wait(vector int) {
	g.t.Helper()
	var b [8]byte
	f := g.irq.all[vector].f
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		g.t.Fatal(err)
	}
	if _, err := f.Read(b[:]); err != nil {
		g.t.Fatalf("interrupt %d: %v (device: %v)", vector, err, g.dev.Err())
	}
}

// interrupts is how many interrupts of a vector came since the last look.
func (g *guest) interrupts(vector int) uint64 {
	var b [8]byte
	n, err := unix.Read(int(g.irq.all[vector].f.Fd()), b[:])
	if n != 8 || err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

// A vq is the driver's side of a queue.
type vq struct {
	g                 *guest
	index, size       uint16
	desc, avail, used uint64
	event             bool
	nextDesc          uint16
	availIdx, seen    uint16
}

func (g *guest) queue(index, size uint16) *vq {
	return &vq{
		g: g, index: index, size: size,
		desc:  g.alloc(16*uint64(size), 16),
		avail: g.alloc(8+2*uint64(size), 4),
		used:  g.alloc(8+8*uint64(size), 4),
	}
}

func (g *guest) program(q *vq) {
	g.write(regQueueSelect, 2, uint64(q.index))
	g.write(regQueueSize, 2, uint64(q.size))
	g.write(regQueueVector, 2, uint64(q.index)+1)
	for i, a := range []uint64{q.desc, q.avail, q.used} {
		g.write(regQueueArea+8*uint64(i), 4, a&0xffff_ffff)
		g.write(regQueueArea+8*uint64(i)+4, 4, a>>32)
	}
	g.write(regQueueEnable, 2, 1)
}

// A buf is one buffer of a chain.
type buf struct {
	addr     uint64
	length   uint32
	writable bool
}

func descriptor(b buf, flags, next uint16) []byte {
	d := binary.LittleEndian.AppendUint64(nil, b.addr)
	d = binary.LittleEndian.AppendUint32(d, b.length)
	if b.writable {
		flags |= descWrite
	}
	d = binary.LittleEndian.AppendUint16(d, flags)
	return binary.LittleEndian.AppendUint16(d, next)
}

// raw writes a descriptor.
func (q *vq) raw(i uint16, b buf, flags, next uint16) {
	copy(q.g.bytes(q.desc+16*uint64(i), 16), descriptor(b, flags, next))
}

// chain lays a chain out and returns its head.
func (q *vq) chain(bufs ...buf) uint16 {
	head := q.nextDesc
	for i, b := range bufs {
		at := q.nextDesc
		q.nextDesc = (q.nextDesc + 1) % q.size
		if i < len(bufs)-1 {
			q.raw(at, b, descNext, q.nextDesc)
		} else {
			q.raw(at, b, 0, 0)
		}
	}
	return head
}

// indirect lays a chain out in a table of its own.
func (q *vq) indirect(bufs ...buf) uint16 {
	var table []byte
	for i, b := range bufs {
		var flags uint16
		if i < len(bufs)-1 {
			flags = descNext
		}
		table = append(table, descriptor(b, flags, uint16(i+1))...)
	}
	head := q.nextDesc
	q.nextDesc = (q.nextDesc + 1) % q.size
	q.raw(head, buf{addr: q.g.put(table), length: uint32(len(table))}, descIndirect, 0)
	return head
}

// offer makes a head available.
func (q *vq) offer(head uint16) {
	a := q.g.bytes(q.avail, 8+2*uint64(q.size))
	store16(a[4+2*(q.availIdx%q.size):], head)
	q.availIdx++
	storeHeader(a, uint32(q.availIdx)<<16|loadHeader(a)&0xffff)
}

func (q *vq) kick() { q.g.write(notifyOffset+notifyStride*uint64(q.index), 2, uint64(q.index)) }

// take waits for the next used entry.
func (q *vq) take() (head uint16, written uint32) {
	q.g.t.Helper()
	u := q.g.bytes(q.used, 8+8*uint64(q.size))
	for uint16(loadHeader(u)>>16) == q.seen {
		q.g.wait(int(q.index) + 1)
	}
	e := u[4+8*(q.seen%q.size):]
	q.seen++
	if q.event { // ask for an interrupt at the next one
		a := q.g.bytes(q.avail, 8+2*uint64(q.size))
		store16(a[4+2*q.size:], q.seen)
	}
	return uint16(binary.LittleEndian.Uint32(e)), binary.LittleEndian.Uint32(e[4:])
}

// do offers a chain, kicks, and waits for its end.
func (q *vq) do(head uint16) uint32 {
	q.g.t.Helper()
	q.offer(head)
	q.kick()
	got, n := q.take()
	if got != head {
		q.g.t.Fatalf("used head %d, want %d", got, head)
	}
	return n
}
