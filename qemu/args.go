package qemu

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/programs"
)

// Firmware is what the guest's first instruction belongs to.
type Firmware string

// The kinds of start.
const (
	// Direct boots a kernel and an initrd through qboot, which measures nothing: the
	// measurements are the Builder's.
	Direct Firmware = ""
	// SeaBIOS boots a disk; with a TPM it measures, and its boot menu (key ESC) has the TPM
	// menu behind the key t, on the serial console.
	SeaBIOS Firmware = "seabios"
	// OVMF boots a disk through UEFI, from a code image and a variable store of the guest's own.
	OVMF Firmware = "ovmf"
)

// TPMDevice is the guest's view of its TPM.
type TPMDevice string

// The TPM devices.
const (
	CRB   TPMDevice = "tpm-crb" // the default
	TIS   TPMDevice = "tpm-tis"
	NoTPM TPMDevice = "none"
)

// Limits of a machine.
const (
	MinMemory = 32 << 20 // bytes
	MaxMemory = 1 << 40
	MaxCPUs   = 64
	MaxDisks  = 16
	MaxNICs   = 8
	// MaxCommandLine is the longest kernel command line of x86 (COMMAND_LINE_SIZE), with its
	// final zero byte.
	MaxCommandLine = 2048
)

// A Config describes a machine without naming any object of the host.
type Config struct {
	Name        string        // of the guest; QEMU shows it in its process title
	Memory      uint64        // bytes, a multiple of 2 MiB
	CPUs        int           //
	Accel       Accel         // "": TCG
	Firmware    Firmware      //
	CommandLine string        // of the kernel; Direct only
	BootMenu    time.Duration // how long firmware offers its boot menu; 0: not at all
	TPM         TPMDevice     // "": CRB

	// PCI is where each device is: Args refuses one that is not for just the devices there are. nil:
	// where QEMU puts them (a peer in a benchmark).
	PCI *topology.Topology

	Starter programs.Starter // of QEMU; nil: as a child. It makes no difference to the guest
}

// FDs are the descriptors of a machine, numbered as QEMU sees them; 0 means absent.
type FDs struct {
	RAM     int            // a memfd of Config.Memory bytes
	Kernel  int            // Direct only
	Initrd  int            // Direct only; may be absent
	Code    int            // OVMF only: the code image
	Vars    int            // OVMF only: the guest's variable store, read-write
	QMP     int            // a connected stream socket
	Rein    [reinConns]int // more of QMP, see rein; 0: none
	TPM     int            // a connected stream socket: the TPM's control channel
	Console int            // a connected stream socket: the first serial port; may be absent
	Channel int            // a connected stream socket: the virtio port [ChannelName]; may be absent
	Disks   []DiskFD
	NICs    []NICFD
}

// A DiskFD is one raw disk image. The descriptor's access mode must agree with ReadOnly.
// With Socket, the disk is a vhost-user back end at the other end of it.
type DiskFD struct {
	FD       int
	ReadOnly bool
	Socket   int
}

// A NICFD is a network device: a vhost-user back end behind the descriptor of a Unix socket's file,
// opened O_PATH.
type NICFD struct {
	Door int
	MAC  [6]byte
}

// ChannelName is the name of the host–guest byte channel: /dev/virtio-ports/redoubt.0.
const ChannelName = "redoubt.0"

