package pci

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
)

// Registers of a type 0 header (PCI 3.0 §6.1).
const (
	regVendor   = 0x00
	regCommand  = 0x04
	regStatus   = 0x06
	regRevision = 0x08
	regBAR0     = 0x10
	regSubsys   = 0x2c
	regCapPtr   = 0x34
	regIntLine  = 0x3c

	firstCapability = 0x40
	conventional    = 256 // bytes a function without an Express capability has

	commandMemory = 1 << 1
	commandMaster = 1 << 2
	commandNoINTx = 1 << 10
	statusCapList = 1 << 4
)

// ConfigSize is the size in bytes of a function's configuration space (ECAM).
const ConfigSize = 4096

// A Function is one PCI function: what the guest sees of a device.
//
// It is safe for concurrent use. Lock order: Bus.mu, Function.mu.
type Function struct {
	spec    Spec
	barSize uint64 // with the MSI-X structures; 0: none

	mu       sync.Mutex
	config   []byte             // ConfigSize bytes; the guest may be reading them
	writable [conventional]byte // bits the guest may change
	caps     []placedCapability // in order of offset
	msix     *msix              // nil: none
	base     uint64             // where the BAR is decoded
	decoded  bool
	host     Host
}

type placedCapability struct {
	offset int
	cap    Capability
}

// NewFunction checks spec and builds its configuration space.
func NewFunction(spec Spec) (*Function, error) {
	f := &Function{spec: spec, config: make([]byte, ConfigSize)}
	bad := func(format string, args ...any) (*Function, error) {
		return nil, fmt.Errorf("pci function %q: %s", spec.Name, fmt.Sprintf(format, args...))
	}
	if s := spec.BARSize; s != 0 && (s < 4096 || s > 1<<20 || s&(s-1) != 0) {
		return bad("BAR of %d bytes: want a power of two from 4 KiB to 1 MiB", s)
	}
	if spec.Vectors < 0 || spec.Vectors > 2048 || uint64(spec.Vectors)*32 > spec.BARSize {
		return bad("%d vectors do not fit a BAR of %d bytes", spec.Vectors, spec.BARSize)
	}
	if spec.Class>>24 != 0 {
		return bad("class %#x has more than 24 bits", spec.Class)
	}
	for _, d := range spec.Doorbells {
		if d.Offset >= spec.BARSize || uint64(d.Size) > spec.BARSize-d.Offset || d.File == nil {
			return bad("doorbell at %#x of %d bytes is outside the BAR", d.Offset, d.Size)
		}
	}
	c := f.config
	binary.LittleEndian.PutUint16(c[regVendor:], spec.Vendor)
	binary.LittleEndian.PutUint16(c[regVendor+2:], spec.Device)
	binary.LittleEndian.PutUint32(c[regRevision:], spec.Class<<8|uint32(spec.Revision))
	binary.LittleEndian.PutUint16(c[regSubsys:], spec.SubVendor)
	binary.LittleEndian.PutUint16(c[regSubsys+2:], spec.SubID)
	f.writable[regIntLine] = 0xff
	binary.LittleEndian.PutUint16(f.writable[regCommand:], commandMaster|commandNoINTx)
	if spec.BARSize > 0 {
		f.barSize = spec.BARSize
		if spec.Vectors > 0 {
			f.barSize *= 2 // the upper half holds the MSI-X structures
		}
		binary.LittleEndian.PutUint32(f.writable[regBAR0:], ^uint32(f.barSize-1)&^0xf)
		f.writable[regCommand] |= commandMemory
	}
	caps := spec.Capabilities
	if spec.Vectors > 0 {
		f.msix = newMSIX(spec.Vectors)
		caps = append([]Capability{f.msix.capability(spec.BARSize)}, caps...)
	}
	next, link := firstCapability, regCapPtr
	for _, k := range caps {
		n := len(k.Data)
		if n < 2 || next+n > conventional || (k.Writable != nil && len(k.Writable) != n) {
			return bad("capability of %d bytes at %#x does not fit", n, next)
		}
		copy(c[next:], k.Data)
		copy(f.writable[next:], k.Writable)
		f.writable[next], f.writable[next+1] = 0, 0
		c[link], c[next+1] = byte(next), 0
		c[regStatus] |= statusCapList
		f.caps = append(f.caps, placedCapability{next, k})
		link, next = next+1, (next+n+3)&^3
	}
	return f, nil
}

