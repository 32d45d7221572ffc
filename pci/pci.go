// Package pci is one PCI Express root bus and the functions on it: configuration space, one
// memory BAR a function, MSI-X. It does no I/O of its own; a monitor gives it guest memory,
// interrupts and doorbells through the interfaces here. It chooses nothing, either: where each
// function is, is said by package topology.
//
// The shape is chosen for few exits. A function's configuration space is a page that the
// monitor maps read-only into the guest, so that configuration reads cost nothing; only writes
// arrive here ([Bus.WriteConfig]). A doorbell is an eventfd that the kernel signals when the
// guest writes its address, and an interrupt is an eventfd that the kernel turns into a message.
//
// Everything a guest writes is hostile: offsets, widths, BAR addresses and MSI-X entries are
// checked here, and a BAR outside the bus's window is simply not decoded.
//
// References: PCI Local Bus 3.0 §6 (configuration space, MSI-X §6.8.2), PCI Firmware 3.2 §4
// (ECAM).
package pci

import (
	"errors"
	"os"
)

// ErrMemory says that a guest-physical range is not wholly inside one region of guest memory.
var ErrMemory = errors.New("outside guest memory")

// Memory is a guest's memory as a device sees it.
type Memory interface {
	// Slice is the n bytes at guest-physical address gpa. It fails with ErrMemory unless
	// the whole range lies in one region of RAM. The guest may change the bytes at any
	// time: copy, then check, then use. The slice is valid until the machine is closed.
	Slice(gpa, n uint64) ([]byte, error)
}

// A Line is one interrupt's way into the guest. All methods are safe for concurrent use.
type Line interface {
	// File is the eventfd behind the line: writing 1 to it raises the interrupt, also from
	// another process (vhost-user). While the line is masked the eventfd keeps the event.
	File() *os.File
	// Unmask routes the line as an MSI message and lets it through; an event kept while it
	// was masked is delivered now.
	Unmask(address uint64, data uint32) error
	// Mask holds events back.
	Mask() error
	// Pending reports whether an event is being held back.
	Pending() bool
	// Close frees the line.
	Close() error
}

// Interrupts makes lines. They start masked.
type Interrupts interface {
	// NewLine makes the line of an interrupt route of the machine's, which nobody else has.
	NewLine(route uint32) (Line, error)
}

// A Doorbell is a place in a BAR that a driver writes to notify its device.
type Doorbell struct {
	Offset uint64   // in the BAR, within the device's part
	Size   uint32   // width in bytes of the write that counts: 1, 2, 4, 8; 0: any
	File   *os.File // an eventfd that the kernel signals; the device owns it
}

// Doorbells connects doorbells while their BAR is decoded.
type Doorbells interface {
	AddDoorbell(gpa uint64, d Doorbell) error
	RemoveDoorbell(gpa uint64, d Doorbell) error
}

// Host is what a machine gives to its functions. A nil member is absent (tests).
type Host struct {
	Memory     Memory
	Interrupts Interrupts
	Doorbells  Doorbells
}

// A Device is what a function does behind its registers.
//
// ReadBAR and WriteBAR are called from the vCPUs' goroutines, several at a time; p is 1 to 8
// bytes long and offset+len(p) ≤ Spec.BARSize. They must return at once: the vCPU waits. A
// write to a doorbell arrives at its eventfd instead where the kernel can do that; WriteBAR
// must handle it too.
type Device interface {
	// Attach gives the device its guest's memory and its function, once, before the guest
	// runs. The device signals interrupts by f.Signal or f.VectorFile.
	Attach(mem Memory, f *Function) error
	ReadBAR(offset uint64, p []byte)
	WriteBAR(offset uint64, p []byte)
	// Close ends the device: its goroutines are gone and guest memory is no longer touched
	// when it returns. It is called once, after the last vCPU stopped.
	Close() error
}

// A Capability is one entry of the capability list.
type Capability struct {
	// Data is the whole capability from its ID byte; the next-pointer (Data[1]) is filled in.
	Data []byte
	// Writable masks the bits of Data that the guest may change; nil: none.
	Writable []byte
	// OnWrite is called after the guest changed bytes of the capability, with the current
	// contents, under the function's lock: it must not call the Function's methods. What it
	// returns (same length; nil: no change) replaces the contents.
	OnWrite func(data []byte) []byte
}

// A Spec describes a function.
type Spec struct {
	Name             string // for errors and statistics, such as "virtio-blk"
	Vendor, Device   uint16
	SubVendor, SubID uint16
	Class            uint32 // 24 bits: base class, subclass, interface
	Revision         uint8
	BARSize          uint64 // the device's part of BAR 0: a power of two ≥ 4096, ≤ 1 MiB; 0: no BAR
	Vectors          int    // MSI-X vectors, ≤ BARSize/32; 0: no MSI-X
	Capabilities     []Capability
	Doorbells        []Doorbell
	Implementation   Device // nil: registers read as zero
}
