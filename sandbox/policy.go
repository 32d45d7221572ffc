package sandbox

import (
	"bytes"
	"embed"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A Policy is a list of the system calls a program may make. Its text has one rule a line:
//
//	# comment
//	include go                         a list of this package: go, qemu, swtpm
//	read                               allowed
//	socket a0=AF_UNIX                  allowed with these arguments; several conditions are joined by and
//	mmap a2&PROT_EXEC=0                masked comparison
//	ioctl w1=0xae80                    only the low 32 bits, for arguments the kernel takes as int
//	-openat ENOENT                     not made, answered with this error
//	clone a0&CLONE_NAMESPACES=0        several lines of one call are joined by or, the first match decides
//
// Arguments are a0 to a5, compared as 64 bits. A value is a number or names of constants joined
// by |. What no line allows ends the process (see the package's text).
//
// A pointer's target cannot be looked at by a filter: clone3, whose flags lie in memory, can be
// allowed only whole, and is to be answered with ENOSYS, upon which libc uses clone.
type Policy struct {
	Name  string
	rules []rule

	once   sync.Once // over filter and err
	filter []byte
	err    error
}

// told is the filter whose unlisted calls are told to the parent, encoded. It is compiled once: the same
// program is started again and again.
func (p *Policy) told() ([]byte, error) {
	p.once.Do(func() {
		var raw []bpf.RawInstruction
		if raw, p.err = compile(p, unix.SECCOMP_RET_USER_NOTIF); p.err == nil {
			p.filter = encodeFilter(raw)
		}
	})
	return p.filter, p.err
}

// A rule allows one call, or answers it with errno.
type rule struct {
	number uint32
	errno  unix.Errno // 0: allowed
	conds  []cond
}

// A cond is: argument & mask = value.
type cond struct {
	arg         int
	word        bool // the low 32 bits only
	mask, value uint64
}

//go:embed policies/*.txt
var policies embed.FS

// A ParseError says what is wrong with a list and where.
type ParseError struct {
	Name   string // of the list
	Line   int
	Reason string
}

func (e *ParseError) Error() string {
	return fmt.Sprintf("seccomp list %s, line %d: %s", e.Name, e.Line, e.Reason)
}

// ParsePolicy reads a list; name is for messages.
func ParsePolicy(name string, text []byte) (*Policy, error) {
	p := &Policy{Name: name}
	if err := p.parse(name, text, nil); err != nil {
		return nil, err
	}
	return p, nil
}

// MustParsePolicy is ParsePolicy of a list that is part of a program.
func MustParsePolicy(name string, text []byte) *Policy {
	p, err := ParsePolicy(name, text)
	if err != nil {
		panic(err)
	}
	return p
}

// BasePolicy is a list of this package.
func BasePolicy(name string) (*Policy, error) {
	return ParsePolicy(name, []byte("include "+name))
}

func (p *Policy) parse(name string, text []byte, including []string) error {
	n := 0
	for line := range bytes.Lines(text) {
		n++
		s, _, _ := strings.Cut(string(line), "#")
		f := strings.Fields(s)
		if len(f) == 0 {
			continue
		}
		fail := func(format string, a ...any) error {
			return &ParseError{name, n, fmt.Sprintf(format, a...)}
		}
		if f[0] == "include" {
			if len(f) != 2 {
				return fail("include takes one name")
			}
			if slices.Contains(including, f[1]) {
				return fail("%s includes itself", f[1])
			}
			if path.Base(f[1]) != f[1] {
				return fail("%q is not a name of a list", f[1])
			}
			sub, err := fs.ReadFile(policies, "policies/"+f[1]+".txt")
			if err != nil {
				return fail("there is no list %q", f[1])
			}
			if err := p.parse(f[1], sub, append(including, f[1])); err != nil {
				return err
			}
			continue
		}
		r, err := parseRule(f)
		if err != nil {
			return fail("%v", err)
		}
		p.rules = append(p.rules, r)
	}
	return nil
}

func parseRule(f []string) (r rule, err error) {
	name, answered := strings.CutPrefix(f[0], "-")
	number, ok := numbers[name]
	if !ok {
		return r, fmt.Errorf("there is no system call %q on x86-64", name)
	}
	r.number = number
	f = f[1:]
	if answered {
		if len(f) == 0 {
			return r, fmt.Errorf("-%s lacks its error", name)
		}
		if r.errno = errnoByName(f[0]); r.errno == 0 {
			return r, fmt.Errorf("there is no error %q", f[0])
		}
		f = f[1:]
	}
	for _, s := range f {
		c, err := parseCond(s)
		if err != nil {
			return r, fmt.Errorf("condition %q: %w", s, err)
		}
		r.conds = append(r.conds, c)
	}
	return r, nil
}

func errnoByName(name string) unix.Errno {
	for e := unix.Errno(1); e < 134; e++ {
		if unix.ErrnoName(e) == name {
			return e
		}
	}
	return 0
}

func parseCond(s string) (c cond, err error) {
	left, right, ok := strings.Cut(s, "=")
	if !ok {
		return c, fmt.Errorf("must be an argument, = and a value")
	}
	arg, mask, masked := strings.Cut(left, "&")
	if len(arg) != 2 || (arg[0] != 'a' && arg[0] != 'w') || arg[1] < '0' || arg[1] > '5' {
		return c, fmt.Errorf("arguments are a0 to a5, and w0 to w5 for their low 32 bits")
	}
	c.arg, c.word, c.mask = int(arg[1]-'0'), arg[0] == 'w', ^uint64(0)
	if masked {
		if c.mask, err = parseValue(mask); err != nil {
			return c, err
		}
	}
	if c.value, err = parseValue(right); err != nil {
		return c, err
	}
	if c.word {
		if c.value>>32 != 0 || masked && c.mask>>32 != 0 {
			return c, fmt.Errorf("does not fit 32 bits")
		}
		c.mask &= 1<<32 - 1
	}
	if c.value&^c.mask != 0 {
		return c, fmt.Errorf("never holds: the value has bits outside the mask")
	}
	return c, nil
}

func parseValue(s string) (v uint64, err error) {
	for part := range strings.SplitSeq(s, "|") {
		n, ok := constants[part]
		if !ok {
			if n, err = strconv.ParseUint(part, 0, 64); err != nil {
				return 0, fmt.Errorf("%q is neither a number nor a known constant", part)
			}
		}
		v |= n
	}
	return v, nil
}

// cloneNamespaces are the flags of clone(2) and unshare(2) that make namespaces. CLONE_NEWTIME
// shares its bit with the exit signal of clone and is a flag of unshare and clone3 only.
const cloneNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// constants that lists may name.
var constants = map[string]uint64{
	"AF_UNIX": unix.AF_UNIX, "AF_INET": unix.AF_INET, "AF_INET6": unix.AF_INET6, "AF_NETLINK": unix.AF_NETLINK,
	"AF_VSOCK":         unix.AF_VSOCK,
	"CLONE_NAMESPACES": cloneNamespaces, "CLONE_THREAD": unix.CLONE_THREAD, "CLONE_VM": unix.CLONE_VM,
	"PROT_EXEC": unix.PROT_EXEC, "PROT_WRITE": unix.PROT_WRITE,
	"MAP_SHARED": unix.MAP_SHARED, "MAP_PRIVATE": unix.MAP_PRIVATE, "MAP_ANONYMOUS": unix.MAP_ANONYMOUS,
	"O_ACCMODE": unix.O_ACCMODE, "O_CREAT": unix.O_CREAT,
	"F_GETFD": unix.F_GETFD, "F_SETFD": unix.F_SETFD, "F_GETFL": unix.F_GETFL, "F_SETFL": unix.F_SETFL,
	"F_DUPFD_CLOEXEC": unix.F_DUPFD_CLOEXEC, "F_GET_SEALS": unix.F_GET_SEALS, "F_ADD_SEALS": unix.F_ADD_SEALS,
	"F_SETLK": unix.F_SETLK, "F_GETLK": unix.F_GETLK, "F_OFD_SETLK": unix.F_OFD_SETLK, "F_OFD_GETLK": unix.F_OFD_GETLK,
	"PR_SET_NAME": unix.PR_SET_NAME, "PR_GET_NAME": unix.PR_GET_NAME, "PR_SET_VMA": unix.PR_SET_VMA,
	"PR_SET_NO_NEW_PRIVS": unix.PR_SET_NO_NEW_PRIVS, "PR_SET_TIMERSLACK": unix.PR_SET_TIMERSLACK,
	"PR_SET_PDEATHSIG": unix.PR_SET_PDEATHSIG, "PR_SET_DUMPABLE": unix.PR_SET_DUMPABLE,
	"ARCH_SET_FS": 0x1002, "ARCH_CET_STATUS": 0x3001,
	"FUTEX_CMD_MASK":          uint64(0x7f),
	"SECCOMP_SET_MODE_FILTER": unix.SECCOMP_SET_MODE_FILTER, "SECCOMP_GET_ACTION_AVAIL": unix.SECCOMP_GET_ACTION_AVAIL,
	"SECCOMP_FILTER_FLAG_TSYNC": unix.SECCOMP_FILTER_FLAG_TSYNC,
	"FIONBIO":                   0x5421, "FIONREAD": 0x541b, "TCGETS": unix.TCGETS, "TIOCGWINSZ": unix.TIOCGWINSZ,
	"KVM_GET_API_VERSION": 0xae00, "KVM_CREATE_VM": 0xae01, "KVM_RUN": 0xae80,
}

// callName is the name of a system call.
func callName(nr uint32) string {
	for name, n := range numbers {
		if n == nr {
			return name
		}
	}
	return fmt.Sprintf("number %d", nr)
}