// Args is QEMU's command line, without the program's name. dataDirs are where QEMU finds its
// own files (option ROMs, SeaBIOS, qboot); none means its built-in ones.
//
// The machine is q35 with nothing that is not named here. Its RAM is the shared memfd, so that
// the host can read it. A guest reset ends the process (-action reboot=shutdown). Sleep states
// are off: a sleeping guest has no TPM state that anybody vouches for.
func Args(c Config, fd FDs, dataDirs ...string) ([]string, error) {
	if err := c.check(fd); err != nil {
		return nil, err
	}
	if c.PCI != nil {
		if err := c.PCI.Holds(c.devices(fd)); err != nil {
			return nil, fmt.Errorf("guest %q: %w", c.Name, err)
		}
	}
	var a []string
	add := func(s ...string) { a = append(a, s...) }
	for _, d := range dataDirs {
		add("-L", d)
	}
	add("-name", "guest="+escape(c.Name))
	add("-nodefaults", "-no-user-config", "-display", "none")
	add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	add("-action", "reboot=shutdown,shutdown=poweroff")

	machine := "q35,graphics=off,usb=off,vmport=off,memory-backend=ram"
	if c.Firmware == OVMF {
		machine += ",pflash0=code,pflash1=vars"
	}
	add("-machine", machine)
	if c.Accel == KVM {
		add("-accel", "kvm", "-cpu", "host")
	} else {
		// Five-level page walks cost time under emulation and nobody needs them. Linux 6.12
		// uses cmpxchg16b wherever the CPU offers it; with it, guests of several processors
		// died of stray traps in about half of their boots under QEMU 7.2, whichever the threads.
		add("-accel", "tcg,thread="+c.threads(), "-cpu", "max,la57=off,cx16=off")
	}
	add("-smp", strconv.Itoa(c.CPUs))
	add("-m", fmt.Sprintf("%dM", c.Memory>>20))
	add("-object", fmt.Sprintf("memory-backend-file,id=ram,size=%d,mem-path=/proc/self/fd/%d,share=on,prealloc=off", c.Memory, fd.RAM))
	add("-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1")

	for _, c := range []struct {
		id string
		fd int
	}{{"qmp", fd.QMP}, {"stop", fd.Rein[reinStop]}, {"cont", fd.Rein[reinCont]}, {"look", fd.Rein[reinLook]}} {
		if c.fd != 0 {
			add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", c.id, c.fd), "-mon", "chardev="+c.id+",mode=control")
		}
	}
	if fd.Console != 0 {
		add("-chardev", fmt.Sprintf("socket,id=console,fd=%d", fd.Console), "-serial", "chardev:console")
	}
	add("-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng,disable-legacy=on,romfile="+c.place(topology.RNG, 0))
	if fd.Channel != 0 {
		add("-device", "virtio-serial-pci,disable-legacy=on,max_ports=2,romfile="+c.place(topology.Channel, 0))
		add("-chardev", fmt.Sprintf("socket,id=channel,fd=%d", fd.Channel))
		add("-device", "virtserialport,chardev=channel,name="+ChannelName)
	}
	if dev := c.tpm(); dev != NoTPM {
		add("-chardev", fmt.Sprintf("socket,id=tpm,fd=%d", fd.TPM))
		add("-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", string(dev)+",tpmdev=tpm")
	}
	for i, d := range fd.Disks {
		if d.Socket != 0 {
			add("-chardev", fmt.Sprintf("socket,id=disk%d,fd=%d", i, d.Socket))
			add("-device", fmt.Sprintf("vhost-user-blk-pci,chardev=disk%d,num-queues=1,queue-size=256,disable-legacy=on,romfile=%s%s", i, bootIndex(c, i), c.place(topology.Disk, i)))
			continue
		}
		mode := "read-only=off,discard=unmap"
		if d.ReadOnly {
			mode = "read-only=on"
		}
		// A descriptor set, not a path: QEMU duplicates the descriptor, and with it the lock
		// that whoever opened the image holds on it.
		add("-add-fd", fmt.Sprintf("fd=%d,set=%d", d.FD, diskSet+i))
		add("-blockdev", fmt.Sprintf("driver=raw,node-name=disk%d,%s,file.driver=file,file.filename=/dev/fdset/%d", i, mode, diskSet+i))
		add("-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,serial=disk%d,disable-legacy=on,romfile=%s%s", i, i, bootIndex(c, i), c.place(topology.Disk, i)))
	}
	for i, n := range fd.NICs {
		// Not by fd=: QEMU 7.2's network devices refuse a connected socket ("does not support FD
		// passing").
		add("-chardev", fmt.Sprintf("socket,id=nic%d,path=/proc/self/fd/%d", i, n.Door))
		add("-netdev", fmt.Sprintf("vhost-user,id=nic%d,chardev=nic%d", i, i))
		// No ctrl_guest_offloads: QEMU 7.2 answers the guest that wants segments no more, but tells no
		// vhost-user back end of it.
		dev := fmt.Sprintf("virtio-net-pci,netdev=nic%d,mac=%s,rx_queue_size=256,tx_queue_size=256,ctrl_guest_offloads=off,disable-legacy=on,romfile=", i, net.HardwareAddr(n.MAC[:]))
		if c.PCI != nil {
			dev += c.place(topology.NIC, i)
		} else if !c.nicMSIX() {
			// Without KVM's interrupt routes QEMU 7.2's vhost-user-net crashes as soon as the guest
			// uses MSI-X.
			dev += ",vectors=0"
		}
		add("-device", dev)
	}
	return append(a, c.boot(fd)...), nil
}

// Descriptor sets: OVMF's two, then the disks'.
const (
	codeSet = 1
	varsSet = 2
	diskSet = 3
)

func (c Config) boot(fd FDs) []string {
	var a []string
	switch c.Firmware {
	case Direct:
		a = append(a, "-bios", "qboot.rom", "-kernel", fmt.Sprintf("/proc/self/fd/%d", fd.Kernel), "-append", c.CommandLine)
		if fd.Initrd != 0 {
			a = append(a, "-initrd", fmt.Sprintf("/proc/self/fd/%d", fd.Initrd))
		}
	case SeaBIOS:
		a = append(a, "-bios", "bios-256k.bin")
	case OVMF:
		a = append(a,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd.Code, codeSet),
			"-blockdev", fmt.Sprintf("driver=raw,node-name=code,read-only=on,file.driver=file,file.filename=/dev/fdset/%d", codeSet),
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd.Vars, varsSet),
			"-blockdev", fmt.Sprintf("driver=raw,node-name=vars,read-only=off,file.driver=file,file.filename=/dev/fdset/%d", varsSet))
	}
	if c.Firmware != Direct && c.BootMenu > 0 {
		a = append(a, "-boot", fmt.Sprintf("menu=on,splash-time=%d", c.BootMenu.Milliseconds()))
	}
	return a
}

