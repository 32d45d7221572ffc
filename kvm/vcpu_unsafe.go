package kvm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrInterrupted says that Run came back without a guest's exit: kicked, or a signal of the Go
// runtime's own. The caller looks at what it wants and runs again.
var ErrInterrupted = errors.New("interrupted")

// KickSignal is the signal that Kick sends: the Go runtime's own preemption signal, whose
// handler exists in every Go program and does nothing when it comes unasked. So no handler is
// installed, and there is one way out of KVM_RUN instead of two.
const KickSignal = unix.SIGURG

// A VCPU is one virtual CPU.
type VCPU struct {
	ID   int
	file *os.File
	page []byte // struct kvm_run, the PIO page, the coalesced ring
	run  *runHeader
	tid  atomic.Int32 // of the thread in Run; 0: none
	ran  bool         // so that the shared page has the registers that it was told to have
}

// CreateVCPU makes vCPU id (api.rst 4.7).
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, err := ioctl(vm.file.Fd(), kvmCreateVCPU, uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("kvm: KVM_CREATE_VCPU %d: %w", id, err)
	}
	unix.CloseOnExec(int(fd))
	c := &VCPU{ID: id, file: os.NewFile(fd, fmt.Sprintf("kvm-vcpu-%d", id))}
	c.page, err = unix.Mmap(int(fd), 0, vm.runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		_ = c.file.Close()
		return nil, fmt.Errorf("kvm: map vCPU %d: %w", id, err)
	}
	c.run = (*runHeader)(unsafe.Pointer(&c.page[0]))
	return c, nil
}

// Close gives the vCPU up; no Run may be in progress.
func (c *VCPU) Close() error {
	c.run = nil
	return errors.Join(unix.Munmap(c.page), c.file.Close())
}

// Lock binds the calling goroutine to its thread, the one that Kick signals. Unlock undoes it.
func (c *VCPU) Lock() {
	runtime.LockOSThread()
	c.tid.Store(int32(unix.Gettid()))
}

// Follow makes Kick signal the thread that another vCPU is bound to: the same goroutine runs both.
func (c *VCPU) Follow(o *VCPU) { c.tid.Store(o.tid.Load()) }

// Unlock ends what Lock began.
func (c *VCPU) Unlock() {
	c.tid.Store(0)
	runtime.UnlockOSThread()
}

// Run enters the guest until it needs something (api.rst 4.10) and says why it came back, or
// fails with ErrInterrupted. After a Kick every Run fails so until ClearKick.
//
// The system call is announced to the Go scheduler: a thread in a guest must not hold up the
// collector.
//
// Preconditions: the goroutine called Lock, or Follow with one for which it did.
func (c *VCPU) Run() (Reason, error) {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, c.file.Fd(), kvmRun, 0)
	c.ran = true
	switch e {
	case 0:
		return Reason(c.run.exitReason), nil
	case unix.EINTR, unix.EAGAIN:
		return ExitInterrupted, ErrInterrupted
	}
	return ExitUnknown, fmt.Errorf("kvm: KVM_RUN of vCPU %d: %w", c.ID, e)
}

// Kick makes the Run in progress, or the next one, come back with ErrInterrupted. The flag
// covers a thread on its way into the guest, the signal one that is already there.
func (c *VCPU) Kick() {
	atomic.StoreUint32(&c.run.flags, immediateExit)
	if tid := c.tid.Load(); tid != 0 {
		_ = unix.Tgkill(unix.Getpid(), int(tid), KickSignal) // gone: it is not in Run then
	}
}

// ClearKick lets Run enter the guest again. Look at what the kick was for after this.
func (c *VCPU) ClearKick() { atomic.StoreUint32(&c.run.flags, 0) }

// IO is the port access of an ExitIO.
func (c *VCPU) IO() (IO, error) {
	b := &c.run.exit
	x := IO{
		Out: b[0] == 1, Size: int(b[1]),
		Port:  *(*uint16)(unsafe.Pointer(&b[2])),
		Count: int(*(*uint32)(unsafe.Pointer(&b[4]))),
	}
	off := *(*uint64)(unsafe.Pointer(&b[8]))
	n := uint64(x.Size) * uint64(x.Count)
	if off > uint64(len(c.page)) || n > uint64(len(c.page))-off {
		return IO{}, fmt.Errorf("kvm: port access of %d bytes at %d leaves the shared page", n, off)
	}
	x.Data = c.page[off : off+n]
	return x, nil
}

