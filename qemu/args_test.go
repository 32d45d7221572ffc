package qemu

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/pci/topology"
)

func good() (Config, FDs) {
	return Config{Name: "a,b", Memory: 256 << 20, CPUs: 2, CommandLine: "console=ttyS0 a,b=c"},
		FDs{
			RAM: 3, QMP: 4, TPM: 5, Kernel: 6, Initrd: 7, Console: 8, Channel: 9, Disks: []DiskFD{{FD: 10}, {FD: 11, ReadOnly: true}, {Socket: 12}},
			NICs: []NICFD{{Door: 14, MAC: [6]byte{2, 0, 0, 0, 0, 10}}},
		}
}

func TestArgs(t *testing.T) {
	c, fd := good()
	a, err := Args(c, fd, "/data")
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(a, " ")
	for _, want := range []string{
		"-L /data -name guest=a,,b -nodefaults -no-user-config",
		"spawn=deny", "reboot=shutdown", "-accel tcg,thread=single", "-smp 2 -m 256M",
		"size=268435456,mem-path=/proc/self/fd/3,share=on",
		"socket,id=qmp,fd=4", "socket,id=tpm,fd=5", "-device tpm-crb,tpmdev=tpm",
		"-bios qboot.rom -kernel /proc/self/fd/6 -append console=ttyS0 a,b=c -initrd /proc/self/fd/7",
		"socket,id=console,fd=8", "socket,id=channel,fd=9", "name=redoubt.0",
		"fd=10,set=3", "node-name=disk0,read-only=off", "fd=11,set=4", "node-name=disk1,read-only=on",
		"socket,id=nic0,path=/proc/self/fd/14", "vhost-user,id=nic0,chardev=nic0", "netdev=nic0,mac=02:00:00:00:00:0a", "ctrl_guest_offloads=off", "romfile=,vectors=0",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in\n%s", want, line)
		}
	}
	c.Accel, c.TPM = KVM, TIS
	a, err = Args(c, fd)
	if err != nil || !slices.Contains(a, "host") || !slices.Contains(a, "tpm-tis,tpmdev=tpm") || slices.Contains(a, "-L") {
		t.Errorf("%v, %q", err, a)
	}
	c.TPM, fd.TPM, c.Firmware, c.CommandLine, fd.Kernel, fd.Initrd = NoTPM, 0, OVMF, "", 0, 0
	c.BootMenu, fd.Code, fd.Vars = 2*time.Second, 12, 13
	a, err = Args(c, fd)
	line = strings.Join(a, " ")
	if err != nil || strings.Contains(line, "tpm") || !strings.Contains(line, "pflash0=code,pflash1=vars") ||
		!strings.Contains(line, "fd=12,set=1") || !strings.Contains(line, "menu=on,splash-time=2000") || !strings.Contains(line, "bootindex=1") {
		t.Errorf("%v, %s", err, line)
	}
}

