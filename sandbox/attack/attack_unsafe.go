package attack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func readMemory(v *Victim) error {
	b := make([]byte, len(v.Secret))
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	remote := []unix.RemoteIovec{{Base: uintptr(v.Address), Len: len(b)}}
	if _, err := unix.ProcessVMReadv(v.PID, local, remote, 0); err != nil {
		return err
	}
	return compare(string(b), v.Secret)
}

func trace(v *Victim) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(v.PID); err != nil {
		return err
	}
	// The end of this thread detaches; it must not end before it has.
	_ = unix.PtraceInterrupt(v.PID)
	var ws unix.WaitStatus
	if _, err := unix.Wait4(v.PID, &ws, unix.WALL, nil); err != nil {
		return err
	}
	return unix.PtraceDetach(v.PID)
}

func stealDescriptor(v *Victim) error {
	p, err := unix.PidfdOpen(v.PID, 0)
	if err != nil {
		return err
	}
	defer unix.Close(p)
	fd, err := unix.PidfdGetfd(p, v.MemFD, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := make([]byte, len(v.Secret))
	if _, err := unix.Pread(fd, b, 0); err != nil {
		return err
	}
	return compare(string(b), v.Secret)
}

// execMemory executes a program that never was in a file system: this process becomes it, and it
// says "allowed" itself.
func execMemory(*Victim) error {
	fd, err := unix.MemfdCreate("attack", 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, tinyProgram()); err != nil {
		return err
	}
	argv := [2]*byte{new(byte), nil}
	_, _, e := unix.Syscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(new(byte))),
		uintptr(unsafe.Pointer(&argv)), uintptr(unsafe.Pointer(&argv[1])), unix.AT_EMPTY_PATH, 0)
	return e
}

// tinyProgram is an ELF file that writes "allowed\n" to descriptor 1 and exits.
func tinyProgram() []byte {
	const base, entry = 0x400000, 64 + 56
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, SYS_write
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 16, 0, 0, 0, // lea rsi, [rip+16]
		0xba, 8, 0, 0, 0, // mov edx, 8
		0x0f, 0x05, // syscall
		0xb8, 60, 0, 0, 0, // mov eax, SYS_exit
		0x31, 0xff, // xor edi, edi
		0x0f, 0x05, // syscall
	}
	code = append(code, "allowed\n"...)
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 15: 0}
	le := binary.LittleEndian
	b = le.AppendUint16(b, 2) // ET_EXEC
	b = le.AppendUint16(b, 62)
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{base + entry, 64, 0} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 5) // read, execute
	size := uint64(entry + len(code))
	for _, v := range []uint64{0, base, base, size, size, 4096} {
		b = le.AppendUint64(b, v)
	}
	return append(b, code...)
}

func initModule() error {
	garbage := []byte("not a module, only long enough to be looked at: an ELF header has 64 bytes .......")
	return unix.InitModule(garbage, "")
}

// kexec asks to load no kernel at all, which a permitted caller may: it unloads one.
func kexec(*Victim) error {
	// An impossible number of segments: EINVAL for those who may, EPERM for all others.
	_, _, e := unix.Syscall6(unix.SYS_KEXEC_LOAD, 0, 1000, 0, 0xffff<<16, 0, 0)
	return wants(e, unix.EINVAL)
}

func ioURing(*Victim) error {
	var params [120]byte
	fd, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if e == unix.ENOSYS {
		return fmt.Errorf("%w: %w", ErrUnavailable, e)
	}
	if e != 0 {
		return e
	}
	return unix.Close(int(fd))
}

func bpfMap(*Victim) error {
	attr := [5]uint32{1, 4, 4, 1, 0} // BPF_MAP_TYPE_HASH, key, value, entries
	fd, _, e := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if e == unix.ENOSYS {
		return fmt.Errorf("%w: %w", ErrUnavailable, e)
	}
	if e != 0 {
		return e
	}
	return unix.Close(int(fd))
}

func perfEvents(*Victim) error {
	attr := &unix.PerfEventAttr{
		Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_CPU_CLOCK,
		Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})),
	}
	fd, err := unix.PerfEventOpen(attr, -1, 0, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// userfault asks for one that also holds faults of the kernel, the kind that exploits want.
func userfault(*Victim) error {
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if e == unix.ENOSYS {
		return fmt.Errorf("%w: %w", ErrUnavailable, e)
	}
	if e != 0 {
		return e
	}
	return unix.Close(int(fd))
}

func ioPorts(*Victim) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Ioperm(0x80, 1, 1); err != nil {
		if errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return err
	}
	return unix.Ioperm(0x80, 1, 0)
}

// lockMemory locks more than any default limit.
func lockMemory() error {
	b, err := unix.Mmap(-1, 0, 64<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	err = unix.Mlock(b)
	return errors.Join(err, unix.Munmap(b))
}

func executableMemory(*Victim) error {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	err = unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
	return errors.Join(err, unix.Munmap(b))
}

func x32Call(*Victim) error {
	_, _, e := unix.RawSyscall(0x40000000+unix.SYS_GETPID, 0, 0, 0)
	if e == unix.ENOSYS {
		return fmt.Errorf("%w: %w", ErrUnavailable, e)
	}
	if e != 0 {
		return e
	}
	return nil
}

// fileByHandle opens by handle, which needs no path: the classic way out of a root.
func fileByHandle(v *Victim) error {
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, v.File, 0)
	if err != nil {
		// Without the path a handle can still be guessed; the right to use one is what counts.
		h = unix.NewFileHandle(1, bytes.Repeat([]byte{1}, 8))
	}
	dir, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	at := dir
	if d, err := unix.Open(v.File, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		defer unix.Close(d)
		at = d
	}
	fd, err := unix.OpenByHandleAt(at, h, unix.O_RDONLY)
	if errors.Is(err, unix.ESTALE) {
		return nil // the right was there, only the file was not found (overlayfs)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// takeCapability makes itself the host's root in every way a process can ask.
func takeCapability() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); e != 0 {
		return e
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return err
	}
	bit := uint32(1) << unix.CAP_NET_ADMIN
	sets[0].Effective |= bit
	sets[0].Permitted |= bit
	return unix.Capset(&header, &sets[0])
}

// SecretIn prepares a victim's memory: the secret and its address.
func SecretIn(secret string) (keep []byte, address uint64) {
	keep = []byte(secret)
	return keep, uint64(uintptr(unsafe.Pointer(&keep[0])))
}
