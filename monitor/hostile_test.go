package monitor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"sync"
	"testing"

	"redoubt.dev/redoubt/kvm"
	"redoubt.dev/redoubt/monitor/serial"
	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/vtpm/crb"
)

// offline is a machine without KVM: its exit handlers work, its guest does not exist.
func offline(t testing.TB) *vcpu {
	t.Helper()
	m := &Machine{cfg: Config{TPM: echoTPM{}, ConsoleOut: io.Discard}, ecam: make([]byte, pci.ECAMSize)}
	m.changed = sync.NewCond(&m.mu)
	m.serial = serial.New(consoleWriter{m}, func(bool) {})
	var err error
	if m.bus, err = pci.NewBus(pci.Host{}, m.ecam); err != nil {
		t.Fatal(err)
	}
	f, err := pci.NewFunction(pci.Spec{Name: "test", Vendor: 1, Device: 2, BARSize: 0x4000, Vectors: 4})
	if err != nil {
		t.Fatal(err)
	}
	place := topology.Place{Kind: topology.Disk, Slot: 1, BAR: barBase, Size: 0x8000, Route: topology.FirstRoute, Vectors: 4}
	if err := m.bus.Build(pci.Placed{Function: f, Place: place}); err != nil {
		t.Fatal(err)
	}
	if m.tpm, err = crb.New(transport{m}, make([]byte, crb.BufferSize), m.tpmAccessed, nil); err != nil {
		t.Fatal(err)
	}
	return &vcpu{m: m}
}

type echoTPM struct{}

func (echoTPM) Execute(_ uint8, command []byte) ([]byte, error) { return command, nil }

func TestUnknownReadsAsOnes(t *testing.T) {
	c := offline(t)
	p := []byte{1, 2, 3, 4}
	if err := c.port(kvm.IO{Port: 0x1234, Size: 4, Count: 1, Data: p}); err != nil || !bytes.Equal(p, []byte{255, 255, 255, 255}) {
		t.Errorf("port reads % x, %v", p, err)
	}
	clear(p)
	if err := c.mmio(kvm.MMIO{Address: 0xfe00_0000, Data: p}); err != nil || !bytes.Equal(p, []byte{255, 255, 255, 255}) {
		t.Errorf("memory reads % x, %v", p, err)
	}
}

func TestEndPorts(t *testing.T) {
	for _, x := range []struct {
		port  uint16
		value byte
		want  Kind
	}{
		{portSleepControl, sleepEnable | 5<<2, PowerOff},
		{portSleepControl, 5 << 2, 0},
		{portReset, resetValue, Reboot},
		{portReset, 0, 0},
		{portKeyboard, keyboardReset, Reboot},
		{portKeyboard, 0xd1, 0},
		{portResetControl, 0x06, Reboot},
		{portResetControl, 0x02, 0},
	} {
		c := offline(t)
		if err := c.port(kvm.IO{Out: true, Port: x.port, Size: 1, Count: 1, Data: []byte{x.value}}); err != nil {
			t.Fatal(err)
		}
		if c.m.outcome.Kind != x.want {
			t.Errorf("port %#x ← %#x: %v, want %v", x.port, x.value, c.m.outcome.Kind, x.want)
		}
	}
}

// FuzzExits plays a hostile guest against every handler: each 10 bytes are one exit.
func FuzzExits(f *testing.F) {
	f.Add([]byte{1, 1, 0xf8, 0x03, 0, 0, 'a', 0, 0, 0, 2, 4, 0, 0, 0xd4, 0xfe, 0, 0, 0, 0})
	f.Add([]byte{3, 4, 0x04, 0x80, 0, 0xe0, 6, 0, 0, 0, 3, 8, 0, 0, 0, 0xc0, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, script []byte) {
		c := offline(t)
		for ; len(script) >= 10; script = script[10:] {
			address := uint64(binary.LittleEndian.Uint32(script[2:]))
			data := bytes.Repeat(script[6:10], 2)[:script[1]%8+1]
			var err error
			if script[0]&2 == 0 {
				size := []int{1, 2, 4}[script[1]%3]
				data = data[:len(data)/size*size]
				err = c.port(kvm.IO{Out: script[0]&1 != 0, Port: uint16(address), Size: size, Count: len(data) / size, Data: data})
			} else {
				err = c.mmio(kvm.MMIO{Write: script[0]&1 != 0, Address: address, Data: data})
			}
			if err != nil && !errors.Is(err, crb.ErrResponse) {
				t.Fatal(err)
			}
		}
		if binary.LittleEndian.Uint32(c.m.ecam[32*1024:]) != 2<<16|1 {
			t.Error("the function's identity changed")
		}
	})
}

// kernelHeader is the smallest header that passes.
func kernelHeader() []byte {
	h := make([]byte, 4096)
	h[hdrSetupSects] = 1
	binary.LittleEndian.PutUint16(h[hdrBootFlag:], 0xaa55)
	copy(h[hdrMagic:], magicHdrS)
	h[hdrJump] = 0x6a
	binary.LittleEndian.PutUint16(h[hdrVersion:], 0x020f)
	h[hdrXLoadFlags] = xlfKernel64
	binary.LittleEndian.PutUint32(h[hdrAlignment:], 2<<20)
	binary.LittleEndian.PutUint32(h[hdrInitrdMax:], 0x7fffffff)
	binary.LittleEndian.PutUint32(h[hdrCmdlineSize:], 2047)
	binary.LittleEndian.PutUint64(h[hdrPrefAddress:], 16<<20)
	binary.LittleEndian.PutUint32(h[hdrInitSize:], 1<<20)
	return h
}

