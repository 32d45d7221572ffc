package kvm

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl runs one request to its end. The directive moves what arg points to off the stack,
// which could move under the kernel.
//
//go:uintptrescapes
func ioctl(fd uintptr, request, arg uintptr) (uintptr, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, fd, request, arg)
		switch e {
		case 0:
			return r, nil
		case unix.EINTR: // the Go runtime's preemption signal; KVM_RUN does not come here
		default:
			return 0, e
		}
	}
}

// call is an ioctl with a structure; the pointer is converted here, where the compiler keeps
// it alive.
func call[T any](fd uintptr, request uintptr, arg *T) error {
	_, err := ioctl(fd, request, uintptr(unsafe.Pointer(arg)))
	runtime.KeepAlive(arg)
	return err
}

// SupportedCPUID is what this host can give a guest (api.rst 4.46).
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	var list struct {
		n, _    uint32
		entries [maxCPUID]CPUIDEntry
	}
	list.n = maxCPUID
	if err := call(s.file.Fd(), kvmGetSupportedCPUID, &list); err != nil {
		return nil, fmt.Errorf("kvm: KVM_GET_SUPPORTED_CPUID: %w", err)
	}
	return append([]CPUIDEntry(nil), list.entries[:min(list.n, maxCPUID)]...), nil
}

// A VM is one virtual machine.
type VM struct {
	file    *os.File
	runSize int
}

// CreateVM makes a machine (api.rst 4.2).
func (s *System) CreateVM() (*VM, error) {
	fd, err := ioctl(s.file.Fd(), kvmCreateVM, 0)
	if err != nil {
		return nil, fmt.Errorf("kvm: KVM_CREATE_VM: %w", err)
	}
	vm := &VM{file: os.NewFile(fd, "kvm-vm")}
	unix.CloseOnExec(int(fd))
	size, err := ioctl(s.file.Fd(), kvmGetVCPUMmapSize, 0)
	if err != nil {
		_ = vm.file.Close()
		return nil, fmt.Errorf("kvm: KVM_GET_VCPU_MMAP_SIZE: %w", err)
	}
	vm.runSize = int(size)
	return vm, nil
}

// Close gives the machine up; its vCPUs must be closed before.
func (vm *VM) Close() error { return vm.file.Close() }

// SetMemory maps memory at guest-physical address gpa, both of whole pages (api.rst 4.35). The
// caller keeps the mapping until the machine is closed or the slot is mapped again; an empty
// memory removes the slot.
func (vm *VM) SetMemory(slot uint32, flags MemoryFlags, gpa uint64, memory []byte) error {
	r := memoryRegion{slot: slot, flags: uint32(flags), address: gpa, size: uint64(len(memory))}
	if len(memory) > 0 {
		r.where = uint64(uintptr(unsafe.Pointer(&memory[0])))
	}
	if err := call(vm.file.Fd(), kvmSetUserMemoryRegion, &r); err != nil {
		return fmt.Errorf("kvm: KVM_SET_USER_MEMORY_REGION slot %d at %#x: %w", slot, gpa, err)
	}
	return nil
}

// ExitOnEmulationFailure makes Run come back with ExitInternalError, and nothing queued for the guest, where KVM
// cannot carry out an instruction: among them each whose own address has no memory (api.rst 7.19,
// KVM_CAP_EXIT_ON_EMULATION_FAILURE).
func (vm *VM) ExitOnEmulationFailure() error {
	c := enableCap{id: uint32(EmulationFailure.id), args: [4]uint64{1}}
	if err := call(vm.file.Fd(), kvmEnableCap, &c); err != nil {
		return fmt.Errorf("kvm: KVM_ENABLE_CAP(%s): %w", EmulationFailure.Name, err)
	}
	return nil
}

// DenyMSRs makes every access to a model-specific register by the machine's code a #GP (api.rst 4.97), but for
// those of the x2APIC, which no filter covers.
func (vm *VM) DenyMSRs() error {
	// A filter that denies by default must have a range: this one denies, too.
	bitmap := new(uint64)
	var pin runtime.Pinner
	pin.Pin(bitmap)
	defer pin.Unpin()
	f := msrFilter{flags: msrFilterDefaultDeny}
	f.ranges[0].flags, f.ranges[0].n = msrFilterReadWrite, 1
	f.ranges[0].bitmap = uintptr(unsafe.Pointer(bitmap))
	if err := call(vm.file.Fd(), kvmSetMSRFilter, &f); err != nil {
		return fmt.Errorf("kvm: KVM_X86_SET_MSR_FILTER: %w", err)
	}
	return nil
}

// SetPrivatePages tells where KVM may put its own four pages (api.rst 4.8, 4.9): a hole of the
// guest's address space. Intel needs it; before the first vCPU.
func (vm *VM) SetPrivatePages(identityMap, tss uint64) error {
	if err := call(vm.file.Fd(), kvmSetIdentityMapAddr, &identityMap); err != nil {
		return fmt.Errorf("kvm: KVM_SET_IDENTITY_MAP_ADDR: %w", err)
	}
	if _, err := ioctl(vm.file.Fd(), kvmSetTSSAddr, uintptr(tss)); err != nil {
		return fmt.Errorf("kvm: KVM_SET_TSS_ADDR: %w", err)
	}
	return nil
}

