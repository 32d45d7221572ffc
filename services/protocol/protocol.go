// Package protocol is what Redoubt's services say to each other: the calls and notices of each
// pair, as bodies of package rpc. A body with Files lists what each descriptor beside it is
// for, in order.
package protocol

import (
	"os"
	"time"

	"redoubt.dev/redoubt/attest"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/tree"
)

// Names of descriptors.
const (
	FileStore    = "store"  // a connection to the store, with the receiver's identity
	FileKVM      = "kvm"    // /dev/kvm
	FileMemory   = "memory" // a memfd: the guest's memory
	FileKernel   = "kernel"
	FileInitrd   = "initrd"
	FileProfile  = "profile"   // the profiles of the guest's modules, where its spec names some
	FileDisk     = "disk"      // an image; one each, in the order of the spec
	FileBase     = "base"      // what an overlay shows where it holds nothing; one for each of the spec's
	FileChanges  = "changes"   // the map of a disk's changes, see block.Changes; one for each that can be written
	FileSnapshot = "snapshot"  // a disk's snapshot, see block.Snapshot; one for each that can be written
	FileStopped  = "stopped"   // a pipe from a guest's emulator to its BlkBack: a byte, once the guest stands still for a snapshot
	FileBegun    = "begun"     // and back: a byte, once the snapshot is begun, or not because of requests in flight
	FileBaseline = "baseline"  // a guest's baseline
	FileRules    = "rules"     // what of a guest's disks its baseline has, see baseline.ParseRules
	FileIndex    = "index"     // what an inspector found on the disks last time, see scan.Index
	FileNewIndex = "new-index" // and where it puts what it finds now
	FileLast     = "last"      // what deviated last time, see baseline.Comparison
	FileSeen     = "seen"      // what a guest shows of its files, see crossview.Parse
	FileBlock    = "block"     // a vhost-user connection between a disk's front and back end
	FileNetwork  = "network"   // a vhost-user connection between a NIC's front and back end
	FileTun      = "tun"       // /dev/net/tun, opened in the network namespace, for one NIC
	FileVhostNet = "vhost-net" // /dev/vhost-net, where the host has it, for one NIC
	FileDoor     = "door"      // QEMU's way to a relay's listener, see vhostuser.Door; one a NIC
	FileEntrance = "entrance"  // that listener
	FileConsole  = "console"
	FileChannel  = "channel"  // the host's end of the guest's byte channel
	FileTPM      = "tpm"      // the TPM data channel
	FileCode     = "code"     // the firmware image, for OVMF
	FileHostTPM  = "host-tpm" // the host's TPM, open
	FileVars     = "vars"     // the guest's own variable store, for OVMF
	FileJournal  = "journal"  // what a vTPM's manager leaves to the next one
	FileAnswer   = "answer"   // a memfd that a long answer is written into
	FileControl  = "control"  // the manager's ends of an engine's channels
	FileData     = "data"
	FileLifeline = "lifeline" // and of its lifeline and its output (package foreign)
	FileOutput   = "output"
)

// Files names the descriptors beside a message.
type Files []string

// Take returns the descriptors by name; those of the same name in order. It closes all and
// fails where names and descriptors do not match.
func (names Files) Take(r *rpc.Request) (map[string][]*os.File, error) {
	if len(names) != len(r.Files) {
		for _, f := range r.Files {
			f.Close()
		}
		return nil, rpc.Errorf(rpc.Invalid, "%s: %d descriptors, %d names", r.Method, len(r.Files), len(names))
	}
	m := map[string][]*os.File{}
	for i, n := range names {
		m[n] = append(m[n], r.Files[i])
	}
	return m, nil
}

// Configure is the Builder's first call to a service.
const MethodConfigure = "configure"

// ConfigureVTPM configures the vTPM service. Files: FileStore, and FileHostTPM where there is one.
type ConfigureVTPM struct {
	StateDir string `json:"stateDir"`
	HostTPM  string `json:"hostTPM,omitempty"` // its name, for messages
	Files    Files  `json:"files"`
}

