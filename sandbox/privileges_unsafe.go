package sandbox

// Giving up: user, groups, capabilities. Raw system calls, because each is meant for this one
// thread; those of package syscall act on every thread of the Go runtime.

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// securebits, locked: user id 0 means nothing (not at execve, not at setuid), and no
// capability becomes ambient any more. capabilities(7).
const securebits = 1<<0 | 1<<1 | // SECBIT_NOROOT
	1<<2 | 1<<3 | // SECBIT_NO_SETUID_FIXUP
	1<<5 | // SECBIT_KEEP_CAPS_LOCKED
	1<<6 | 1<<7 // SECBIT_NO_CAP_AMBIENT_RAISE

func dropPrivileges(s *launchSpec, ownUser bool) error {
	if !ownUser {
		if err := setUser(s); err != nil {
			return err
		}
	}
	keep := map[Capability]bool{}
	for _, c := range s.Capabilities {
		keep[c] = true
	}
	// PR_CAPBSET_DROP fails with EINVAL past the last capability of the kernel.
	for c := Capability(0); c < 64; c++ {
		if keep[c] {
			continue
		}
		_, _, e := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0)
		if e == unix.EINVAL {
			break
		}
		if e != 0 {
			return fmt.Errorf("bounding set without capability %d: %w", c, e)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	for c := range keep {
		if c > 63 {
			return fmt.Errorf("there is no capability %d", c)
		}
		bit := uint32(1) << (c % 32)
		d := &sets[c/32]
		d.Effective |= bit
		d.Permitted |= bit
		d.Inheritable |= bit
	}
	setpcap := uint32(1) << unix.CAP_SETPCAP
	first := sets
	first[0].Effective |= setpcap // for the securebits
	first[0].Permitted |= setpcap
	if err := capset(&header, &first); err != nil {
		return err
	}
	for c := range keep {
		if _, _, e := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0, 0); e != 0 {
			return fmt.Errorf("capability %d over execve: %w", c, e)
		}
	}
	if _, _, e := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, securebits, 0); e != 0 {
		return fmt.Errorf("securebits: %w", e)
	}
	return capset(&header, &sets)
}

func capset(header *unix.CapUserHeader, sets *[2]unix.CapUserData) error {
	if _, _, e := unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(sets)), 0); e != 0 {
		return fmt.Errorf("capabilities: %w", e)
	}
	return nil
}

// setUser changes user and groups on the host, keeping capabilities for dropPrivileges to choose
// from. A change of user clears the parent-death signal (prctl(2)); it is set again.
func setUser(s *launchSpec) error {
	var death int32
	if _, _, e := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&death)), 0); e != 0 {
		return fmt.Errorf("parent-death signal: %w", e)
	}
	groups := append([]uint32{}, s.Groups...)
	groups = append(groups, 0)[:len(groups)] // never a nil pointer
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0); e != 0 {
		return fmt.Errorf("groups: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(s.GID), uintptr(s.GID), uintptr(s.GID)); e != 0 {
		return fmt.Errorf("group %d: %w", s.GID, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0); e != 0 {
		return fmt.Errorf("keeping capabilities: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(s.UID), uintptr(s.UID), uintptr(s.UID)); e != 0 {
		return fmt.Errorf("user %d: %w", s.UID, e)
	}
	// The change of user cleared the effective set and left the permitted one.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if _, _, e := unix.RawSyscall(unix.SYS_CAPGET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets)), 0); e != 0 {
		return fmt.Errorf("capabilities: %w", e)
	}
	for i := range sets {
		sets[i].Effective = sets[i].Permitted
	}
	if err := capset(&header, &sets); err != nil {
		return err
	}
	if death != 0 {
		if _, _, e := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(death), 0); e != 0 {
			return fmt.Errorf("parent-death signal: %w", e)
		}
	}
	return nil
}
