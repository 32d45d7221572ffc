// Package kvm is the only package that issues KVM ioctls: typed wrappers over the system, the
// machine and the virtual CPU descriptors of Linux' KVM interface on x86-64.
//
// The wrappers add no policy. They promise: every structure has the kernel's size (held by a
// test), every error names the ioctl, memory handed to the kernel stays reachable while the
// kernel may use it (the caller keeps slices alive for memslots). References are to
// Documentation/virt/kvm/api.rst of Linux, "api.rst" below.
//
// Preconditions: VM and vCPU descriptors work only in the process that made them. A VCPU's
// Run is called by one locked thread; [VCPU.Kick] may be called from anywhere meanwhile.
package kvm

import (
	"errors"
	"fmt"
	"os"
)

// ErrNotSupported says that this host's KVM lacks a feature; the error names it.
var ErrNotSupported = errors.New("not supported by this host's KVM")

// A Feature is one optional part of KVM, asked for by KVM_CHECK_EXTENSION (api.rst 4.4).
type Feature struct {
	Name  string
	id    uintptr
	Since string // the kernel that brought it
}

// Features that a monitor asks for.
var (
	UserMemory       = Feature{"user memory", 3, "2.6.28"}
	IRQRouting       = Feature{"interrupt routing", 25, "2.6.30"}
	IRQFD            = Feature{"irqfd", 32, "2.6.32"}
	IOEventFD        = Feature{"ioeventfd", 36, "2.6.32"}
	IOEventFDAnySize = Feature{"ioeventfd of any width", 122, "4.4"}
	AdjustClock      = Feature{"clock adjustment", 39, "2.6.33"}
	TSCDeadline      = Feature{"TSC deadline timer", 72, "3.1"}
	ClockControl     = Feature{"guest-stopped flag of kvmclock", 76, "3.5"}
	ReadOnlyMemory   = Feature{"read-only memslots", 81, "3.8"}
	ImmediateExit    = Feature{"immediate exit", 136, "4.11"}
	CoalescedMMIO    = Feature{"coalesced MMIO", 15, "2.6.28"}
	CoalescedPIO     = Feature{"coalesced port writes", 162, "4.20"}
	MaxVCPUs         = Feature{"number of vCPUs", 66, "3.1"}
	MSRFilter        = Feature{"MSR filter", 189, "5.10"}
	EmulationFailure = Feature{"exit on emulation failure", 204, "5.14"}
	SyncRegs         = Feature{"registers in the page shared with KVM_RUN", 74, "4.17"}
)

// API is the only version of the interface that exists (api.rst 4.1).
const API = 12

// A System is /dev/kvm.
type System struct {
	file *os.File
}

// Open opens /dev/kvm.
func Open() (*System, error) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("kvm: %w", err)
	}
	s, err := New(f)
	if err != nil {
		_ = f.Close()
	}
	return s, err
}

// New takes an open /dev/kvm, perhaps inherited, and checks the interface's version. The file
// stays the caller's.
func New(f *os.File) (*System, error) {
	s := &System{f}
	v, err := ioctl(f.Fd(), kvmGetAPIVersion, 0)
	if err != nil {
		return nil, fmt.Errorf("kvm: KVM_GET_API_VERSION on %s: %w", f.Name(), err)
	}
	if v != API {
		return nil, fmt.Errorf("kvm: interface version %d, want %d: %w", v, API, ErrNotSupported)
	}
	return s, nil
}

// Close closes /dev/kvm; machines made from it live on.
func (s *System) Close() error { return s.file.Close() }

// Check is what KVM says about a feature: 0 where absent, else 1 or a number that api.rst
// explains.
func (s *System) Check(f Feature) (int, error) {
	v, err := ioctl(s.file.Fd(), kvmCheckExtension, f.id)
	if err != nil {
		return 0, fmt.Errorf("kvm: KVM_CHECK_EXTENSION(%s): %w", f.Name, err)
	}
	return int(v), nil
}

// Require fails with ErrNotSupported unless all features are there.
func (s *System) Require(features ...Feature) error {
	for _, f := range features {
		v, err := s.Check(f)
		if err != nil {
			return err
		}
		if v == 0 {
			return fmt.Errorf("kvm: %s (Linux %s): %w", f.Name, f.Since, ErrNotSupported)
		}
	}
	return nil
}