// nicMSIX says whether NICs can have MSI-X.
func (c Config) nicMSIX() bool { return c.Accel == KVM }

// devices are those of the machine, and what each needs.
func (c Config) devices(fd FDs) topology.Request {
	r := topology.Guest(topology.QEMU, len(fd.Disks), len(fd.NICs), c.nicMSIX())
	if fd.Channel == 0 {
		r.Devices = slices.DeleteFunc(r.Devices, func(d topology.Devices) bool { return d.Kind == topology.Channel })
	}
	return r
}

// place is where a device is, as the end of its -device option.
func (c Config) place(kind topology.Kind, i int) string {
	if c.PCI == nil {
		return ""
	}
	p, _ := c.PCI.Find(kind, i) // there is one: Args has looked
	return fmt.Sprintf(",bus=pcie.0,addr=%#x,vectors=%d", p.Slot, p.Vectors)
}

func bootIndex(c Config, i int) string {
	if c.Firmware == Direct {
		return ""
	}
	return fmt.Sprintf(",bootindex=%d", i)
}

func (c Config) tpm() TPMDevice {
	if c.TPM == "" {
		return CRB
	}
	return c.TPM
}

// escape doubles commas, as QEMU's option parser wants them.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func (c Config) check(fd FDs) error {
	bad := func(field, reason string, a ...any) error {
		return fmt.Errorf("guest %q: %s: %s", c.Name, field, fmt.Sprintf(reason, a...))
	}
	if c.Name == "" || strings.ContainsAny(c.Name, "\x00\n") {
		return bad("name", "must be one line of text")
	}
	if c.Memory < MinMemory || c.Memory > MaxMemory || c.Memory%(2<<20) != 0 {
		return bad("memory", "%d bytes: must be %d MiB to %d MiB in steps of 2 MiB", c.Memory, MinMemory>>20, MaxMemory>>20)
	}
	if c.CPUs < 1 || c.CPUs > MaxCPUs {
		return bad("cpus", "%d: must be 1 to %d", c.CPUs, MaxCPUs)
	}
	switch c.Accel {
	case "", KVM, TCG:
	default:
		return bad("accel", "%q: must be kvm or tcg", c.Accel)
	}
	switch c.tpm() {
	case CRB, TIS:
		if fd.TPM == 0 {
			return bad("tpm", "no control socket was given")
		}
	case NoTPM:
	default:
		return bad("tpm", "%q: must be tpm-crb, tpm-tis or none", c.TPM)
	}
	if fd.RAM == 0 || fd.QMP == 0 {
		return bad("descriptors", "memory and QMP are required")
	}
	if len(fd.Disks) > MaxDisks {
		return bad("disks", "%d: at most %d", len(fd.Disks), MaxDisks)
	}
	for i, d := range fd.Disks {
		if d.FD == 0 && d.Socket == 0 {
			return bad("disks", "disk %d has no descriptor", i)
		}
	}
	if len(fd.NICs) > MaxNICs {
		return bad("nics", "%d: at most %d", len(fd.NICs), MaxNICs)
	}
	for i, n := range fd.NICs {
		if n.Door == 0 {
			return bad("nics", "NIC %d has no descriptor", i)
		}
	}
	switch c.Firmware {
	case Direct:
		if fd.Kernel == 0 {
			return bad("kernel", "required without firmware")
		}
		if len(c.CommandLine) >= MaxCommandLine || strings.ContainsRune(c.CommandLine, 0) {
			return bad("command line", "%d bytes: at most %d and no zero byte", len(c.CommandLine), MaxCommandLine-1)
		}
		return nil
	case SeaBIOS:
	case OVMF:
		if fd.Code == 0 || fd.Vars == 0 {
			return bad("firmware", "ovmf needs its code image and a variable store")
		}
	default:
		return bad("firmware", "%q: must be seabios or ovmf", c.Firmware)
	}
	if fd.Kernel != 0 || fd.Initrd != 0 || c.CommandLine != "" {
		return bad("kernel", "firmware boots a disk: give no kernel, initrd or command line, or no firmware")
	}
	if c.BootMenu < 0 || c.BootMenu > 60*time.Second {
		return bad("boot menu", "%v: must be 0 to 60 s", c.BootMenu)
	}
	return nil
}

// threads is how software emulation runs the guest's processors. One thread takes turns with them:
// QEMU before 8.1 (Debian 12 has 7.2) may translate a page that another processor's thread is about
// to write and keep the translation (mended by its commit deba78709a, "accel/tcg: Always lock pages
// before translation"). Linux rewrites its own code while it runs (static keys, through int3), so its
// guests died of "Oops: int3" or hung; that a newer QEMU could use a thread each is given up for it.
func (c Config) threads() string {
	if c.CPUs > 1 {
		return "single"
	}
	return "multi"
}
