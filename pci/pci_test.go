package pci

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"

	"redoubt.dev/redoubt/pci/topology"
)

// bench is a bus with one recording device and counted lines and doorbells.
type bench struct {
	bus    *Bus
	ecam   []byte
	dev    *recorder
	fn     *Function
	lines  []*fakeLine
	routes []uint32
	bells  map[uint64]int
}

type recorder struct {
	wrote  []byte
	closed bool
}

func (r *recorder) Attach(Memory, *Function) error { return nil }
func (r *recorder) ReadBAR(off uint64, p []byte) {
	for i := range p {
		p[i] = byte(off) + byte(i)
	}
}
func (r *recorder) WriteBAR(off uint64, p []byte) { r.wrote = append([]byte{byte(off)}, p...) }
func (r *recorder) Close() error                  { r.closed = true; return nil }

type fakeLine struct {
	file    *os.File
	open    bool
	address uint64
	data    uint32
	refuse  bool
}

func (l *fakeLine) File() *os.File { return l.file }
func (l *fakeLine) Unmask(a uint64, d uint32) error {
	if l.refuse {
		return errors.New("refused")
	}
	l.open, l.address, l.data = true, a, d
	return nil
}
func (l *fakeLine) Mask() error   { l.open = false; return nil }
func (l *fakeLine) Pending() bool { return true }
func (l *fakeLine) Close() error  { return nil }

func (b *bench) NewLine(route uint32) (Line, error) {
	b.routes = append(b.routes, route)
	l := &fakeLine{}
	b.lines = append(b.lines, l)
	return l, nil
}
func (b *bench) AddDoorbell(gpa uint64, _ Doorbell) error    { b.bells[gpa]++; return nil }
func (b *bench) RemoveDoorbell(gpa uint64, _ Doorbell) error { b.bells[gpa]--; return nil }

const (
	lo, hi  = topology.WindowBase, topology.WindowBase + topology.WindowSize
	dev1    = functionStride
	barSize = 0x4000
)