// Name is the spec's name.
func (f *Function) Name() string { return f.spec.Name }

// Signal raises MSI-X vector v. It does nothing for a vector the function does not have: the
// number often comes from the guest.
func (f *Function) Signal(v int) error {
	file := f.VectorFile(v)
	if file == nil {
		return nil
	}
	if _, err := file.Write(one[:]); err != nil {
		return fmt.Errorf("%s: signal vector %d: %w", f.spec.Name, v, err)
	}
	return nil
}

// one is what raises an eventfd.
var one = [8]byte{1}

// VectorFile is the eventfd of vector v, nil where there is none or the function is not attached.
func (f *Function) VectorFile(v int) *os.File {
	if f.msix == nil {
		return nil
	}
	return f.msix.file(v)
}

// BusMaster reports whether the guest lets the function reach memory and send messages. A
// device must not touch guest memory while it is false.
func (f *Function) BusMaster() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.config[regCommand]&commandMaster != 0
}

// Needs are the size of its BAR in bytes, 0 for none, and its MSI-X vectors: what its place must have.
func (f *Function) Needs() (bar uint64, vectors int) { return f.barSize, f.spec.Vectors }

// attach binds the function to its machine; its vectors' routes begin at route.
func (f *Function) attach(host Host, config []byte, route uint32) error {
	f.mu.Lock()
	copy(config, f.config)
	f.config = config
	f.host = host
	f.mu.Unlock()
	if f.msix != nil && host.Interrupts != nil {
		if err := f.msix.attach(host.Interrupts, route); err != nil {
			return fmt.Errorf("%s: %w", f.spec.Name, err)
		}
	}
	if f.spec.Implementation != nil {
		if err := f.spec.Implementation.Attach(host.Memory, f); err != nil {
			return fmt.Errorf("%s: %w", f.spec.Name, err)
		}
	}
	return nil
}

// close ends the device, then frees what attach took.
func (f *Function) close() error {
	var err error
	if f.spec.Implementation != nil {
		err = f.spec.Implementation.Close()
	}
	if f.msix != nil {
		f.msix.close()
	}
	return err
}

// write changes configuration space and reports whether the decoding of the BAR may have changed.
func (f *Function) write(off int, p []byte) (moved bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, b := range p {
		if o := off + i; o < conventional {
			w := f.writable[o]
			f.config[o] = f.config[o]&^w | b&w
		}
	}
	if f.barSize > 0 && off < regBAR0 {
		// BAR type bits are read-only zeros: 32-bit, not prefetchable.
		moved = overlaps(off, len(p), regCommand, 2)
	}
	if f.barSize > 0 && overlaps(off, len(p), regBAR0, 4) {
		moved = true
	}
	for _, k := range f.caps {
		n := len(k.cap.Data)
		if k.cap.OnWrite == nil || !overlaps(off, len(p), k.offset, n) {
			continue
		}
		now := append([]byte(nil), f.config[k.offset:k.offset+n]...)
		if changed := k.cap.OnWrite(now); len(changed) == n {
			copy(f.config[k.offset+2:], changed[2:])
		}
	}
	return moved
}

// placement is where the guest wants the BAR.
func (f *Function) placement() (base uint64, enabled bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	base = uint64(binary.LittleEndian.Uint32(f.config[regBAR0:]) &^ 0xf)
	return base, f.config[regCommand]&commandMemory != 0 && f.barSize > 0
}

func overlaps(off, n, start, size int) bool { return off < start+size && start < off+n }

// read and write a BAR: the device's half, then the MSI-X half.
func (f *Function) readBAR(off uint64, p []byte) {
	clear(p)
	switch end := off + uint64(len(p)); {
	case end <= f.spec.BARSize:
		if f.spec.Implementation != nil {
			f.spec.Implementation.ReadBAR(off, p)
		}
	case off >= f.spec.BARSize && f.msix != nil:
		f.msix.read(off-f.spec.BARSize, f.spec.BARSize/2, p)
	}
}

func (f *Function) writeBAR(off uint64, p []byte) {
	switch end := off + uint64(len(p)); {
	case end <= f.spec.BARSize:
		if f.spec.Implementation != nil {
			f.spec.Implementation.WriteBAR(off, p)
		}
	case off >= f.spec.BARSize && f.msix != nil:
		f.msix.write(off-f.spec.BARSize, p)
	}
}
