// Package attack tries what a process in its sandbox must not be able to do. Each attack is real:
// the tests run it without a sandbox first, where it must succeed.
//
// It is used by tests and the demo only.
package attack

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Victim is another process of the host and what it holds.
type Victim struct {
	PID      int
	Secret   string // what its memory, its memfd and its file hold
	Address  uint64 // of the secret in its memory
	MemFD    int    // number of its memfd, a guest's memory
	File     string
	Socket   string // a listening Unix socket
	Abstract string // one with an abstract name
	TCP      string // a listening TCP socket
	Dir      string // the directory of its files
	Hostname string // of the host
	// Interface is one of the host's network, "" where it can have none.
	Interface string
}

// ErrUnavailable is an attack that this host gives no occasion for, whoever tries.
var ErrUnavailable = errors.New("the host has no such thing")

// An Attack returns nil if it succeeded.
type Attack struct {
	Name string
	// OnlyFilter says that nothing but the seccomp filter stands in its way; all others are
	// stopped by namespaces, root, capabilities or Landlock as well.
	OnlyFilter bool
	Run        func(v *Victim) error
}

// Nothing succeeds everywhere: where it does not, the failure of the others says nothing.
var Nothing = Attack{"nothing at all", false, func(*Victim) error { return nil }}

// Find returns the attack of that name.
func Find(name string) (Attack, error) {
	for _, a := range append([]Attack{Nothing}, All...) {
		if a.Name == name {
			return a, nil
		}
	}
	return Attack{}, fmt.Errorf("there is no attack %q", name)
}

// All attacks.
var All = []Attack{
	{"guest memory through /proc/PID/fd", false, func(v *Victim) error {
		return readSecret(fmt.Sprintf("/proc/%d/fd/%d", v.PID, v.MemFD), v.Secret)
	}},
	{"guest memory through pidfd_getfd", false, stealDescriptor},
	{"memory of another process by process_vm_readv", false, readMemory},
	{"memory of another process through /proc/PID/mem", false, func(v *Victim) error {
		f, err := os.Open(fmt.Sprintf("/proc/%d/mem", v.PID))
		if err != nil {
			return err
		}
		defer f.Close()
		b := make([]byte, len(v.Secret))
		if _, err := f.ReadAt(b, int64(v.Address)); err != nil {
			return err
		}
		return compare(string(b), v.Secret)
	}},
	{"ptrace", false, trace},
	{"another service's file, read", false, func(v *Victim) error { return readSecret(v.File, v.Secret) }},
	{"another service's file, written", false, func(v *Victim) error {
		f, err := os.OpenFile(v.File, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		return f.Close()
	}},
	{"a file of its own making in /tmp", false, func(*Victim) error {
		f, err := os.CreateTemp("/tmp", "attack")
		if err != nil {
			return err
		}
		return errors.Join(f.Close(), os.Remove(f.Name()))
	}},
	{"the password file", false, func(*Victim) error { return openOnly("/etc/shadow", os.O_RDONLY) }},
	{"another service's socket", false, func(v *Victim) error { return dial("unix", v.Socket) }},
	{"another service's abstract socket", false, func(v *Victim) error { return dial("unix", v.Abstract) }},
	{"/dev/kvm", false, func(*Victim) error { return openOnly("/dev/kvm", os.O_RDWR) }},
	{"/dev/mem or /dev/kmsg", false, func(*Victim) error { return openOnly("/dev/kmsg", os.O_RDONLY) }},
	{"a device file of its own making", false, makeDevice},
	{"/proc of another process", false, func(v *Victim) error {
		return openOnly(fmt.Sprintf("/proc/%d/environ", v.PID), os.O_RDONLY)
	}},
	{"a new /proc", false, func(v *Victim) error { return mountSomewhere(v, "proc") }},
	{"mount", false, func(v *Victim) error { return mountSomewhere(v, "tmpfs") }},
	{"chroot", false, func(*Victim) error { return unix.Chroot("/") }},
	{"connection to a TCP service of the host", false, func(v *Victim) error { return dial("tcp", v.TCP) }},
	{"a TCP service of its own", false, func(v *Victim) error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		defer l.Close()
		return dial("tcp", "127.0.0.1:"+port)
	}},
	{"raw IP socket", false, func(*Victim) error { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) }},
	{"packet socket", false, func(*Victim) error { return socket(unix.AF_PACKET, unix.SOCK_RAW, 0) }},
	{"netlink socket", true, func(*Victim) error { return socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE) }},
	{"the host's network interfaces, seen", false, seeInterface},
	{"the host's network interfaces, changed", false, changeInterface},
	{"an interface put into the host's network", false, addInterface},
	{"requests to the host's network by its number", false, nameNamespace},
	{"vsock", true, func(*Victim) error { return socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) }},
	{"kernel crypto socket", true, func(*Victim) error { return socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0) }},
	{"new user namespace", true, func(*Victim) error { return forked(unix.CLONE_NEWUSER) }},
	{"new mount namespace", false, func(*Victim) error { return unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS) }},
	{"new network namespace", false, func(*Victim) error { return forked(unix.CLONE_NEWNET) }},
	{"new PID namespace", false, func(*Victim) error { return forked(unix.CLONE_NEWPID) }},
	{"another process's namespace", false, func(v *Victim) error {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", v.PID))
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
	}},
	{"a process of its own", true, func(*Victim) error { return forked(0) }},
	{"another program", false, func(*Victim) error { return run("/bin/true") }},
	{"a program from memory", true, execMemory},
	{"loading a kernel module", false, func(*Victim) error { return wants(initModule(), unix.ENOEXEC) }},
	{"unloading a kernel module", false, func(*Victim) error {
		return wants(unix.DeleteModule("no_such_module", unix.O_NONBLOCK), unix.ENOENT)
	}},
	{"another kernel (kexec)", false, kexec},
	{"kill another process", false, func(v *Victim) error { return unix.Kill(v.PID, unix.SIGURG) }},
	{"io_uring", true, ioURing},
	{"bpf", false, bpfMap},
	{"perf events of the machine", false, perfEvents},
	{"kernel keys", true, func(*Victim) error {
		_, err := unix.AddKey("user", "redoubt-attack", []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING)
		return err
	}},
	{"userfaultfd", false, userfault},
	{"I/O ports", false, ioPorts},
	{"the host's name", false, func(v *Victim) error { return unix.Sethostname([]byte(v.Hostname)) }},
	{"the kernel's console", false, func(*Victim) error {
		_, err := unix.Klogctl(unix.SYSLOG_ACTION_CONSOLE_ON, nil) // as it is already
		return err
	}},
	{"a higher priority", false, func(*Victim) error { return unix.Setpriority(unix.PRIO_PROCESS, 0, -5) }},
	{"locking all memory", false, func(*Victim) error { return lockMemory() }},
	{"executable memory", true, executableMemory},
	{"a call of the x32 ABI", true, x32Call},
	{"file by handle", false, fileByHandle},
	{"root again (setuid, capset)", false, func(*Victim) error { return takeCapability() }},
}

