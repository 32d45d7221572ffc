package sandbox

// The launcher's last steps.

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// filterAndExec installs the filter on this thread and executes the program. It returns only if
// that could not begin.
func filterAndExec(base int, filter []byte, args, env []string) error {
	raw, err := decodeFilter(filter)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return errors.New("no arguments")
	}
	prog := &unix.SockFprog{Len: uint16(len(raw)), Filter: &raw[0]}
	argv, err := pointers(args)
	if err != nil {
		return err
	}
	envv, err := pointers(env)
	if err != nil {
		return err
	}
	l := &lastSteps{
		sync: uintptr(base + fdSync), program: uintptr(base + fdProgram),
		prog: unsafe.Pointer(prog), argv: unsafe.Pointer(&argv[0]), envv: unsafe.Pointer(&envv[0]),
		empty: unsafe.Pointer(&[1]byte{}), msg: &[5]byte{},
	}
	errno := l.run()
	runtime.KeepAlive(raw)
	runtime.KeepAlive(argv)
	runtime.KeepAlive(envv)
	return fmt.Errorf("seccomp: %w", errno)
}

// pointers makes a null-terminated array of C strings.
func pointers(s []string) ([]*byte, error) {
	out := make([]*byte, 0, len(s)+1)
	for _, x := range s {
		p, err := unix.BytePtrFromString(x)
		if err != nil {
			return nil, fmt.Errorf("argument %q: %w", x, err)
		}
		out = append(out, p)
	}
	return append(out, nil), nil
}

type lastSteps struct {
	sync, program           uintptr
	prog, argv, envv, empty unsafe.Pointer
	msg                     *[5]byte
}

// run installs the filter, names the listening descriptor to the parent and executes. From the
// first call on this thread must make no call that the program's list lacks, so nothing of the
// Go runtime may run on it: no stack growth, no preemption (asynchronous preemption is off in a
// launcher), no instrumentation. It returns only if the filter was refused.
//
//go:nosplit
//go:norace
func (l *lastSteps) run() unix.Errno {
	fd, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(l.prog))
	if e != 0 {
		return e
	}
	l.report(msgFilter, uint32(fd))
	_, _, e = unix.RawSyscall6(unix.SYS_EXECVEAT, l.program, uintptr(l.empty), uintptr(l.argv), uintptr(l.envv), unix.AT_EMPTY_PATH, 0)
	l.report(msgExec, uint32(e))
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 1, 0, 0)
	}
}

//go:nosplit
//go:norace
func (l *lastSteps) report(kind byte, v uint32) {
	m := l.msg
	m[0], m[1], m[2], m[3], m[4] = kind, byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, l.sync, uintptr(unsafe.Pointer(m)), 5)
}