// MMIO is the access of an ExitMMIO.
func (c *VCPU) MMIO() MMIO {
	b := &c.run.exit
	n := min(*(*uint32)(unsafe.Pointer(&b[16])), 8)
	return MMIO{Address: *(*uint64)(unsafe.Pointer(&b[0])), Data: b[8 : 8+n], Write: b[20] != 0}
}

// Failure describes an ExitInternalError or ExitFailEntry.
func (c *VCPU) Failure() string {
	b := &c.run.exit
	if Reason(c.run.exitReason) == ExitFailEntry {
		return fmt.Sprintf("the processor refused the guest's state, code %#x", *(*uint64)(unsafe.Pointer(&b[0])))
	}
	return fmt.Sprintf("KVM internal error, suberror %d", *(*uint32)(unsafe.Pointer(&b[0])))
}

// Drain takes the machine's queued writes, oldest first. The ring is the machine's, seen
// through any vCPU: callers serialise.
func (c *VCPU) Drain(take func(Coalesced)) {
	const at = coalescedPageOffset * 4096
	if len(c.page) < at+4096 {
		return
	}
	first := (*uint32)(unsafe.Pointer(&c.page[at]))
	last := (*uint32)(unsafe.Pointer(&c.page[at+4]))
	for {
		i := *first % coalescedMax
		if i == atomic.LoadUint32(last)%coalescedMax {
			return
		}
		e := (*coalescedEntry)(unsafe.Pointer(&c.page[at+8+int(i)*coalescedEntrySize]))
		w := Coalesced{Address: e.address, Port: e.pio != 0, Data: e.data, Len: min(e.len, 8)}
		atomic.StoreUint32(first, (i+1)%coalescedMax)
		take(w)
	}
}

// SetCPUID sets what the guest's CPUID instruction says (api.rst 4.20); before the first Run.
func (c *VCPU) SetCPUID(entries []CPUIDEntry) error {
	var list struct {
		n, _    uint32
		entries [maxCPUID]CPUIDEntry
	}
	if len(entries) > maxCPUID {
		return fmt.Errorf("kvm: %d CPUID leaves, at most %d", len(entries), maxCPUID)
	}
	list.n = uint32(copy(list.entries[:], entries))
	return c.call("KVM_SET_CPUID2", kvmSetCPUID2, unsafe.Pointer(&list))
}

// ShareRegs has each Run leave the general registers, and the special ones where both, in the page that is shared with the kernel, and
// take the general ones from there if they were set: then reading and setting them are no system calls (KVM_CAP_SYNC_REGS). It needs
// [SyncRegs]; before the first Run.
func (c *VCPU) ShareRegs(both bool) {
	c.run.valid = syncRegs
	if both {
		c.run.valid |= syncSregs
	}
}

func (c *VCPU) shares(what uint64) bool { return c.ran && c.run.valid&what != 0 }

// Regs reads the general registers.
func (c *VCPU) Regs() (Regs, error) {
	if c.shares(syncRegs) {
		return c.run.regs, nil
	}
	var r Regs // on the heap, as the ones below: not where the page has them
	err := c.call("KVM_GET_REGS", kvmGetRegs, unsafe.Pointer(&r))
	return r, err
}

// SetRegs writes the general registers.
func (c *VCPU) SetRegs(r Regs) error {
	if c.shares(syncRegs) {
		c.run.regs = r
		c.run.dirty |= syncRegs
		return nil
	}
	set := r
	return c.call("KVM_SET_REGS", kvmSetRegs, unsafe.Pointer(&set))
}

// Sregs reads the special registers.
func (c *VCPU) Sregs() (Sregs, error) {
	s, err := c.SpecialRegs()
	if err != nil {
		return Sregs{}, err
	}
	return *s, nil
}