// testPlace is the recorder's.
var testPlace = topology.Place{Kind: topology.Disk, Slot: 1, BAR: lo + 0x10000, Size: 2 * barSize, Route: 100, Vectors: 3}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{ecam: make([]byte, ECAMSize), dev: &recorder{}, bells: map[uint64]int{}}
	var err error
	if b.bus, err = NewBus(Host{Interrupts: b, Doorbells: b}, b.ecam); err != nil {
		t.Fatal(err)
	}
	b.fn, err = NewFunction(Spec{
		Name: "test", Vendor: 0x1af4, Device: 0x1042, Class: 0x018000, BARSize: barSize, Vectors: 3,
		Capabilities:   []Capability{{Data: []byte{9, 0, 20, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}},
		Doorbells:      []Doorbell{{Offset: 0x3000, Size: 2, File: os.Stderr}},
		Implementation: b.dev,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.bus.Build(Placed{b.fn, testPlace}); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) write32(off uint64, v uint32) {
	b.bus.WriteConfig(off, binary.LittleEndian.AppendUint32(nil, v))
}

func (b *bench) write16(off uint64, v uint16) {
	b.bus.WriteConfig(off, binary.LittleEndian.AppendUint16(nil, v))
}

func (b *bench) read32(off uint64) uint32 { return binary.LittleEndian.Uint32(b.ecam[off:]) }

// The guest sizes the BAR as PCI 3.0 §6.2.5.1 says, moves it, and the device follows.
func TestBAR(t *testing.T) {
	b := newBench(t)
	base := b.read32(dev1 + regBAR0)
	if uint64(base) != testPlace.BAR {
		t.Fatalf("BAR assigned to %#x", base)
	}
	b.write32(dev1+regBAR0, 0xffff_ffff)
	if got := b.read32(dev1 + regBAR0); got != ^uint32(2*barSize-1) {
		t.Errorf("sizing reads %#x", got)
	}
	b.write32(dev1+regBAR0+4, 0xffff_ffff)
	if got := b.read32(dev1 + regBAR0 + 4); got != 0 {
		t.Errorf("an absent BAR reads %#x", got)
	}
	b.write32(dev1+regBAR0, base)
	p := make([]byte, 4)
	if b.bus.Read(uint64(base), p) || p[0] != 0xff {
		t.Error("the BAR decodes before it is enabled")
	}
	b.write16(dev1+regCommand, commandMemory)
	if !b.bus.Read(uint64(base)+4, p) || p[0] != 4 || b.bells[uint64(base)+0x3000] != 1 {
		t.Errorf("read %x, doorbells %v", p, b.bells)
	}
	moved := uint32(lo + 0x8000)
	b.write32(dev1+regBAR0, moved)
	if b.bus.Read(uint64(base), p) || !b.bus.Write(uint64(moved)+8, []byte{7}) || b.dev.wrote[0] != 8 {
		t.Error("the BAR did not move")
	}
	if b.bells[uint64(base)+0x3000] != 0 || b.bells[uint64(moved)+0x3000] != 1 {
		t.Errorf("doorbells %v", b.bells)
	}
	for _, outside := range []uint32{0, 0x1000_0000, hi, lo - 2*barSize, 0xfee0_0000} {
		b.write32(dev1+regBAR0, outside)
		if b.bus.Read(uint64(outside), p) {
			t.Errorf("a BAR at %#x is decoded", outside)
		}
	}
	if b.bells[uint64(moved)+0x3000] != 0 {
		t.Error("a doorbell outlives its BAR")
	}
	if err := b.bus.Close(); err != nil || !b.dev.closed {
		t.Errorf("close: %v", err)
	}
}

// A function is where it was placed and has the routes it was given; a bus is not built from places
// that overlap or are another's.
func TestBuild(t *testing.T) {
	b := newBench(t)
	if len(b.routes) != 3 || b.routes[0] != 100 || b.routes[2] != 102 {
		t.Errorf("routes %v", b.routes)
	}
	for want, change := range map[string]func(a, b *topology.Place){
		"slot 1 is taken": func(a, _ *topology.Place) { a.Slot = 1 },
		"slot 0":          func(a, _ *topology.Place) { a.Slot = 0 },
		"overlap: slot":   func(a, b *topology.Place) { b.Slot = a.Slot },
		"overlap: BARs":   func(a, b *topology.Place) { b.BAR = a.BAR },
		"overlap: routes": func(a, b *topology.Place) { b.Route = a.Route },
		"the same device": func(a, b *topology.Place) { b.Index = a.Index },
		"outside":         func(a, _ *topology.Place) { a.BAR = hi },
		"needs 32768":     func(a, _ *topology.Place) { a.Size = 4096 },
		"and 3":           func(a, _ *topology.Place) { a.Vectors = 4 },
	} {
		var all [2]Placed
		var devs [2]*recorder
		for i := range all {
			devs[i] = &recorder{}
			f, err := NewFunction(Spec{Name: "other", BARSize: barSize, Vectors: 3, Implementation: devs[i]})
			if err != nil {
				t.Fatal(err)
			}
			n := i + 2
			all[i] = Placed{f, topology.Place{Kind: topology.NIC, Index: i, Slot: n, BAR: lo + uint64(n)<<20, Size: 2 * barSize, Route: uint32(200 + 3*i), Vectors: 3}}
		}
		change(&all[0].Place, &all[1].Place)
		if err := b.bus.Build(all[:]...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
		if !devs[0].closed || !devs[1].closed {
			t.Errorf("%q: a device is left open", want)
		}
		if v := b.read32(2 * functionStride); v != 0xffff_ffff {
			t.Errorf("%q: device 2 is %#x", want, v)
		}
	}
}

func TestAbsentFunctions(t *testing.T) {
	b := newBench(t)
	for slot := uint64(2); slot < 32; slot++ {
		if v := b.read32(slot * functionStride); v != 0xffff_ffff {
			t.Errorf("device %d is %#x", slot, v)
		}
	}
	if v := b.read32(dev1 + ConfigSize); v != 0xffff_ffff {
		t.Errorf("function 1 is %#x", v)
	}
}

// Vectors go through masks as PCI 3.0 §6.8.2 says.
func TestMSIX(t *testing.T) {
	b := newBench(t)
	base := uint64(b.read32(dev1 + regBAR0))
	b.write16(dev1+regCommand, commandMemory|commandMaster)
	capability := uint64(b.ecam[dev1+regCapPtr])
	if b.ecam[dev1+capability] != capMSIX || b.ecam[dev1+capability+2] != 2 {
		t.Fatalf("capability % x", b.ecam[dev1+capability:dev1+capability+12])
	}
	entry := func(v int, word uint64, value uint32) {
		b.bus.Write(base+barSize+uint64(v)*16+word*4, binary.LittleEndian.AppendUint32(nil, value))
	}
	entry(1, 0, 0xfee0_0003)
	entry(1, 2, 0x41)
	entry(1, 3, 0)
	if b.lines[1].open {
		t.Error("a vector is open before MSI-X is enabled")
	}
	b.write16(dev1+capability+2, msixEnable)
	if l := b.lines[1]; !l.open || l.address != 0xfee0_0000 || l.data != 0x41 {
		t.Errorf("line %+v", l)
	}
	if b.lines[0].open || b.lines[2].open {
		t.Error("a masked vector is open")
	}
	entry(1, 2, 0x42) // rewritten while open
	if b.lines[1].data != 0x42 {
		t.Error("a changed message is not told")
	}
	b.write16(dev1+capability+2, msixEnable|msixMaskAll)
	if b.lines[1].open {
		t.Error("open under the function's mask")
	}
	p := make([]byte, 1)
	if !b.bus.Read(base+barSize+barSize/2, p) || p[0] != 7 {
		t.Errorf("pending bits %#x", p)
	}
	b.lines[1].refuse = true
	b.write16(dev1+capability+2, msixEnable)
	if b.lines[1].open {
		t.Error("a refused message counts as open")
	}
	if err := b.fn.Signal(99); err != nil || b.fn.Signal(-1) != nil {
		t.Error("a vector that is not there must be no error")
	}
}

func TestNewFunctionRefuses(t *testing.T) {
	for _, s := range []Spec{
		{BARSize: 100},
		{BARSize: 3 << 12},
		{BARSize: 4096, Vectors: 129},
		{Vectors: 1},
		{Class: 1 << 24},
		{BARSize: 4096, Doorbells: []Doorbell{{Offset: 4095, Size: 2, File: os.Stderr}}},
		{Capabilities: []Capability{{Data: make([]byte, 200)}}},
		{Capabilities: []Capability{{Data: []byte{1}}}},
	} {
		if _, err := NewFunction(s); err == nil {
			t.Errorf("accepted %+v", s)
		}
	}
}

// FuzzGuest plays a hostile guest: each 7 bytes are one access.
func FuzzGuest(f *testing.F) {
	f.Add([]byte{0, 0x04, 0x80, 0, 2, 2, 0, 1, 0, 0, 0, 4, 1, 2})
	f.Add([]byte{0, 0x10, 0x80, 0, 4, 0xff, 0xff, 0, 4, 0x80, 0, 2, 6, 0, 2, 0, 0x40, 0, 8, 1, 1})
	f.Fuzz(func(t *testing.T, script []byte) {
		b := newBench(t)
		for ; len(script) >= 7; script = script[7:] {
			off := uint64(script[1]) | uint64(script[2])<<8 | uint64(script[3])<<16
			p := make([]byte, script[4]%10)
			for i := range p {
				p[i] = script[5+i%2]
			}
			switch script[0] % 4 {
			case 0:
				b.bus.WriteConfig(off, p)
			case 1:
				b.bus.ReadConfig(off, p)
			case 2:
				b.bus.Write(lo+off, p)
			case 3:
				b.bus.Read(lo+off, p)
			}
		}
		// What no guest may change.
		if v := b.read32(dev1); v != 0x1042_1af4 {
			t.Errorf("identity became %#x", v)
		}
		if b.fn.decoded && (b.fn.base < lo || b.fn.base+2*barSize > hi) {
			t.Errorf("decoded at %#x", b.fn.base)
		}
		if err := b.bus.Close(); err != nil {
			t.Error(err)
		}
	})
}