// Each device is where the topology says, under a machine that has just these devices.
func TestArgsPlaces(t *testing.T) {
	c, fd := good()
	top, err := topology.Assign(topology.Guest(topology.QEMU, 3, 1, false))
	if err != nil {
		t.Fatal(err)
	}
	c.PCI = &top
	a, err := Args(c, fd)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(a, " ")
	for _, want := range []string{
		"virtio-rng-pci,rng=rng,disable-legacy=on,romfile=,bus=pcie.0,addr=0x1,vectors=2 ",
		"virtio-serial-pci,disable-legacy=on,max_ports=2,romfile=,bus=pcie.0,addr=0x2,vectors=5 ",
		"romfile=,bus=pcie.0,addr=0x3,vectors=2 ", "romfile=,bus=pcie.0,addr=0x4,vectors=2 ", "romfile=,bus=pcie.0,addr=0x5,vectors=2 ",
		"romfile=,bus=pcie.0,addr=0x13,vectors=0 ",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in\n%s", want, line)
		}
	}
	if strings.Count(line, "-pci,") != strings.Count(line, ",addr=") {
		t.Errorf("a device without a place in\n%s", line)
	}
	for want, change := range map[string]func(*Config, *FDs){
		"has no place":        func(_ *Config, f *FDs) { f.Disks = append(f.Disks, DiskFD{FD: 20}) },
		"2 places without":    func(_ *Config, f *FDs) { f.Channel, f.NICs = 0, nil },
		"0 vectors and needs": func(c *Config, _ *FDs) { c.Accel = KVM },
		"overlap: slot 3":     func(c *Config, _ *FDs) { c.PCI.Places[3].Slot = 3 },
		"for machine native":  func(c *Config, _ *FDs) { *c.PCI, _ = topology.Assign(topology.Guest(topology.Native, 3, 1, false)) },
		"firmware places":     func(c *Config, _ *FDs) { c.PCI.Places[0].BAR = 4096 },
	} {
		c, fd := good()
		other := topology.Topology{Machine: top.Machine, Places: slices.Clone(top.Places)}
		c.PCI = &other
		change(&c, &fd)
		if _, err := Args(c, fd); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

func TestArgsRefused(t *testing.T) {
	for want, change := range map[string]func(*Config, *FDs){
		"name":              func(c *Config, _ *FDs) { c.Name = "" },
		"one line":          func(c *Config, _ *FDs) { c.Name = "a\nb" },
		"memory: 1 ":        func(c *Config, _ *FDs) { c.Memory = 1 },
		"steps":             func(c *Config, _ *FDs) { c.Memory++ },
		"cpus":              func(c *Config, _ *FDs) { c.CPUs = 0 },
		"1 to 64":           func(c *Config, _ *FDs) { c.CPUs = 65 },
		"accel":             func(c *Config, _ *FDs) { c.Accel = "xen" },
		"no control socket": func(_ *Config, f *FDs) { f.TPM = 0 },
		"tpm-tis or none":   func(c *Config, _ *FDs) { c.TPM = "x,y" },
		"QMP are required":  func(_ *Config, f *FDs) { f.QMP = 0 },
		"at most 16":        func(_ *Config, f *FDs) { f.Disks = make([]DiskFD, 17) },
		"at most 8":         func(_ *Config, f *FDs) { f.NICs = make([]NICFD, 9) },
		"NIC 0":             func(_ *Config, f *FDs) { f.NICs = make([]NICFD, 1) },
		"disk 0":            func(_ *Config, f *FDs) { f.Disks = make([]DiskFD, 1) },
		"without firmware":  func(_ *Config, f *FDs) { f.Kernel = 0 },
		"2048 bytes":        func(c *Config, _ *FDs) { c.CommandLine = strings.Repeat("x", 2048) },
		"zero byte":         func(c *Config, _ *FDs) { c.CommandLine = "\x00" },
		"boots a disk":      func(c *Config, _ *FDs) { c.Firmware = SeaBIOS },
		"variable store":    func(c *Config, _ *FDs) { c.Firmware = OVMF },
		"must be seabios":   func(c *Config, _ *FDs) { c.Firmware = "coreboot" },
		"boot menu: -1s: must": func(c *Config, f *FDs) {
			*f = FDs{RAM: 3, QMP: 4, TPM: 5}
			c.Firmware, c.CommandLine, c.BootMenu = SeaBIOS, "", -time.Second
		},
	} {
		c, fd := good()
		change(&c, &fd)
		if _, err := Args(c, fd); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

func TestChooseAccel(t *testing.T) {
	dir := t.TempDir()
	device := filepath.Join(dir, "kvm")
	if a, why := chooseAccel(dir, device); a != TCG || !strings.Contains(why, "kvm_amd") {
		t.Errorf("%s, %s", a, why)
	}
	if err := os.Mkdir(filepath.Join(dir, "kvm_amd"), 0o700); err != nil {
		t.Fatal(err)
	}
	if a, why := chooseAccel(dir, device); a != TCG || !strings.Contains(why, "no such file") {
		t.Errorf("%s, %s", a, why)
	}
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if a, why := chooseAccel(dir, device); a != KVM || why != "kvm_amd is loaded" {
		t.Errorf("%s, %s", a, why)
	}
}

func TestOutcome(t *testing.T) {
	for reason, want := range map[string]Outcome{
		"guest-shutdown": PowerOff, "guest-reset": Reboot, "guest-panic": Crash,
		"host-qmp-quit": Stopped, "host-signal": Stopped, "something new": Crash,
	} {
		if got := outcomeOf(reason); got != want {
			t.Errorf("%s: %s", reason, got)
		}
	}
}

func TestTail(t *testing.T) {
	var b tail
	if b.err() != nil {
		t.Error(b.err())
	}
	_, _ = b.Write([]byte(strings.Repeat("x", 2*maxTail)))
	_, _ = b.Write([]byte("the\nend\n"))
	if s := b.err().Error(); !strings.HasSuffix(s, "the; end") || len(s) > maxTail+1 {
		t.Errorf("%d bytes", len(s))
	}
}
