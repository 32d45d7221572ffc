package services

import (
	_ "embed"

	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/sandbox"
)

// Names of the services in [Table].
const (
	Builder      = "builder"
	Bootstrapper = "bootstrapper"
	StoreState   = "store-state"
	StoreLogic   = "store-logic"
	VTPM         = "vtpm"
	SWTPM        = "swtpm"
	Toolstack    = "toolstack"
	PCIBack      = "pciback"
	Inspector    = "inspector"
	BlkBack      = "blkback"
	NetBack      = "netback"
	Emulator     = "emulator"
	QEMU         = "qemu"
)

const (
	mib = 1 << 20
	// goMemory is room for a service in Go: its program, the runtime and what it does.
	goMemory = 128 * mib
)

//go:embed bootstrapper/seccomp.txt
var bootstrapperCalls []byte

//go:embed store/state.seccomp.txt
var stateCalls []byte

//go:embed store/logic.seccomp.txt
var logicCalls []byte

//go:embed vtpm/seccomp.txt
var vtpmCalls []byte

//go:embed toolstack/seccomp.txt
var toolstackCalls []byte

//go:embed pciback/seccomp.txt
var pcibackCalls []byte

//go:embed inspector/seccomp.txt
var inspectorCalls []byte

//go:embed blkback/seccomp.txt
var blkbackCalls []byte

//go:embed netback/seccomp.txt
var netbackCalls []byte

//go:embed emulator/seccomp.txt
var emulatorCalls []byte

func list(name string, text []byte) *sandbox.Policy { return sandbox.MustParsePolicy(name, text) }

// qemuKVM is QEMU's list where its guest runs on KVM: it may make any request to /dev/kvm, but has
// no translated code to write and execute.
var qemuKVM = list("qemu-kvm", []byte("include qemu-kvm"))

// These are QEMU's lists where its guest has NICs: it makes a connection to each one's door.
var (
	qemuNICs    = list("qemu with NICs", []byte("include qemu-nics\ninclude qemu"))
	qemuKVMNICs = list("qemu-kvm with NICs", []byte("include qemu-nics\ninclude qemu-kvm"))
)