// ConfigureToolstack configures the toolstack, which then adopts guests and serves when it is told.
type ConfigureToolstack struct {
	Tenant   string `json:"tenant"`
	StateDir string `json:"stateDir"`
	// Operators may do everything, as root may; Viewers may look. Nobody else may do anything.
	Operators []uint32 `json:"operators,omitempty"`
	Viewers   []uint32 `json:"viewers,omitempty"`
}

// MethodServe has a toolstack serve its API: it knows all guests that run. Descriptor: the listening
// socket.
const MethodServe = "serve" // nothing → nothing

// MethodAdopt gives a toolstack a guest that runs already. Descriptors: the toolstack's ends of its
// console and its byte channel, the console's log, the pipe before it (its ends to read and to write).
const MethodAdopt = "adopt" // Adopt → nothing

// Adopt is a guest that an earlier toolstack of the tenant started.
type Adopt struct {
	UUID     string        `json:"uuid"`
	Domain   tree.Domain   `json:"domain"`
	Emulator spec.Emulator `json:"emulator"`
	Stopping bool          `json:"stopping"`
	Events   []Event       `json:"events"`
}

// NoticeDenied tells the Builder of a caller whom the toolstack turned away.
const NoticeDenied = "denied" // Denied

// Denied is such a call.
type Denied struct {
	Method string `json:"method"`
	Caller Caller `json:"caller"`
}

// Builder → who has a connection to the store, the vTPM service and each emulator, when the store
// has died and was started again.
const (
	MethodStore     = "store"      // Store → nothing, when the new connection is in use
	NoticeStoreLost = "store-lost" // nothing: no other connection will come; for the vTPM service
)

// Store is a connection in place of one that has ended. Files: FileStore.
type Store struct {
	Files Files `json:"files"`
}

// MethodBoot is the Builder's only call to the Bootstrapper.
const MethodBoot = "boot" // Boot → nothing: all services are ready

// Boot lists the services.
type Boot struct {
	Services []Bootable `json:"services"`
}

// Bootable is a service and what must be ready before it.
type Bootable struct {
	Name  string   `json:"name"`
	Needs []string `json:"needs,omitempty"`
}

// MethodStartService is the Bootstrapper's only call to the Builder.
const MethodStartService = "start-service" // StartService → nothing: it is ready

// StartService names the service.
type StartService struct {
	Name string `json:"name"`
}

// Toolstack → Builder.
const (
	MethodBuild    = "build"    // Build → Built
	MethodStop     = "stop"     // Stop → nothing, when the guest is down
	MethodDestroy  = "destroy"  // Destroy → nothing
	MethodQuote    = "quote"    // Quote → Quoted
	MethodActivate = "activate" // Activate → Activated
	// MethodInspect reads a running guest's memory. Descriptor of the answer: a memfd with it.
	MethodInspect = "inspect" // Inspect → Answered
	// MethodModules has a running guest's emulator say what the guest's modules have done. Descriptor of the answer: a memfd
	// with it, JSON of isolate.Report.
	MethodModules = "modules" // Modules → Answered
	// MethodOpen opens a file of a spec. Descriptor of the answer: the file.
	MethodOpen = "open" // Open → nothing
	// MethodVars opens the template of OVMF's variable store. Descriptor of the answer: the file.
	MethodVars = "vars" // nothing → nothing
	// MethodAttachConsole says that a caller attaches to a console.
	MethodAttachConsole = "attach-console" // AttachConsole → nothing: it may
)

// Open names a file.
type Open struct {
	Field string `json:"field"` // of the spec, for messages
	Path  string `json:"path"`  // absolute, beneath the tenant's pool, without links
	Write bool   `json:"write,omitempty"`
}

// Caller is who asked the toolstack, by the credentials of the API's connection.
type Caller struct {
	UID uint32 `json:"uid"`
	PID int    `json:"pid"` // 0: not to be seen from the toolstack's sandbox
}

