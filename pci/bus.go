package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"redoubt.dev/redoubt/pci/topology"
)

// ECAMSize is the size in bytes of one bus's configuration window (PCI Firmware 3.2 §4.1.2).
const ECAMSize = 1 << 20

// functionStride is the ECAM distance between function 0 of one device and of the next.
const functionStride = 8 * ConfigSize

// A Bus is root bus 0.
type Bus struct {
	host Host
	ecam []byte // ECAMSize bytes; the guest may be reading them

	mu    sync.RWMutex
	slots [topology.Slots]*Function // nil: empty
}

// A Placed is a function and its place on a bus.
type Placed struct {
	Function *Function
	Place    topology.Place
}

// NewBus makes a bus with a host bridge in slot 0. ecam is ECAMSize bytes that the guest
// reads as configuration space; BARs are decoded in package topology's window.
func NewBus(host Host, ecam []byte) (*Bus, error) {
	if len(ecam) != ECAMSize {
		return nil, fmt.Errorf("pci bus: ECAM of %d bytes", len(ecam))
	}
	b := &Bus{host: host, ecam: ecam}
	// An absent function reads as all ones: its vendor is enough for every prober.
	for off := 0; off < ECAMSize; off += functionStride {
		binary.LittleEndian.PutUint32(ecam[off:], 0xffff_ffff)
		for fn := 1; fn < 8; fn++ {
			binary.LittleEndian.PutUint32(ecam[off+fn*ConfigSize:], 0xffff_ffff)
		}
	}
	// The generic host bridge that Linux has no quirks for (QEMU's "gpex").
	bridge, err := NewFunction(Spec{Name: "host-bridge", Vendor: 0x1b36, Device: 0x0008, Class: 0x060000})
	if err != nil {
		return nil, err
	}
	b.slots[0] = bridge
	return b, bridge.attach(b.host, b.ecam[:ConfigSize], 0)
}

// Build puts functions on the bus, each in its place, and nothing where places overlap with one
// another, lie outside what there is, or are not what a function needs. Before the guest runs. It takes the
// functions over: those that an error keeps off the bus are closed.
func (b *Bus) Build(all ...Placed) (err error) {
	on := 0
	defer func() {
		if err == nil {
			return
		}
		for _, p := range all[on:] {
			err = errors.Join(err, p.Function.close())
		}
	}()
	t := topology.Topology{Machine: topology.Native}
	for _, p := range all {
		if f := p.Function; p.Place.Size != f.barSize || p.Place.Vectors != f.spec.Vectors {
			return fmt.Errorf("pci bus: %s has a place for a BAR of %d bytes and %d vectors and needs %d and %d",
				f.spec.Name, p.Place.Size, p.Place.Vectors, f.barSize, f.spec.Vectors)
		}
		t.Places = append(t.Places, p.Place)
	}
	if err := t.Check(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range all {
		if b.slots[p.Place.Slot] != nil {
			return fmt.Errorf("pci bus: %s: slot %d is taken", p.Function.spec.Name, p.Place.Slot)
		}
	}
	for _, p := range all {
		f, slot := p.Function, p.Place.Slot
		binary.LittleEndian.PutUint32(f.config[regBAR0:], uint32(p.Place.BAR))
		b.slots[slot], on = f, on+1
		off := slot * functionStride
		if err := f.attach(b.host, b.ecam[off:off+ConfigSize], p.Place.Route); err != nil {
			return err
		}
	}
	return nil
}

// Close closes every device. The guest must not run any more.
func (b *Bus) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for slot, f := range b.slots {
		if f != nil {
			errs = append(errs, f.close())
			b.slots[slot] = nil
		}
	}
	return errors.Join(errs...)
}

// ReadConfig reads configuration space at an ECAM offset; what lies outside reads as ones.
func (b *Bus) ReadConfig(off uint64, p []byte) {
	for i := range p {
		p[i] = 0xff
	}
	if off < ECAMSize && uint64(len(p)) <= ECAMSize-off {
		copy(p, b.ecam[off:])
	}
}

// WriteConfig is the guest's write to configuration space at an ECAM offset. Writes that are
// not 1, 2 or 4 bytes and aligned, or hit no function, are dropped.
func (b *Bus) WriteConfig(off uint64, p []byte) {
	n := uint64(len(p))
	if (n != 1 && n != 2 && n != 4) || off%n != 0 || off >= ECAMSize {
		return
	}
	slot, reg := off/functionStride, off%functionStride
	b.mu.Lock()
	defer b.mu.Unlock()
	if f := b.slots[slot]; f != nil && reg < ConfigSize && f.write(int(reg), p) {
		b.place(f)
	}
}

// place follows the guest's wish for a BAR: doorbells move with it. b.mu is held.
func (b *Bus) place(f *Function) {
	base, enabled := f.placement()
	enabled = enabled && base >= topology.WindowBase && base <= topology.WindowBase+topology.WindowSize-f.barSize
	if enabled == f.decoded && (!enabled || base == f.base) {
		return
	}
	if f.decoded {
		b.ring(f, f.base, false)
	}
	f.base, f.decoded = base, enabled
	if enabled {
		b.ring(f, base, true)
	}
}

// ring connects or disconnects f's doorbells. One that the kernel refuses (two BARs placed on
// top of each other) still works through WriteBAR, only slower.
func (b *Bus) ring(f *Function, base uint64, on bool) {
	if b.host.Doorbells == nil {
		return
	}
	for _, d := range f.spec.Doorbells {
		if on {
			_ = b.host.Doorbells.AddDoorbell(base+d.Offset, d)
		} else {
			_ = b.host.Doorbells.RemoveDoorbell(base+d.Offset, d)
		}
	}
}

// at finds the function that decodes all of [gpa, gpa+n).
func (b *Bus) at(gpa, n uint64) (*Function, uint64) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for _, f := range b.slots {
		if f != nil && f.decoded && gpa >= f.base && gpa-f.base < f.barSize && n <= f.barSize-(gpa-f.base) {
			return f, gpa - f.base
		}
	}
	return nil, 0
}

// Read serves a guest's read of the window; it reports false, with p all ones, where no BAR
// decodes the address.
func (b *Bus) Read(gpa uint64, p []byte) bool {
	f, off := b.at(gpa, uint64(len(p)))
	if f == nil || len(p) > 8 {
		for i := range p {
			p[i] = 0xff
		}
		return false
	}
	f.readBAR(off, p)
	return true
}

// Write is a guest's write to the window; it reports false where no BAR decodes the address.
func (b *Bus) Write(gpa uint64, p []byte) bool {
	f, off := b.at(gpa, uint64(len(p)))
	if f == nil || len(p) > 8 {
		return false
	}
	f.writeBAR(off, p)
	return true
}
