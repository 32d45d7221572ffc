package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A Spec declares what a program may have. The zero value of every field but UID, GID and Policy
// is the strictest.
type Spec struct {
	Name string // of the program, for messages

	// UID and GID are the process's on the host, its own. With a user namespace they are 0
	// inside, without any privilege.
	UID, GID uint32
	// Groups are supplementary groups on the host, for a device file that is a group's.
	Groups []uint32

	// Share are the namespaces that the process shares with its parent. Without a user
	// namespace capabilities count on the host.
	Share []Namespace

	// NetworkNamespace is one that others made and hold, which the process is in instead of a new
	// one; nil: a new one, or the parent's by Share. [Guard.Start] is then called on a thread that
	// is in it, and refuses otherwise. Capabilities count in it only if the process shares the
	// user namespace that it belongs to: no launcher can enter one, because a program with
	// several threads cannot (setns(2)).
	NetworkNamespace *os.File

	// Root is what the process finds in its root, which is read-only. None: nothing at all.
	Root []Bind
	// Proc gives it a /proc of its own PID namespace, process directories only. QEMU needs it to
	// open inherited descriptors by name.
	Proc bool

	// Capabilities are kept; all others are gone from every set, the bounding set included.
	Capabilities []Capability

	// Policy lists the system calls.
	Policy *Policy

	// Memory limits what the process and its kernel objects may use, in bytes; 0: no limit. It is
	// a cgroup's limit (see [Cgroup]).
	Memory uint64
	// Files is the number of descriptors, Processes that of processes and threads of the UID; 0
	// takes the defaults [DefaultFiles] and [DefaultProcesses]. There are no core dumps.
	Files, Processes uint64

	// GroupReads lets files that it makes be read by its group; else they are its user's alone.
	GroupReads bool

	// Optional ingredients are left out where the host has them not; all others must be had, or
	// the program does not start.
	Optional []Ingredient

	// Learn is for making lists: calls outside the Policy are made and recorded
	// ([Guard.Learned]) instead of ending the process. Never set in a product.
	Learn bool
}

// Defaults of limits.
const (
	DefaultFiles     = 1024
	DefaultProcesses = 256
)

// A Bind is an entry of a sandbox's root: a directory or file of the host, or a symbolic link.
type Bind struct {
	Source   string // on the host
	Target   string // absolute; "": as Source
	Link     string // a symbolic link with this text at Target; no Source
	Writable bool
	Device   bool // Source is a device file, or holds some, and they work
	NoExec   bool // nothing beneath can be executed or mapped executable
}

func (b Bind) target() string {
	if b.Target == "" {
		return b.Source
	}
	return b.Target
}

// A Namespace of Linux, namespaces(7).
type Namespace string

// The namespaces, named as in /proc/PID/ns.
const (
	User      Namespace = "user"
	Mount     Namespace = "mnt"
	PID       Namespace = "pid"
	IPC       Namespace = "ipc"
	Net       Namespace = "net"
	UTS       Namespace = "uts"
	CgroupNS  Namespace = "cgroup"
	allSpaces           = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC |
		unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
)

// namespaces in the order of reports.
var namespaces = []Namespace{User, Mount, PID, IPC, Net, UTS, CgroupNS}

// Namespaces are all there are, in the order of reports.
func Namespaces() []Namespace { return slices.Clone(namespaces) }

var cloneFlag = map[Namespace]uintptr{
	User: unix.CLONE_NEWUSER, Mount: unix.CLONE_NEWNS, PID: unix.CLONE_NEWPID, IPC: unix.CLONE_NEWIPC,
	Net: unix.CLONE_NEWNET, UTS: unix.CLONE_NEWUTS, CgroupNS: unix.CLONE_NEWCGROUP,
}

// A Capability is a number of capabilities(7).
type Capability uint

// The capabilities that a service of ours may declare.
const (
	NetAdmin Capability = unix.CAP_NET_ADMIN
	NetRaw   Capability = unix.CAP_NET_RAW
	IPCLock  Capability = unix.CAP_IPC_LOCK
)

// String is its name in capabilities(7).
func (c Capability) String() string {
	switch c {
	case NetAdmin:
		return "CAP_NET_ADMIN"
	case NetRaw:
		return "CAP_NET_RAW"
	case IPCLock:
		return "CAP_IPC_LOCK"
	}
	return fmt.Sprintf("capability %d", uint(c))
}

// An Ingredient is a part of the sandbox that a host may lack.
type Ingredient string

// The ingredients.
const (
	UserNamespaces Ingredient = "user namespaces"
	Seccomp        Ingredient = "seccomp notification"
	Landlock       Ingredient = "landlock"
	MemoryCgroup   Ingredient = "memory cgroup"
	MountAPI       Ingredient = "mount API"
)

func (s *Spec) shares(n Namespace) bool    { return slices.Contains(s.Share, n) }
func (s *Spec) optional(i Ingredient) bool { return slices.Contains(s.Optional, i) }
func orDefault(v uint64, defaultV uint64) uint64 {
	if v == 0 {
		return defaultV
	}
	return v
}

// cloneFlags are the namespaces that are made anew.
func (s *Spec) cloneFlags() uintptr {
	f := allSpaces &^ s.sharedFlags()
	if s.NetworkNamespace != nil {
		f &^= unix.CLONE_NEWNET
	}
	return f
}

func (s *Spec) sharedFlags() (f uintptr) {
	for _, n := range s.Share {
		f |= cloneFlag[n]
	}
	return f
}

// Check refuses a Spec that cannot be carried out or cannot be meant.
func (s *Spec) Check() error {
	fail := func(format string, a ...any) error {
		return fmt.Errorf("sandbox of %s: %s", s.Name, fmt.Sprintf(format, a...))
	}
	if s.Name == "" {
		return errors.New("a sandbox without a name")
	}
	if s.UID == 0 || s.GID == 0 {
		return fail("user and group must be its own, not root's")
	}
	if s.Policy == nil {
		return fail("no seccomp list")
	}
	if err := s.Policy.check(); err != nil {
		return fail("%v", err)
	}
	for _, n := range s.Share {
		if cloneFlag[n] == 0 {
			return fail("there is no namespace %q", n)
		}
	}
	if s.NetworkNamespace != nil && s.shares(Net) {
		return fail("its network namespace is a given one and the host's at once")
	}
	if s.shares(Mount) {
		return fail("the mount namespace cannot be shared: the root is made in it")
	}
	if s.Proc && s.shares(PID) {
		return fail("a /proc in the host's PID namespace would show the host")
	}
	for _, b := range s.Root {
		t := b.target()
		if !path.IsAbs(t) || path.Clean(t) != t || strings.ContainsRune(t, 0) {
			return fail("%q is not a clean absolute path", t)
		}
		if (b.Source == "") == (b.Link == "") {
			return fail("%s must have a source or be a link", t)
		}
		if t == "/" && (len(s.Root) > 1 || s.Proc) {
			return fail("a tree as the root leaves no room for other entries")
		}
		if t == "/proc" || strings.HasPrefix(t, "/proc/") {
			return fail("%s: /proc is given by Proc only", t)
		}
	}
	return nil
}