func TestBzImage(t *testing.T) {
	h := kernelHeader()
	k, err := parseBzImage(bytes.NewReader(h), int64(len(h)))
	if err != nil || k.load != 16<<20 || k.payload != 1024 || k.payloadSize != 3072 {
		t.Fatalf("%+v, %v", k, err)
	}
	for _, c := range []struct {
		name string
		off  int
		v    byte
	}{
		{"boot flag", hdrBootFlag, 0},
		{"magic", hdrMagic, 'X'},
		{"version", hdrVersion + 1, 1},
		{"64-bit entry", hdrXLoadFlags, 0},
		{"setup size", hdrSetupSects, 7},
		{"short header", hdrJump, 4},
		{"long header", hdrJump, 0xff},
		{"alignment", hdrAlignment, 3},
		{"address", hdrPrefAddress + 4, 1},
		{"init size", hdrInitSize + 2, 0},
	} {
		bad := kernelHeader()
		bad[c.off] = c.v
		if _, err := parseBzImage(bytes.NewReader(bad), int64(len(bad))); !errors.Is(err, ErrKernel) {
			t.Errorf("a bad %s passes: %v", c.name, err)
		}
	}
	for _, n := range []int{0, 1, hdrEndMin - 1} {
		if _, err := parseBzImage(bytes.NewReader(h[:n]), int64(n)); !errors.Is(err, ErrKernel) {
			t.Errorf("a file of %d bytes passes: %v", n, err)
		}
	}
}

func FuzzBzImage(f *testing.F) {
	f.Add(kernelHeader())
	f.Add([]byte("MZ"))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := parseBzImage(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			if !errors.Is(err, ErrKernel) {
				t.Errorf("error %v", err)
			}
			return
		}
		if k.payload+k.payloadSize != int64(len(data)) || k.payloadSize <= 0 || k.load+k.initSize > lowRAMLimit+1<<32 ||
			uint64(k.payloadSize) > k.initSize || hdrStart+len(k.header) > bpE820 {
			t.Errorf("%+v", k)
		}
	})
}

func TestMemorySlice(t *testing.T) {
	m := &memory{low: make([]byte, 8192), high: make([]byte, 4096)}
	for _, c := range []struct {
		gpa, n uint64
		ok     bool
	}{
		{0, 8192, true},
		{8191, 1, true},
		{8192, 0, true},
		{8191, 2, false},
		{8193, 0, false},
		{0, 1 << 63, false},
		{^uint64(0), 2, false},
		{^uint64(0), 1, false},
		{highRAMBase, 4096, true},
		{highRAMBase - 1, 1, false},
		{highRAMBase, 4097, false},
		{highRAMBase + 4095, 1, true},
	} {
		p, err := m.Slice(c.gpa, c.n)
		if (err == nil) != c.ok || (c.ok && uint64(len(p)) != c.n) {
			t.Errorf("Slice(%#x, %d): %d bytes, %v", c.gpa, c.n, len(p), err)
		}
		if err != nil && !errors.Is(err, pci.ErrMemory) {
			t.Errorf("error %v", err)
		}
	}
}

// Topology and what is hidden from guests.
func TestCPUID(t *testing.T) {
	host := []kvm.CPUIDEntry{
		{Function: 0, EAX: 0xd},
		{Function: 1, ECX: leaf1VMX, EBX: 0xffff_0800},
		{Function: 0xb, EDX: 99},
		{Function: 0x8000_0001, ECX: extSVM | extTopology},
		{Function: 0x8000_0008, ECX: 0xffff},
	}
	got := cpuid(host, 2, 3, true)
	find := func(f, i uint32) kvm.CPUIDEntry {
		for _, e := range got {
			if e.Function == f && e.Index == i {
				return e
			}
		}
		t.Fatalf("no leaf %#x.%d", f, i)
		return kvm.CPUIDEntry{}
	}
	if e := find(1, 0); e.EBX != 2<<24|3<<16|0x800 || e.ECX&leaf1VMX != 0 || e.ECX&leaf1TSCDeadline == 0 || e.EDX&leaf1HTT == 0 {
		t.Errorf("leaf 1: %+v", e)
	}
	if e := find(0xb, 1); e.EAX != 2 || e.EBX != 3 || e.EDX != 2 {
		t.Errorf("leaf 0xb: %+v", e)
	}
	if e := find(0x8000_0001, 0); e.ECX != extCmpLegacy {
		t.Errorf("leaf 0x80000001: %+v", e)
	}
	if e := cpuid(host, 0, 1, false)[1]; e.EDX&leaf1HTT != 0 || e.ECX&leaf1TSCDeadline != 0 {
		t.Errorf("one processor, leaf 1: %+v", e)
	}
}