// MemoryFlags of a memslot (api.rst 4.35).
type MemoryFlags uint32

// Flags of memslots.
const (
	LogDirtyPages MemoryFlags = 1 << 0
	ReadOnly      MemoryFlags = 1 << 1 // guest writes end Run with ExitMMIO
)

// Clock is the guest's kvmclock (api.rst 4.29).
type Clock struct {
	Nanoseconds uint64
	Flags       uint32
	_           uint32
	Realtime    uint64
	HostTSC     uint64
	_           [4]uint32
}

// CPUIDEntry is one leaf (api.rst 4.20).
type CPUIDEntry struct {
	Function, Index, Flags uint32
	EAX, EBX, ECX, EDX     uint32
	_                      [3]uint32
}

// SignificantIndex is the flag of a leaf that has subleaves.
const SignificantIndex = 1

// MSR is one model-specific register and its value.
type MSR struct {
	Index uint32
	_     uint32
	Value uint64
}

// Regs are the general registers (api.rst 4.11).
type Regs struct {
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11, R12, R13, R14, R15   uint64
	RIP, RFLAGS                            uint64
}

// Segment is a segment register with its hidden part.
type Segment struct {
	Base                            uint64
	Limit                           uint32
	Selector                        uint16
	Type, Present, DPL, DB, S, L, G uint8
	AVL, Unusable                   uint8
	_                               uint8
}

// Table is a descriptor table register.
type Table struct {
	Base  uint64
	Limit uint16
	_     [3]uint16
}

// Sregs are the special registers (api.rst 4.13).
type Sregs struct {
	CS, DS, ES, FS, GS, SS, TR, LDT Segment
	GDT, IDT                        Table
	CR0, CR2, CR3, CR4, CR8         uint64
	EFER, APICBase                  uint64
	InterruptBitmap                 [4]uint64
}

// Message is an MSI.
type Message struct {
	Address uint64
	Data    uint32
}

// Route sends an interrupt line (GSI) either to a pin of the I/O APIC or as a message.
type Route struct {
	GSI     uint32
	Message *Message // nil: I/O APIC pin
	Pin     uint32
}

// Interrupt controllers in routes (api.rst 4.52).
const (
	routeIRQChip = 1
	routeMSI     = 2
	chipIOAPIC   = 2
)

// Reason says why Run came back (api.rst 5).
type Reason uint32

// Reasons a monitor meets.
const (
	ExitUnknown       Reason = 0
	ExitIO            Reason = 2
	ExitHalt          Reason = 5
	ExitMMIO          Reason = 6
	ExitShutdown      Reason = 8 // triple fault
	ExitFailEntry     Reason = 9
	ExitInterrupted   Reason = 10
	ExitInternalError Reason = 17
	ExitSystemEvent   Reason = 24
	// NumReasons bounds the reasons that statistics count one by one.
	NumReasons = 40
)

func (r Reason) String() string {
	switch r {
	case ExitIO:
		return "io"
	case ExitHalt:
		return "halt"
	case ExitMMIO:
		return "mmio"
	case ExitShutdown:
		return "shutdown"
	case ExitFailEntry:
		return "fail-entry"
	case ExitInterrupted:
		return "interrupted"
	case ExitInternalError:
		return "internal-error"
	case ExitSystemEvent:
		return "system-event"
	}
	return fmt.Sprintf("exit-%d", uint32(r))
}

// IO is a port access (ExitIO). Data is Size×Count bytes in the shared page: a write's bytes,
// or where a read's bytes go before the next Run.
type IO struct {
	Out   bool
	Port  uint16
	Size  int // 1, 2 or 4
	Count int
	Data  []byte
}

// MMIO is an access to an address without memory (ExitMMIO); Data as in IO, 1 to 8 bytes.
type MMIO struct {
	Write   bool
	Address uint64
	Data    []byte
}

// Coalesced is a write that the kernel queued instead of ending Run.
type Coalesced struct {
	Address uint64
	Port    bool
	Data    [8]byte
	Len     uint32
}
