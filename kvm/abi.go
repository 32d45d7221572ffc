package kvm

// Numbers of the ioctls, as _IO, _IOR, _IOW and _IOWR of <linux/kvm.h> compose them.
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmCheckExtension      = 0xae03
	kvmGetVCPUMmapSize     = 0xae04
	kvmGetSupportedCPUID   = 0xc008ae05
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetTSSAddr          = 0xae47
	kvmSetIdentityMapAddr  = 0x4008ae48
	kvmCreateIRQChip       = 0xae60
	kvmIRQLine             = 0x4008ae61
	kvmRegisterCoalesced   = 0x4010ae67
	kvmSetGSIRouting       = 0x4008ae6a
	kvmIRQFD               = 0x4020ae76
	kvmIOEventFD           = 0x4040ae79
	kvmSetClock            = 0x4030ae7b
	kvmGetClock            = 0x8030ae7c
	kvmRun                 = 0xae80
	kvmGetRegs             = 0x8090ae81
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84
	kvmGetMSRs             = 0xc008ae88
	kvmSetMSRs             = 0x4008ae89
	kvmEnableCap           = 0x4068aea3
	kvmGetXCRS             = 0x8188aea6
	kvmSetXCRS             = 0x4188aea7
	kvmSetMSRFilter        = 0x4188aec6
	kvmSetCPUID2           = 0x4008ae90
	kvmClockCtrl           = 0xaead
	kvmSetDeviceAttr       = 0x4018aee1
	kvmGetDeviceAttr       = 0x4018aee2
)

// The kernel's structures that are not part of this package's interface.
type (
	memoryRegion struct {
		slot, flags          uint32
		address, size, where uint64
	}
	irqLevel struct{ irq, level uint32 }
	irqFD    struct {
		fd, gsi, flags uint32
		_              [20]byte // resample descriptor, padding
	}
	ioEventFD struct {
		_       uint64 // match
		address uint64
		len     uint32
		fd      int32
		flags   uint32
		_       [36]byte
	}
	coalescedZone struct {
		address   uint64
		size, pio uint32
	}
	routeEntry struct {
		gsi, kind, flags, _ uint32
		u                   [8]uint32 // MSI: address low, high, data; chip: chip, pin
	}
	enableCap struct {
		id, _ uint32 // flags: none
		args  [4]uint64
		_     [64]byte
	}
	xcrs struct {
		n, flags uint32
		list     [16]struct {
			index, _ uint32
			value    uint64
		}
		_ [16]uint64
	}
	// msrFilter is what KVM_X86_SET_MSR_FILTER takes.
	msrFilter struct {
		flags, _ uint32
		ranges   [16]struct {
			flags, n, base, _ uint32
			bitmap            uintptr
		}
	}
	deviceAttr struct {
		_, group   uint32 // flags
		attr, addr uint64
	}
	// runHeader is the start of the page shared with KVM_RUN (struct kvm_run).
	runHeader struct {
		flags      uint32 // request_interrupt_window, immediate_exit, padding
		_          uint32
		exitReason uint32
		_          uint32
		cr8        uint64
		apicBase   uint64
		exit       [256]byte
		valid      uint64 // what Run leaves below
		dirty      uint64 // what it is to take from there
		regs       Regs
		sregs      Sregs
	}
	coalescedEntry struct {
		address  uint64
		len, pio uint32
		data     [8]byte
	}
)

const (
	immediateExit = 1 << 8 // in runHeader.flags: byte 1

	syncRegs, syncSregs = 1 << 0, 1 << 1 // in runHeader.valid and dirty

	irqFDDeassign = 1 << 0

	ioEventFDMatch    = 1 << 0
	ioEventFDDeassign = 1 << 2

	coalescedPageOffset = 2 // pages from the start of the shared mapping
	coalescedEntrySize  = 24
	coalescedMax        = (4096 - 8) / coalescedEntrySize

	msrFilterDefaultDeny = 1
	msrFilterReadWrite   = 1 | 2 // of a range

	// vCPU attribute group and attribute (Documentation/virt/kvm/devices/vcpu.rst §4).
	attrGroupTSC  = 0
	attrTSCOffset = 0

	maxCPUID = 256
	maxMSRs  = 16
	maxRoute = 4096
)
