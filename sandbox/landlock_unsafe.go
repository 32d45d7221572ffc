package sandbox

// Landlock as the second line behind the root, the mounts and the namespaces: should one of them
// be got around, the domain still refuses. Three system calls on one thread; a library would
// spread them over the threads of a Go program, which is not wanted here.
// https://docs.kernel.org/userspace-api/landlock.html

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// landlockABI is the kernel's version; 0 where it has none or it is off.
func landlockABI() (int, error) {
	v, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if e != 0 {
		return 0, fmt.Errorf("landlock is not in this kernel, or not in its lsm= list: %w", e)
	}
	return int(v), nil
}

// Rights on files and directories by what a Bind gives.
const (
	landlockRead = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	landlockDir  = unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
		unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SYM |
		unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_REFER
	landlockWrite = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	// landlockFiles are the rights that a rule on something other than a directory may have.
	landlockFiles = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_EXECUTE | landlockWrite |
		unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
)

// landlockHandled are the rights that a kernel's version knows; all are denied but by rule.
func landlockHandled(abi int) (a unix.LandlockRulesetAttr, size uintptr) {
	// The kernel takes the structure at any of its lengths so far; the shortest that holds
	// what is used works on all.
	a.Handled_access_fs, size = 1<<13-1, 8
	if abi >= 2 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 4 {
		a.Handled_access_net, size = unix.LANDLOCK_ACCESS_NET_BIND_TCP|unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, 16
	}
	if abi >= 5 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if abi >= 6 {
		a.Scoped, size = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET|unix.LANDLOCK_SCOPE_SIGNAL, 24
	}
	return a, size
}

// landlockDomain makes the rules: program can be executed, and the root's entries, which are in
// place, have what their Bind gives.
func landlockDomain(s *launchSpec, program int) (int, error) {
	abi, err := landlockABI()
	if err != nil {
		return -1, err
	}
	attr, size := landlockHandled(abi)
	fd, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if e != 0 {
		return -1, fmt.Errorf("rules: %w", e)
	}
	unix.CloseOnExec(int(fd))
	entries := s.Root
	if s.Proc {
		entries = append(entries[:len(entries):len(entries)], Bind{Target: "/proc", NoExec: true, Writable: true})
	}
	for _, b := range entries {
		if b.Link != "" {
			continue
		}
		entry, err := unix.Open(b.target(), unix.O_PATH|unix.O_CLOEXEC, 0)
		if err == nil {
			err = landlockAllow(int(fd), b, entry, attr.Handled_access_fs)
			unix.Close(entry)
		}
		if err != nil {
			return -1, fmt.Errorf("%s: %w", b.target(), err)
		}
	}
	if err := landlockAllow(int(fd), Bind{}, program, attr.Handled_access_fs); err != nil {
		return -1, fmt.Errorf("program: %w", err)
	}
	return int(fd), nil
}

// landlockAllow adds the rule for b, which is open as fd.
func landlockAllow(ruleset int, b Bind, fd int, handled uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	access := uint64(landlockRead)
	if !b.NoExec {
		access |= unix.LANDLOCK_ACCESS_FS_EXECUTE
	}
	if b.Writable {
		access |= landlockWrite | landlockDir
	}
	if b.Device {
		access |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		access &= landlockFiles
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: access & handled, Parent_fd: int32(fd)}
	if _, _, e := unix.RawSyscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&rule)), 0, 0, 0); e != 0 {
		return e
	}
	return nil
}

func landlockRestrict(ruleset int) error {
	if ruleset <= 0 {
		return errors.New("no rules")
	}
	if _, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(ruleset), 0, 0); e != 0 {
		return e
	}
	return nil
}