// SpecialRegs is Sregs without a copy where the page has them: to be read, until the next Run.
func (c *VCPU) SpecialRegs() (*Sregs, error) {
	if c.shares(syncSregs) {
		return &c.run.sregs, nil
	}
	s := &Sregs{}
	return s, c.call("KVM_GET_SREGS", kvmGetSregs, unsafe.Pointer(s))
}

// SetSregs writes the special registers.
func (c *VCPU) SetSregs(s Sregs) error {
	c.run.sregs = s
	return c.call("KVM_SET_SREGS", kvmSetSregs, unsafe.Pointer(&s))
}

// CopyXCRs gives the vCPU the extended control registers of another one, which say what XSAVE covers.
func (c *VCPU) CopyXCRs(from *VCPU) error {
	var x xcrs
	if err := from.call("KVM_GET_XCRS", kvmGetXCRS, unsafe.Pointer(&x)); err != nil {
		return err
	}
	return c.call("KVM_SET_XCRS", kvmSetXCRS, unsafe.Pointer(&x))
}

// msrList is struct kvm_msrs.
type msrList struct {
	n, _    uint32
	entries [maxMSRs]MSR
}

// MSRs fills in the values of the registers named.
func (c *VCPU) MSRs(msrs []MSR) error { return c.msrs("KVM_GET_MSRS", kvmGetMSRs, msrs) }

// SetMSRs writes registers.
func (c *VCPU) SetMSRs(msrs []MSR) error { return c.msrs("KVM_SET_MSRS", kvmSetMSRs, msrs) }

func (c *VCPU) msrs(name string, request uintptr, msrs []MSR) error {
	var list msrList
	if len(msrs) > maxMSRs {
		return fmt.Errorf("kvm: %s of %d registers, at most %d", name, len(msrs), maxMSRs)
	}
	list.n = uint32(copy(list.entries[:], msrs))
	done, err := ioctl(c.file.Fd(), request, uintptr(unsafe.Pointer(&list)))
	if err != nil {
		return fmt.Errorf("kvm: %s of vCPU %d: %w", name, c.ID, err)
	}
	if int(done) != len(msrs) {
		return fmt.Errorf("kvm: %s of vCPU %d: MSR %#x refused", name, c.ID, msrs[done].Index)
	}
	copy(msrs, list.entries[:])
	return nil
}

// TSCOffset is guest TSC − host TSC; ErrNotSupported before Linux 5.16.
func (c *VCPU) TSCOffset() (uint64, error) {
	var v uint64
	err := c.tscAttr(kvmGetDeviceAttr, &v)
	return v, err
}

// SetTSCOffset changes it.
func (c *VCPU) SetTSCOffset(v uint64) error { return c.tscAttr(kvmSetDeviceAttr, &v) }

func (c *VCPU) tscAttr(request uintptr, v *uint64) error {
	var pin runtime.Pinner // the kernel follows a pointer inside the structure
	pin.Pin(v)
	defer pin.Unpin()
	a := deviceAttr{group: attrGroupTSC, attr: attrTSCOffset, addr: uint64(uintptr(unsafe.Pointer(v)))}
	err := call(c.file.Fd(), request, &a)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("kvm: TSC offset attribute (Linux 5.16): %w", ErrNotSupported)
	}
	if err != nil {
		return fmt.Errorf("kvm: TSC offset of vCPU %d: %w", c.ID, err)
	}
	return nil
}

// MarkStopped tells the guest's clock that the host stopped it (api.rst 4.70), so that its
// watchdogs forgive the gap. A guest without kvmclock is left alone.
func (c *VCPU) MarkStopped() error {
	_, err := ioctl(c.file.Fd(), kvmClockCtrl, 0)
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("kvm: KVM_KVMCLOCK_CTRL of vCPU %d: %w", c.ID, err)
	}
	return nil
}

func (c *VCPU) call(name string, request uintptr, arg unsafe.Pointer) error {
	_, err := ioctl(c.file.Fd(), request, uintptr(arg))
	if err != nil {
		return fmt.Errorf("kvm: %s of vCPU %d: %w", name, c.ID, err)
	}
	return nil
}