// AttachConsole says that a caller attaches to a guest's console, or to its byte channel.
type AttachConsole struct {
	UUID    string `json:"uuid"`
	Name    string `json:"name"`
	Channel bool   `json:"channel,omitempty"`
	Caller  Caller `json:"caller"`
}

// Build asks for a guest. Files: FileKernel, FileInitrd, FileProfile, FileVars, FileDisk…, FileBase…. Descriptors
// of the answer: as with MethodAdopt.
type Build struct {
	UUID    string     `json:"uuid"`
	Spec    spec.Guest `json:"spec"`
	Options Options    `json:"options"`
	Caller  Caller     `json:"caller"`
	Files   Files      `json:"files"`
}

// Options of one start, all for comparison and tests only.
type Options struct {
	NoGate    bool          `json:"noGate,omitempty"`
	VTPMFirst bool          `json:"vtpmFirst,omitempty"`
	VTPMDelay time.Duration `json:"vtpmDelay,omitempty"`
	Poll      time.Duration `json:"poll,omitempty"`
}

// Built is the answer: the guest's kernel is about to run.
type Built struct {
	UUID     string        `json:"uuid"`
	Domain   tree.Domain   `json:"domain"`
	Emulator spec.Emulator `json:"emulator"`
}

// Stop asks for a guest's end.
type Stop struct {
	UUID   string        `json:"uuid"`
	Name   string        `json:"name"`
	Grace  time.Duration `json:"grace"` // after the power button; 0: at once
	Caller Caller        `json:"caller"`
}

// Destroy asks that the vTPM of a guest that is down be destroyed for ever.
type Destroy struct {
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Caller Caller `json:"caller"`
}

// Quote asks for evidence of a running guest.
type Quote struct {
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Nonce  []byte `json:"nonce"`
	Caller Caller `json:"caller"`
}

// Quoted carries it.
type Quoted struct {
	Evidence attest.Evidence `json:"evidence"`
}

// Activate asks the guest's vTPM to open a credential (TPM 2.0 Part 3 §12.5).
type Activate struct {
	UUID           string `json:"uuid"`
	Name           string `json:"name"`
	CredentialBlob []byte `json:"credentialBlob"`
	Secret         []byte `json:"secret"`
	Caller         Caller `json:"caller"`
}

// Activated carries what was in it.
type Activated struct {
	Secret []byte `json:"secret"`
}

// Notices to the toolstack; those of the vTPM service and the emulator pass through the
// Builder.
const (
	NoticeEvent = "event" // Event
	NoticeEnded = "ended" // Ended
)

// Kinds of events, the timeline of a start.
const (
	EventRequested     = "requested"        // the operator's request was accepted
	EventKernelStarted = "kernel-started"   // the first instruction of the guest runs
	EventVTPMAsked     = "vtpm-asked"       // the vTPM manager was told to create the device
	EventVTPMStarted   = "vtpm-started"     // the engine answered INIT
	EventVTPMReady     = "vtpm-ready"       // the gate opened
	EventFirstAccess   = "tpm-first-access" // the guest's driver touched the TPM
	EventGateWait      = "gate-wait"        // its first command began to wait
	EventGateWaited    = "gate-waited"      // and ended waiting
	EventPaused        = "paused"           // the wait was long: guest and clock stopped
	EventIMA           = "ima"              // boot_aggregate was measured into PCR 10
	EventInit          = "init"             // the kernel started the first program
	EventReboot        = "reboot"           // the guest asked for a reboot: a new emulator process
	EventStorage       = "storage"          // the guest's BlkBack was replaced
	EventNetwork       = "network"          // NetBack was replaced
	EventVTPM          = "vtpm"             // what the manager has to say of it
	EventModule        = "module"           // of its kernel: loaded, gone, or did what was refused or noted
	EventManufactured  = "manufactured"     // keys and certificate are there: the guest can be attested
	EventHeld          = "held"             // its processors and its clock stand still, by whom the text says
	EventResumed       = "resumed"          // they go on
	EventValidation    = "validation"       // what a validation found, and what followed
	EventEnded         = "ended"
)

