// Package monitor is Redoubt's native virtual machine monitor: it runs one Linux guest on KVM.
//
// The machine is a small, hardware-reduced ACPI one: vCPUs with in-kernel local APICs and one
// I/O APIC, RAM from a descriptor the caller owns, one 16550 console, one PCI Express root bus
// with the functions the caller made, and a TPM with a command-response buffer. There is no
// firmware: the kernel is entered by the 64-bit boot protocol
// (Documentation/arch/x86/boot.rst), with its own address randomisation.
//
// Everything a guest writes is hostile. An access to nothing reads as ones and is dropped; a
// register of a device is checked by the device. Nothing a guest does ends the process; what
// ends the guest is an [Outcome].
//
// Concurrency: each vCPU has one goroutine, locked to its thread, started and ended by
// [Machine.Run]. The console's input has one more. All methods of a Machine may be called by
// any goroutine; [Machine.Pause] also by a TPM transport inside Execute.
package monitor

import (
	"fmt"
	"io"
	"os"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/vtpm/crb"
)

// Limits of a machine.
const (
	MaxVCPUs  = 8
	MinMemory = 128 << 20
	MaxMemory = 1 << 40
)

// Config describes a machine. The caller keeps what it hands over open until Close.
type Config struct {
	KVM         *os.File // /dev/kvm, perhaps inherited
	Memory      *os.File // a memfd of MemoryBytes; the guest's RAM
	MemoryBytes uint64   // a multiple of 2 MiB, MinMemory to MaxMemory
	VCPUs       int      // 1 to MaxVCPUs

	Kernel  *os.File // bzImage, protocol 2.12 or later with a 64-bit entry
	Initrd  *os.File // nil: none
	Cmdline string   // at most 64 KiB, and what the kernel takes

	Devices []pci.Placed // New refuses places that overlap or that a device does not fit

	ConsoleOut io.Writer     // nil: discarded. It must not block for long: a vCPU waits
	ConsoleIn  <-chan []byte // nil: none. Read until closed or the machine ends

	// TPM executes the guest's TPM commands; nil: the machine has no TPM. An error of Execute
	// ends the machine (Crash). If it is an io.Closer it is closed when the machine stops, so
	// that a vCPU waiting in Execute comes back.
	TPM crb.Transport
	// Modules fences the kernel's modules (package isolate); nil: they are the kernel's. It needs a TPM, whose first
	// access is when the kernel is up and no module is in.
	Modules *isolate.Modules
	// OnModule is told what a fenced module did that was refused or noted; it must return at once.
	OnModule func(isolate.Event)
	// OnExits is called by a vCPU each time that it has left the guest ExitsEvery times, and must return at once; 0: never.
	ExitsEvery uint64
	OnExits    func()
	// OnTPMAccess is called once, at the guest's first access to the TPM's registers.
	OnTPMAccess func()
	// OnEvent is told the machine's timeline. It is called from the machine's goroutines and
	// must return at once.
	OnEvent func(Event)
}

// An Event is a point of the machine's timeline.
type Event int

// Events, each at most once.
const (
	EventStarted      Event = iota // the vCPUs were started
	EventFirstConsole              // the guest wrote its first console byte
	EventTPMAccess                 // the guest touched the TPM
	EventTPMCommand                // the guest gave its first TPM command
	EventEnded                     // the last vCPU stopped
	numEvents
)

func (e Event) String() string {
	switch e {
	case EventStarted:
		return "started"
	case EventFirstConsole:
		return "first console output"
	case EventTPMAccess:
		return "first TPM access"
	case EventTPMCommand:
		return "first TPM command"
	case EventEnded:
		return "ended"
	}
	return fmt.Sprintf("event %d", int(e))
}

// Kind is how a machine ended.
type Kind int

// Kinds of outcome.
const (
	PowerOff    Kind = iota + 1 // the guest turned itself off
	Reboot                      // the guest asked for a reset; a new machine is the caller's
	TripleFault                 // a vCPU shut down; also a guest's last means to reboot
	Stopped                     // Run's context ended
	Crash                       // the machine could not go on: Reason
)

func (k Kind) String() string {
	switch k {
	case PowerOff:
		return "power off"
	case Reboot:
		return "reboot"
	case TripleFault:
		return "triple fault"
	case Stopped:
		return "stopped"
	case Crash:
		return "crash"
	}
	return fmt.Sprintf("kind %d", int(k))
}

// An Outcome is how and why a machine ended.
type Outcome struct {
	Kind   Kind
	Reason string // one line: what the guest did, or what failed
}

func (o Outcome) String() string { return o.Kind.String() + ": " + o.Reason }
