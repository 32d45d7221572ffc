package monitor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"redoubt.dev/redoubt/kvm"
	"redoubt.dev/redoubt/monitor/acpi"
	"redoubt.dev/redoubt/vtpm/crb"
)

// Boot parameters outside the header (Documentation/arch/x86/zero-page.rst).
const (
	bpRSDP      = 0x070
	bpE820Count = 0x1e8
	bpE820      = 0x2d0
	bpSize      = 4096

	e820RAM      = 1
	e820Reserved = 2
)

// loadKernel puts kernel, initrd, command line, tables and boot parameters into memory and
// returns the entry point.
func (m *Machine) loadKernel() (entry uint64, err error) {
	size, err := fileSize(m.cfg.Kernel)
	if err != nil {
		return 0, fmt.Errorf("kernel: %w", err)
	}
	k, err := parseBzImage(m.cfg.Kernel, size)
	if err != nil {
		return 0, fmt.Errorf("kernel %s: %w", m.cfg.Kernel.Name(), err)
	}
	low := m.mem.low
	if k.load+k.initSize > uint64(len(low)) {
		return 0, fmt.Errorf("kernel %s: needs memory to %#x, the guest has %#x below 3 GiB",
			m.cfg.Kernel.Name(), k.load+k.initSize, len(low))
	}
	if err := readFull(m.cfg.Kernel, low[k.load:k.load+uint64(k.payloadSize)], k.payload); err != nil {
		return 0, fmt.Errorf("kernel %s: %w", m.cfg.Kernel.Name(), err)
	}
	if n := uint64(len(m.cfg.Cmdline)); n >= cmdlineMax || n > k.cmdlineMax {
		return 0, fmt.Errorf("command line of %d bytes: the kernel takes %d", n, min(k.cmdlineMax, cmdlineMax-1))
	}
	copy(low[cmdlineAddr:], m.cfg.Cmdline+"\x00")

	bp := low[bootParamAddr : bootParamAddr+bpSize]
	copy(bp[hdrStart:], k.header)
	bp[hdrLoader] = undefinedLoader
	binary.LittleEndian.PutUint32(bp[hdrCmdline:], cmdlineAddr)
	binary.LittleEndian.PutUint64(bp[bpRSDP:], firmwareAddr)
	if m.cfg.Initrd != nil {
		at, n, err := m.loadInitrd(k)
		if err != nil {
			return 0, fmt.Errorf("initrd %s: %w", m.cfg.Initrd.Name(), err)
		}
		binary.LittleEndian.PutUint32(bp[hdrRamdisk:], uint32(at))
		binary.LittleEndian.PutUint32(bp[hdrRamdiskSize:], uint32(n))
	}
	bp[bpE820Count] = byte(m.writeE820(bp[bpE820:]))
	return k.load + entry64, m.writeTables()
}

// loadInitrd puts the initrd as high as the kernel takes it.
func (m *Machine) loadInitrd(k *bzImage) (at, n uint64, err error) {
	size, err := fileSize(m.cfg.Initrd)
	if err != nil {
		return 0, 0, err
	}
	n = uint64(size)
	top := min(uint64(len(m.mem.low)), k.initrdMax+1)
	floor := k.load + k.initSize
	if top < floor || n > top-floor {
		return 0, 0, fmt.Errorf("%d bytes: room for %d between the kernel and %#x", n, top-min(top, floor), top)
	}
	at = (top - n) &^ (pageSize - 1)
	if at < floor {
		return 0, 0, fmt.Errorf("%d bytes: no room above the kernel at %#x", n, floor)
	}
	return at, n, readFull(m.cfg.Initrd, m.mem.low[at:at+n], 0)
}

// writeE820 writes the memory map and returns the number of entries.
func (m *Machine) writeE820(p []byte) int {
	type entry struct {
		base, size uint64
		kind       uint32
	}
	entries := []entry{
		{0, lowUsableEnd, e820RAM},
		{firmwareAddr, oneMiB - firmwareAddr, e820Reserved},
		{oneMiB, uint64(len(m.mem.low)) - oneMiB, e820RAM},
		{ecamBase, 1 << 20, e820Reserved},
	}
	if n := uint64(len(m.mem.high)); n > 0 {
		entries = append(entries, entry{highRAMBase, n, e820RAM})
	}
	for i, e := range entries {
		binary.LittleEndian.PutUint64(p[i*20:], e.base)
		binary.LittleEndian.PutUint64(p[i*20+8:], e.size)
		binary.LittleEndian.PutUint32(p[i*20+16:], e.kind)
	}
	return len(entries)
}