// CreateIRQChip makes the in-kernel interrupt controllers (api.rst 4.24); before the first vCPU.
func (vm *VM) CreateIRQChip() error {
	if _, err := ioctl(vm.file.Fd(), kvmCreateIRQChip, 0); err != nil {
		return fmt.Errorf("kvm: KVM_CREATE_IRQCHIP: %w", err)
	}
	return nil
}

// SetRoutes replaces the interrupt routing table (api.rst 4.52).
func (vm *VM) SetRoutes(routes []Route) error {
	if len(routes) > maxRoute {
		return fmt.Errorf("kvm: %d interrupt routes, at most %d", len(routes), maxRoute)
	}
	// struct kvm_irq_routing: count, flags, entries.
	const head = 8
	size := int(unsafe.Sizeof(routeEntry{}))
	buf := make([]uint64, (head+len(routes)*size)/8)
	*(*uint32)(unsafe.Pointer(&buf[0])) = uint32(len(routes))
	for i, r := range routes {
		e := (*routeEntry)(unsafe.Pointer(&buf[(head+i*size)/8]))
		e.gsi = r.GSI
		if r.Message != nil {
			e.kind = routeMSI
			e.u[0], e.u[1], e.u[2] = uint32(r.Message.Address), uint32(r.Message.Address>>32), r.Message.Data
		} else {
			e.kind, e.u[0], e.u[1] = routeIRQChip, chipIOAPIC, r.Pin
		}
	}
	if err := call(vm.file.Fd(), kvmSetGSIRouting, &buf[0]); err != nil {
		return fmt.Errorf("kvm: KVM_SET_GSI_ROUTING of %d: %w", len(routes), err)
	}
	runtime.KeepAlive(buf)
	return nil
}

// SetLine drives an interrupt line (api.rst 4.25).
func (vm *VM) SetLine(gsi uint32, high bool) error {
	l := irqLevel{irq: gsi}
	if high {
		l.level = 1
	}
	if err := call(vm.file.Fd(), kvmIRQLine, &l); err != nil {
		return fmt.Errorf("kvm: KVM_IRQ_LINE %d: %w", gsi, err)
	}
	return nil
}

// AssignIRQFD makes an eventfd raise a line (api.rst 4.75); an event already there counts.
func (vm *VM) AssignIRQFD(event *os.File, gsi uint32) error {
	return vm.irqfd(event, gsi, 0)
}

// DeassignIRQFD takes it back: the eventfd keeps later events.
func (vm *VM) DeassignIRQFD(event *os.File, gsi uint32) error {
	return vm.irqfd(event, gsi, irqFDDeassign)
}

func (vm *VM) irqfd(event *os.File, gsi, flags uint32) error {
	a := irqFD{fd: uint32(event.Fd()), gsi: gsi, flags: flags}
	if err := call(vm.file.Fd(), kvmIRQFD, &a); err != nil {
		return fmt.Errorf("kvm: KVM_IRQFD line %d: %w", gsi, err)
	}
	return nil
}

// AssignIOEventFD makes a guest's write of size bytes (0: any) at gpa signal an eventfd
// instead of ending Run (api.rst 4.59).
func (vm *VM) AssignIOEventFD(event *os.File, gpa uint64, size uint32) error {
	return vm.ioeventfd(event, gpa, size, 0)
}

// DeassignIOEventFD takes it back.
func (vm *VM) DeassignIOEventFD(event *os.File, gpa uint64, size uint32) error {
	return vm.ioeventfd(event, gpa, size, ioEventFDDeassign)
}

func (vm *VM) ioeventfd(event *os.File, gpa uint64, size, flags uint32) error {
	a := ioEventFD{address: gpa, len: size, fd: int32(event.Fd()), flags: flags}
	if err := call(vm.file.Fd(), kvmIOEventFD, &a); err != nil {
		return fmt.Errorf("kvm: KVM_IOEVENTFD at %#x: %w", gpa, err)
	}
	return nil
}

// CoalescePort makes one-byte writes to a port queue in the kernel instead of ending Run
// (api.rst 4.116); [VCPU.Drain] takes them.
func (vm *VM) CoalescePort(port uint16) error {
	z := coalescedZone{address: uint64(port), size: 1, pio: 1}
	if err := call(vm.file.Fd(), kvmRegisterCoalesced, &z); err != nil {
		return fmt.Errorf("kvm: KVM_REGISTER_COALESCED_MMIO port %#x: %w", port, err)
	}
	return nil
}

// Clock reads kvmclock.
func (vm *VM) Clock() (Clock, error) {
	var c Clock
	if err := call(vm.file.Fd(), kvmGetClock, &c); err != nil {
		return Clock{}, fmt.Errorf("kvm: KVM_GET_CLOCK: %w", err)
	}
	return c, nil
}

// SetClock sets kvmclock to c.Nanoseconds, as if no time had passed since c was read.
func (vm *VM) SetClock(c Clock) error {
	set := Clock{Nanoseconds: c.Nanoseconds}
	if err := call(vm.file.Fd(), kvmSetClock, &set); err != nil {
		return fmt.Errorf("kvm: KVM_SET_CLOCK: %w", err)
	}
	return nil
}
