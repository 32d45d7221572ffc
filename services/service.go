// Package services says what Redoubt's services are and what each may do. [Table] is the one place
// for it: the Builder makes every sandbox from it, the page docs/SERVICES-TABLE.md is written from
// it, and `redoubt services` holds it against what is in force.
package services

import (
	"fmt"
	"os"
	"slices"

	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/sandbox"
)

// A Service is one kind of process and what it may have. What is not here it has not.
type Service struct {
	Name    string // short; its processes' label starts with it
	Program string
	Seed    string // its name in the source of the partition (Xoar), "–" where that has none
	Purpose string

	Creator   string   // the service that asks for it; the Builder starts it in any case
	Peers     []Peer   // whom it talks to: nobody else has a descriptor of it
	DependsOn []string // services that must be there before it
	Holds     []string // descriptors handed to it, in words
	Count     Count
	Lifetime  string
	Leaves    bool // is done before Redoubt is up, or its guest
	Reset     Reset
	Tag       Tag

	Share        []sandbox.Namespace // namespaces that are the host's
	ShareWhy     string
	Network      bool                 // it is in a network namespace of Redoubt's own, which outlives it
	Capabilities []sandbox.Capability // in its own user namespace unless that is shared
	Devices      []string             // device files in its root
	State        Access               // of the directory StateDir
	Packages     func() ([]sandbox.Bind, error)
	GroupReads   bool // its group, another service's, reads the files it makes
	Proc         bool // a /proc of its own processes
	Policy       *sandbox.Policy
	Memory       uint64 // bytes, besides guest memory
	GuestMemory  bool   // pages of its guest's memory count as its own
}

// A Peer is one of a service's connections.
type Peer struct {
	Service string // or program
	Over    string
}

// Count says how many processes there are of a service.
type Count string

// The counts.
const (
	One       Count = "one"
	PerGuest  Count = "one a guest"
	PerTenant Count = "one a tenant"
	Several   Count = "several"
)

// Reset says when a service's process is replaced, besides after a crash.
type Reset string

// The policies.
const (
	Never       Reset = "not yet"
	EachStart   Reset = "at each start of its guest"
	AfterAnswer Reset = "after each response, if so configured"
	OnTimer     Reset = "on a timer, under its guests"
	OnCrash     Reset = "after a crash"
	Ends        Reset = "ends with its guest"
	Leave       Reset = "never: it leaves"
)

// Tag says whose guests may share a process.
type Tag string

// The tags.
const (
	AnyGuest Tag = "all guests"
	OneGuest Tag = "one guest"
	Tenant   Tag = "one tenant's guests"
)

// Access to a directory.
type Access int

// The accesses.
const (
	None Access = iota
	ReadWrite
)

// StateDir is where a service finds the directory in which it writes, if it has one.
const StateDir = "/state"

// An Instance is one process of a service.
type Instance struct {
	Label    string // of the process: the service's name and, where there are several, whose it is
	UID      uint32 // of nobody else; its GID too unless that is given
	GID      uint32
	StateDir string   // on the host, for a service with State
	Memory   uint64   // of its guest or guests, in bytes
	Network  *os.File `json:"-"` // the network namespace, for a service with Network
	KVM      bool     // QEMU only: the guest runs on /dev/kvm, which it opens by name
	KVMGroup uint32   // the group of /dev/kvm
	NICs     bool     // QEMU only: it comes to its NICs' back ends by doors, see vhostuser.Door
}

// Sandbox is what confines an instance.
func (s *Service) Sandbox(i Instance) (*sandbox.Spec, error) {
	spec := &sandbox.Spec{
		Name: i.Label, UID: i.UID, GID: i.GID, Share: s.Share, Proc: s.Proc,
		Capabilities: s.Capabilities, Policy: s.Policy, Memory: s.Memory,
		GroupReads: s.GroupReads,
	}
	if spec.GID == 0 {
		spec.GID = i.UID
	}
	if s.GuestMemory {
		spec.Memory += i.Memory
	}
	if s.Packages != nil {
		root, err := s.Packages()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", i.Label, err)
		}
		spec.Root = slices.Clip(root)
	}
	for _, d := range s.Devices {
		spec.Root = append(spec.Root, sandbox.Bind{Source: d, Device: true, Writable: true, NoExec: true})
	}
	if i.KVM {
		if s.Name != QEMU {
			return nil, fmt.Errorf("%s: opens no /dev/kvm", i.Label)
		}
		spec.Root = append(spec.Root, sandbox.Bind{Source: "/dev/kvm", Device: true, Writable: true, NoExec: true})
		spec.Policy = qemuKVM
		if i.KVMGroup != 0 {
			spec.Groups = []uint32{i.KVMGroup}
		}
	}
	if s.Network != (i.Network != nil) {
		return nil, fmt.Errorf("%s: its network namespace is missing, or it may not be in it", i.Label)
	}
	spec.NetworkNamespace = i.Network
	if i.NICs {
		if s.Name != QEMU {
			return nil, fmt.Errorf("%s: has no way to NICs", i.Label)
		}
		if spec.Policy = qemuNICs; i.KVM {
			spec.Policy = qemuKVMNICs
		}
	}
	if (s.State == None) != (i.StateDir == "") {
		return nil, fmt.Errorf("%s: its directory is missing, or it may have none", i.Label)
	}
	if i.StateDir != "" {
		spec.Root = append(spec.Root, sandbox.Bind{Source: i.StateDir, Target: StateDir, Writable: true, NoExec: true})
	}
	return spec, spec.Check()
}

// Find is the service of a name.
func Find(name string) (*Service, error) {
	for i := range Table {
		if Table[i].Name == name {
			return &Table[i], nil
		}
	}
	return nil, fmt.Errorf("there is no service %q", name)
}

// Survived says that guests go on when the service's process is killed: another one takes its place.
func (s *Service) Survived() bool {
	return s.Reset == AfterAnswer || s.Reset == OnTimer || s.Reset == OnCrash
}

// Outlives says that the service's processes, and so their guests, go on when the Builder dies; all others
// end with it and are started again by the next one.
func (s *Service) Outlives() bool { return s.Reset == EachStart || s.Reset == Ends }

// Foreign says that a service's program is another's (QEMU, swtpm).
func (s *Service) Foreign() bool { return s.Packages != nil }

// packages is the read-only root of a foreign program.
func packages(program string, more func() []string) func() ([]sandbox.Bind, error) {
	return func() ([]sandbox.Bind, error) {
		path, err := programs.Find(program)
		if err != nil {
			return nil, err
		}
		return sandbox.ProgramRoot(path, programs.Libraries(), more()...)
	}
}