func (m *Machine) writeTables() error {
	d := acpi.Machine{
		CPUs: m.cfg.VCPUs, LocalAPIC: localAPICBase, IOAPIC: ioapicBase,
		ECAM: ecamBase, PCIBase: barBase, PCISize: barLimit - barBase,
		SleepControl: portSleepControl, SleepStatus: portSleepStatus, Reset: portReset, ResetValue: resetValue,
		EventGSI: gsiEvent, SerialPort: portSerial, SerialIRQ: gsiSerial,
	}
	if m.cfg.TPM != nil {
		d.TPM = &acpi.TPM{Base: crb.Base, Size: crb.Size, Log: eventLogAddr, LogSize: eventLogSize}
	}
	tables, err := acpi.Build(d, firmwareAddr, firmwareSize)
	if err != nil {
		return err
	}
	copy(m.mem.low[firmwareAddr:], tables)
	copy(m.mem.low[resetVector:], resetCode[:])
	return nil
}

// resetVector is where the BIOS of a PC begins. Linux on a hardware-reduced machine without EFI
// restarts by jumping there in real mode, past the ACPI reset register (arch/x86/kernel/
// reboot.c, efi_reboot_required): what it finds is a write to that register.
const resetVector = 0xf_fff0

var resetCode = [...]byte{
	0xb0, resetValue, // mov $resetValue, %al
	0xba, portReset & 0xff, portReset >> 8, // mov $portReset, %dx
	0xee,       // out %al, (%dx)
	0xf4,       // hlt
	0xeb, 0xfd, // jmp to it
}

// Control registers and flags of the entry state (Intel SDM vol. 3 §2.5, §2.2.1).
const (
	cr0PE, cr0MP, cr0ET, cr0NE, cr0WP, cr0PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
	cr4PAE                                   = 1 << 5
	eferLME, eferLMA                         = 1 << 8, 1 << 10
	rflagsReserved                           = 1 << 1

	ptePresent, pteWrite, pteHuge = 1 << 0, 1 << 1, 1 << 7
)

// enterLongMode gives the boot processor the state that the 64-bit boot protocol asks for: the
// first 4 GiB mapped one to one, flat segments with selectors 0x10 and 0x18, interrupts off,
// RSI at the boot parameters.
func (m *Machine) enterLongMode(c *kvm.VCPU, entry uint64) error {
	low := m.mem.low
	put := func(at, v uint64) { binary.LittleEndian.PutUint64(low[at:], v) }
	const pml4, pdpt, pd = pageTableAddr, pageTableAddr + pageSize, pageTableAddr + 2*pageSize
	put(pml4, pdpt|ptePresent|pteWrite)
	for i := range uint64(4) {
		put(pdpt+i*8, pd+i*pageSize|ptePresent|pteWrite)
		for j := range uint64(512) {
			put(pd+i*pageSize+j*8, i<<30|j<<21|ptePresent|pteWrite|pteHuge)
		}
	}
	put(gdtAddr+0x10, 0x00af_9b00_0000_ffff)
	put(gdtAddr+0x18, 0x00cf_9300_0000_ffff)
	s, err := c.Sregs()
	if err != nil {
		return err
	}
	s.GDT = kvm.Table{Base: gdtAddr, Limit: 0x1f}
	s.IDT = kvm.Table{}
	s.CS = kvm.Segment{Limit: 0xffff_ffff, Selector: 0x10, Type: 11, Present: 1, S: 1, L: 1, G: 1}
	data := kvm.Segment{Limit: 0xffff_ffff, Selector: 0x18, Type: 3, Present: 1, DB: 1, S: 1, G: 1}
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.CR0 = cr0PE | cr0MP | cr0ET | cr0NE | cr0WP | cr0PG
	s.CR3, s.CR4, s.EFER = pml4, cr4PAE, eferLME|eferLMA
	if err := c.SetSregs(s); err != nil {
		return err
	}
	return c.SetRegs(kvm.Regs{RIP: entry, RSI: bootParamAddr, RFLAGS: rflagsReserved})
}

// fileSize works for files and for sealed memory.
func fileSize(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !st.Mode().IsRegular() {
		return 0, errors.New("not a regular file")
	}
	return st.Size(), nil
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	if n, err := r.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("read %d of %d bytes at %d: %w", n, len(p), off, err)
	}
	return nil
}