func compare(got, want string) error {
	if got != want {
		return fmt.Errorf("read %q", got)
	}
	return nil
}

func readSecret(path, want string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return compare(strings.TrimRight(string(b), "\x00"), want)
}

func openOnly(path string, flags int) error {
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func dial(network, address string) error {
	c, err := net.Dial(network, address)
	if err != nil {
		return err
	}
	return c.Close()
}

func socket(domain, kind, protocol int) error {
	fd, err := unix.Socket(domain, kind, protocol)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// wants turns the error that only a permitted caller sees into success.
func wants(err, permitted error) error {
	if errors.Is(err, permitted) {
		return nil
	}
	if errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if err == nil {
		return errors.New("garbage was taken")
	}
	return err
}

// mountSomewhere mounts a file system of kind over the victim's directory or, where that is not
// to be seen, over the one directory that even an empty root has.
func mountSomewhere(v *Victim, kind string) error {
	dir := v.Dir
	if f, err := os.Open(dir); err != nil {
		dir = "/"
	} else {
		f.Close()
	}
	if err := unix.Mount("none", dir, kind, unix.MS_NOSUID, ""); err != nil {
		return err
	}
	return unix.Unmount(dir, unix.MNT_DETACH)
}

func run(program string) error {
	pid, err := syscall.ForkExec(program, []string{program}, &syscall.ProcAttr{})
	if err != nil {
		return err
	}
	_, err = unix.Wait4(pid, nil, 0, nil)
	return err
}

func makeDevice(*Victim) error {
	for _, dir := range []string{os.TempDir(), "/"} {
		path := filepath.Join(dir, fmt.Sprintf("attack-%d", os.Getpid()))
		err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))
		if err == nil {
			err = openOnly(path, os.O_RDWR)
			return errors.Join(err, os.Remove(path))
		}
		if dir == "/" {
			return err
		}
	}
	return nil
}

// forked makes a process, in new namespaces by the flags, that ends at once. A child that finds
// nothing to execute was made all the same.
func forked(flags uintptr) error {
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"probe", "exit"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{Cloneflags: flags},
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		return nil
	}
	if err != nil {
		return err
	}
	var ws unix.WaitStatus
	_, err = unix.Wait4(pid, &ws, 0, nil)
	return err
}

// Describe is the line an attacking process prints.
func Describe(err error) string {
	switch {
	case err == nil:
		return "allowed"
	case errors.Is(err, ErrUnavailable):
		return "unavailable: " + err.Error()
	}
	return "denied: " + err.Error()
}