// Event is one moment of a guest's life.
type Event struct {
	UUID string    `json:"uuid"`
	Kind string    `json:"kind"`
	Text string    `json:"text,omitempty"`
	Time time.Time `json:"time"`
	// Instance and EKSHA256 come with EventManufactured and EventVTPMStarted.
	Instance int    `json:"instance,omitempty"`
	EKSHA256 string `json:"ekSHA256,omitempty"`
	// Number is the event's place among those that [Adopt] tells of this start, from 1 on; 0: it is not among them.
	Number int `json:"number,omitempty"`
}

// Ended says that a guest is down.
type Ended struct {
	UUID    string  `json:"uuid"`
	Outcome Outcome `json:"outcome"`
	Reason  string  `json:"reason"`
}

// Outcome is how an emulator process ended.
type Outcome string

const (
	PowerOff Outcome = "power-off"
	Reboot   Outcome = "reboot"
	Stopped  Outcome = "stopped" // ended by us, at the operator's request
	Crashed  Outcome = "crashed" // everything else: triple fault, vTPM lost, emulator died
)

// Builder → emulator.
const (
	MethodStart       = "start"        // Start → nothing, when the vCPUs are about to run
	MethodPowerButton = "power-button" // nothing
	MethodEnd         = "end"          // nothing
	MethodReadLog     = "read-log"     // nothing → GuestLog
	MethodReport      = "report"       // Report → Answered: what the guest's modules have done, JSON of isolate.Report
	MethodDisk        = "disk"         // Disk → nothing, when the back end serves the guest
	MethodNIC         = "nic"          // NIC → nothing, when the back end serves the guest
)

// NoticeVTPMLost tells an emulator that the manager of its guest's vTPM is gone and another one is
// started.
const NoticeVTPMLost = "vtpm-lost" // nothing

// NoticeResumed tells an emulator that another Builder has taken the last one's place: what was asked and
// not answered is to be asked again.
const NoticeResumed = "resumed" // nothing

// Emulator → Builder.
const (
	// MethodOutcome is the emulator's last word, which it repeats to a Builder that follows one that died.
	MethodOutcome = "outcome" // Exit → nothing: it is known for good
	// MethodBackEnd asks, before the guest runs, for another connection of a device, in place of one whose
	// back end ended before it could be used. Descriptor of the answer: the front end's.
	MethodBackEnd = "back-end" // BackEnd → nothing
)

// NoticeExits tells the Builder how often the guest's processors have left it.
const NoticeExits = "exits" // Exits

// Exits is a number of exits since the emulator's start.
type Exits struct {
	Count uint64 `json:"count"`
}

// BackEnd names a device: a topology.Disk or a topology.NIC.
type BackEnd struct {
	Kind  topology.Kind `json:"kind"`
	Index int           `json:"index"`
}

// Start is all an emulator learns. Files: FileMemory, FileStore, FileConsole, FileChannel, and as the guest
// has them FileKVM, FileKernel, FileInitrd, FileProfile, FileTPM, FileBlock…, FileNetwork…, and for
// QEMU a FileDoor and a FileEntrance for each of the latter.
type Start struct {
	Name       string        `json:"name"`
	Emulator   spec.Emulator `json:"emulator"` // native or qemu
	Domain     tree.Domain   `json:"domain"`
	CPUs       int           `json:"cpus"`
	Memory     uint64        `json:"memory"`
	Cmdline    string        `json:"cmdline"`
	Firmware   spec.Firmware `json:"firmware"`
	PauseAfter time.Duration `json:"pauseAfter"` // wait at the gate before guest and clock stop
	KVM        bool          `json:"kvm"`        // QEMU only: the guest runs on /dev/kvm
	Modules    *spec.Modules `json:"modules,omitempty"`
	Exits      uint64        `json:"exits,omitempty"`  // of one of its processors, after which NoticeExits is given; native only. 0: never
	Status     uint64        `json:"status,omitempty"` // address of the guest's word that a write is in progress, see Held; 0: none
	// PCI is the bus to build, exactly: one that overlaps or is not for these devices is refused.
	PCI   topology.Topology `json:"pci"`
	Files Files             `json:"files"`
}

