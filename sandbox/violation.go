package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// A Violation is a call outside a program's list; the process was ended for it.
type Violation struct {
	Program string
	Call    string // name of the system call
	Number  uint32
	Arch    uint32 // AUDIT_ARCH_…; not x86-64's if the process changed to the 32-bit entry
	Args    [6]uint64
	PID     int // of the thread, in the observer's namespace
}

func (v *Violation) Error() string {
	arch := ""
	if v.Arch != unix.AUDIT_ARCH_X86_64 {
		arch = fmt.Sprintf(" of architecture %#x", v.Arch)
	}
	return fmt.Sprintf("%s was killed by its sandbox: system call %s(%#x, %#x, %#x, %#x, %#x, %#x)%s is not in its list",
		v.Program, v.Call, v.Args[0], v.Args[1], v.Args[2], v.Args[3], v.Args[4], v.Args[5], arch)
}

func (g *Guard) violate(n *note) error {
	v := &Violation{
		Program: g.spec.Name, Call: callName(n.data.number), Number: n.data.number, Arch: n.data.arch,
		Args: n.data.args, PID: int(n.pid),
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.violation == nil {
		g.violation = v
	}
	return v
}

// Violation is why the sandbox ended the process; nil if it did not.
func (g *Guard) Violation() *Violation {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.violation
}

// Learned are the calls that a Spec with Learn let pass although its list lacks them, in the
// list's own format, with counts.
func (g *Guard) Learned() map[string]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := map[string]int{}
	for k, v := range g.learned {
		out[k] = v
	}
	return out
}

// record keeps a call with the arguments by which lists tell such calls apart.
func (g *Guard) record(n *note) {
	line := callName(n.data.number)
	arg := func(format string, i int) { line += fmt.Sprintf(format, n.data.args[i]) }
	switch line {
	case "ioctl":
		line += fmt.Sprintf(" w1=%#x", uint32(n.data.args[1]))
	case "fcntl":
		arg(" a1=%d", 1)
	case "socket", "prctl", "clone", "unshare", "seccomp", "arch_prctl":
		arg(" a0=%#x", 0)
	case "madvise", "openat", "mmap", "mprotect":
		arg(" a2=%#x", 2)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.learned[line]++
}