// Table is every service but the Builder itself, which makes them and is not confined by itself.
var Table = []Service{
	{
		Name: Bootstrapper, Program: "redoubt-bootstrapper", Seed: "Bootstrapper",
		Purpose: "has the services started, each as soon as what it needs is ready",
		Creator: Builder, Count: One, Tag: AnyGuest,
		Peers:    []Peer{{Builder, "control"}},
		Lifetime: "until all services are ready", Leaves: true, Reset: Leave,
		Policy: list("bootstrapper", bootstrapperCalls), Memory: goMemory,
	},
	{
		Name: StoreState, Program: "redoubt-store-state", Seed: "XenStore-State",
		Purpose: "contents, sockets, identities and watches of the store; parses nothing a client wrote",
		Creator: Bootstrapper, Count: One, Tag: AnyGuest,
		Peers: []Peer{
			{Builder, "control"},
			{StoreLogic, "one request, one answer"},
			{VTPM, "XenStore's protocol"},
			{Emulator, "XenStore's protocol"},
			{"xenstore clients of root", "XenStore's protocol"},
		},
		Holds:    []string{"its directory", "the listening socket", "a connection a client"},
		Lifetime: "Redoubt's", Reset: OnCrash,
		// The kernel tells a peer's user in terms of the asker's user namespace: in one of its own
		// every caller would be nobody.
		Share: []sandbox.Namespace{sandbox.User}, ShareWhy: "tells root's clients by SO_PEERCRED",
		State: ReadWrite, Policy: list("store-state", stateCalls), Memory: 2 * goMemory,
	},
	{
		Name: StoreLogic, Program: "redoubt-store-logic", Seed: "XenStore-Logic",
		Purpose: "parses one request; sees no contents",
		Creator: StoreState, Count: Several, Tag: AnyGuest, DependsOn: []string{StoreState},
		Peers:    []Peer{{StoreState, "one request, one answer"}},
		Lifetime: "until it is replaced", Reset: AfterAnswer,
		Policy: list("store-logic", logicCalls), Memory: goMemory / 2,
	},
	{
		Name: VTPM, Program: "redoubt-vtpm", Seed: "–",
		Purpose: "vTPM manager: guests' keys, the engines' control channels, the gate's back end, quotes",
		Creator: Bootstrapper, Count: One, Tag: AnyGuest, DependsOn: []string{StoreState},
		Peers: []Peer{
			{Builder, "control"},
			{StoreState, "XenStore's protocol"},
			{SWTPM, "control and data channel"},
			{Emulator, "TPM data channel"},
		},
		Holds:    []string{"its directory", "a data channel a guest", "a control and a data channel an engine"},
		Lifetime: "Redoubt's", Reset: OnTimer,
		State: ReadWrite, Policy: list("vtpm", vtpmCalls), Memory: 2 * goMemory,
	},
	{
		Name: SWTPM, Program: "swtpm", Seed: "–",
		Purpose: "one guest's TPM",
		Creator: VTPM, Count: PerGuest, Tag: OneGuest, DependsOn: []string{VTPM},
		Peers:    []Peer{{VTPM, "control and data channel"}},
		Holds:    []string{"a control channel", "a pipe with its key", "a data channel"},
		Lifetime: "its guest's, over reboots and its manager's ends", Reset: Ends,
		State: ReadWrite, GroupReads: true, Devices: []string{"/dev/null", "/dev/urandom"},
		Packages: packages("swtpm", func() []string { return nil }),
		Policy:   list(SWTPM, []byte("include swtpm")), Memory: 64 * mib,
	},
	{
		Name: Toolstack, Program: "redoubt-toolstack", Seed: "Toolstack",
		Purpose: "outer API, specs and consoles of guests",
		Creator: Bootstrapper, Count: PerTenant, Tag: Tenant, DependsOn: []string{StoreState},
		Peers: []Peer{
			{Builder, "control"},
			{"redoubt (the operator)", "outer API"},
			{Emulator, "console, byte channel"},
			{QEMU, "console, byte channel"},
		},
		Holds:    []string{"its directory", "the listening socket of the API", "a console and a channel a guest", "a console's log a guest, and the pipe before it"},
		Lifetime: "Redoubt's", Reset: OnTimer,
		Share: []sandbox.Namespace{sandbox.User}, ShareWhy: "tells callers by SO_PEERCRED",
		State: ReadWrite, Policy: list("toolstack", toolstackCalls), Memory: 4 * goMemory,
	},
	{
		Name: PCIBack, Program: "redoubt-pciback", Seed: "PCIBack",
		Purpose: "says what a guest's PCI bus looks like: slots, windows of registers, interrupt routes",
		Creator: Builder, Count: PerGuest, Tag: OneGuest,
		Peers:    []Peer{{Builder, "control"}},
		Lifetime: "until its guest's devices have their places", Leaves: true, Reset: Leave,
		Policy: list("pciback", pcibackCalls), Memory: goMemory,
	},
	{
		Name: Inspector, Program: "redoubt-inspector", Seed: "–",
		Purpose: "answers one question about a running guest: from its memory (modules, processes, what was measured, whether the kernel is its image's), or from a snapshot of its disks (what deviates from its baseline)",
		Creator: Toolstack, Count: Several, Tag: OneGuest,
		Peers:    []Peer{{Builder, "control"}},
		Holds:    []string{"its guest's memory and kernel image, or images, snapshots and baseline, to read", "the memory its answer goes into"},
		Lifetime: "until it has answered, or waited a minute for the next question about its guest", Leaves: true, Reset: Leave,
		Policy: list("inspector", inspectorCalls), Memory: 6 * goMemory,
	},
	{
		Name: BlkBack, Program: "redoubt-blkback", Seed: "BlkBack",
		Purpose: "disks of a guest, as vhost-user back ends",
		Creator: Builder, Count: PerGuest, Tag: OneGuest,
		Peers:    []Peer{{Builder, "control"}, {Emulator, "vhost-user"}, {QEMU, "rings and events, passed on by the emulator"}},
		Holds:    []string{"its guest's images, and overlays' bases to read", "maps of what changed, memory of snapshots", "its guest's memory"},
		Lifetime: "its guest's", Reset: OnTimer,
		Policy: list("blkback", blkbackCalls), Memory: goMemory, GuestMemory: true,
	},
	{
		Name: NetBack, Program: "redoubt-netback", Seed: "NetBack",
		Purpose: "network devices of a tenant's guests, as vhost-user back ends; taps, bridges, VLANs and the filter between them",
		Creator: Builder, Count: PerTenant, Tag: Tenant,
		Peers:    []Peer{{Builder, "control"}, {Emulator, "vhost-user"}, {QEMU, "rings and events, passed on by the emulator"}},
		Holds:    []string{"a tap a NIC", "the memory of the tenant's guests with NICs", "/dev/vhost-net, one a NIC, where the host has it"},
		Lifetime: "from its tenant's first guest with a NIC to the tenant's end, or Redoubt's", Reset: OnTimer,
		Network: true, Capabilities: []sandbox.Capability{sandbox.NetAdmin},
		// The Builder has threads and so can enter no user namespace, which is that of a network
		// namespace for good.
		Share: []sandbox.Namespace{sandbox.User}, ShareWhy: "its capability counts only in the user namespace in which the Builder made the network's",
		Policy: list("netback", netbackCalls), Memory: goMemory, GuestMemory: true,
	},
	{
		Name: Emulator, Program: "redoubt-emulator", Seed: "QEMU",
		Purpose: "one guest: the native monitor, or the keeper of its QEMU",
		Creator: Toolstack, Count: PerGuest, Tag: OneGuest, DependsOn: []string{StoreState, VTPM},
		Peers: []Peer{
			{Builder, "control"},
			{StoreState, "XenStore's protocol, as its domain"},
			{VTPM, "TPM data channel"},
			{BlkBack, "vhost-user"},
			{NetBack, "vhost-user"},
			{Toolstack, "console, byte channel"},
			{QEMU, "QMP, TPM, vhost-user"},
		},
		Holds:    []string{"its guest's memory", "/dev/kvm (native)", "kernel, initrd and profiles of modules, sealed", "console, byte channel"},
		Lifetime: "from a start or reboot of its guest to the next", Reset: EachStart,
		Policy: list("emulator", emulatorCalls), Memory: goMemory, GuestMemory: true,
	},
	{
		Name: QEMU, Program: qemu.Program, Seed: "QEMU",
		Purpose: "the machine of a guest that wants a full one",
		Creator: Emulator, Count: PerGuest, Tag: OneGuest, DependsOn: []string{Emulator},
		Peers: []Peer{
			{Emulator, "QMP, TPM, vhost-user"},
			{BlkBack, "rings and events, passed on by the emulator"},
			{NetBack, "rings and events, passed on by the emulator"},
			{Toolstack, "console, byte channel"},
		},
		Holds:    []string{"its guest's memory", "kernel and initrd or firmware, sealed", "console, byte channel"},
		Lifetime: "its emulator's", Reset: EachStart,
		Devices:  []string{"/dev/null"},
		Packages: packages(qemu.Program, qemuFiles), Proc: true,
		Policy: list(QEMU, []byte("include qemu")), Memory: 512 * mib, GuestMemory: true,
	},
}

// qemuFiles are the files of QEMU's packages that a guest of ours may need: firmware, option ROMs
// and the translator, which is a module.
func qemuFiles() []string {
	return append(qemu.DataDirs(), programs.Path("/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"))
}