// Report asks for a long answer. Files: FileAnswer.
type Report struct {
	Files Files `json:"files"`
}

// MethodAssign is the Builder's only call to a PCIBack, which leaves once it has answered.
const MethodAssign = "assign" // topology.Request → topology.Topology

// Disk is a front end's way to a new back end of one of its disks, after the last one's end.
// Files: FileBlock.
type Disk struct {
	Index int   `json:"index"`
	Files Files `json:"files"`
}

// Builder → BlkBack.
const MethodAttachDisk = "attach-disk" // AttachDisk → nothing: the front end may come

// BlkBack → Builder.
const (
	NoticeDiskFailed = "disk-failed" // DiskFailed
	NoticeWritten    = "written"     // Written
)

// Written says how much was written to a disk since this BlkBack has it, in bytes.
type Written struct {
	Index int    `json:"index"`
	Bytes uint64 `json:"bytes"`
}

// AttachDisk makes BlkBack serve a disk to an emulator, in place of the last one that used it.
// Files: FileDisk, FileMemory, FileBlock, FileBase where the disk is an overlay, FileChanges where it can be written, and
// FileSnapshot while there is one, of Scratch bytes. No other memory is mapped for this disk.
type AttachDisk struct {
	Index    int         `json:"index"`
	ReadOnly bool        `json:"readOnly"`
	Domain   tree.Domain `json:"domain"`
	Scratch  int64       `json:"scratch,omitempty"`
	Written  uint64      `json:"written,omitempty"` // bytes after which NoticeWritten is given, again and again; 0: never
	Dropped  bool        `json:"dropped,omitempty"` // see MethodDropDisks
	Files    Files       `json:"files"`
}

// MethodDropDisks has BlkBack answer all requests of all disks with an I/O error, or serve them again. When it is answered
// nothing is under way that was asked for before.
const MethodDropDisks = "drop-disks" // DropDisks → nothing

// DropDisks says which of the two.
type DropDisks struct {
	Dropped bool `json:"dropped"`
}

// DiskFailed says that an emulator broke the rules of a disk's protocol, or the image failed.
type DiskFailed struct {
	Index  int         `json:"index"`
	Domain tree.Domain `json:"domain"`
	Reason string      `json:"reason"`
}

// NIC is a front end's way to a new back end of one of its NICs, after the last one's end.
// Files: FileNetwork.
type NIC struct {
	Index int   `json:"index"`
	Files Files `json:"files"`
}

// Builder → NetBack.
const (
	MethodNetwork   = "network"    // network.Config → nothing: that is the network from now on
	MethodAttachNIC = "attach-nic" // AttachNIC → nothing: the front end may come
	MethodDetachNIC = "detach-nic" // DetachNIC → nothing, when its guest is served no more
)

// NetBack → Builder.
const NoticeNICFailed = "nic-failed" // NICFailed

// AttachNIC makes NetBack serve a NIC of its network to an emulator, in place of the last one that
// used it. Files: FileTun, FileMemory, FileNetwork, and FileVhostNet where the host's kernel is
// to move the packets. No other memory is mapped for this NIC.
type AttachNIC struct {
	ID     int         `json:"id"` // of the network's configuration
	MTU    uint16      `json:"mtu"`
	Domain tree.Domain `json:"domain"`
	Files  Files       `json:"files"`
}

// DetachNIC ends serving a NIC.
type DetachNIC struct {
	ID int `json:"id"`
}

// NICFailed says that an emulator broke the rules of a NIC's protocol, or that its tap failed.
type NICFailed struct {
	ID     int         `json:"id"`
	Domain tree.Domain `json:"domain"`
	Reason string      `json:"reason"`
}

// GuestLog is the event log that a guest's firmware wrote.
type GuestLog struct {
	Log []byte `json:"log"`
}

// Exit is an emulator's outcome.
type Exit struct {
	Outcome Outcome `json:"outcome"`
	Reason  string  `json:"reason"`
}
