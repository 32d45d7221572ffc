package monitor

import "redoubt.dev/redoubt/pci/topology"

// The guest-physical address map.
//
//	0          – low RAM end   RAM, at most 3 GiB
//	0xc0000000 – 0xe0000000    window for PCI BARs
//	0xe0000000 – 0xe0100000    PCI configuration space of bus 0 (ECAM), read-only memory
//	0xfec00000                 I/O APIC
//	0xfed40000 – 0xfed46000    TPM: registers of localities 0–4, then the buffer page
//	0xfee00000                 local APICs
//	0xfeffc000 – 0xff000000    KVM's own pages (needed on Intel)
//	4 GiB      –               the rest of RAM
const (
	pageSize = 4096

	lowRAMLimit = 0xc000_0000
	highRAMBase = 1 << 32

	barBase  = topology.WindowBase
	barLimit = topology.WindowBase + topology.WindowSize
	ecamBase = 0xe000_0000

	ioapicBase      = 0xfec0_0000
	localAPICBase   = 0xfee0_0000
	identityMapAddr = 0xfeff_c000
	tssAddr         = 0xfeff_d000
)

// Below 1 MiB. What the kernel needs only until it has its own lies in memory that it may use.
const (
	gdtAddr       = 0x6000
	bootParamAddr = 0x7000
	pageTableAddr = 0x8000 // six pages
	cmdlineAddr   = 0x2_0000
	cmdlineMax    = 0x1_0000

	lowUsableEnd = 0xa_0000
	firmwareAddr = 0xe_0000 // ACPI tables; reserved to 1 MiB
	firmwareSize = 0x8000
	eventLogAddr = 0xe_8000
	eventLogSize = 0x8000 // LAML of the TPM2 table
	oneMiB       = 0x10_0000
)

// Ports.
const (
	portSerial       = 0x3f8
	portSleepControl = 0x600
	portSleepStatus  = 0x601
	portReset        = 0x602
	portKeyboard     = 0x64  // its controller can reset the machine
	portResetControl = 0xcf9 // as can the chipset's register

	resetValue         = 0x01
	sleepEnable        = 1 << 5 // SLP_EN (ACPI 6.5 §4.8.3.7)
	keyboardReset      = 0xfe
	resetControlSystem = 1 << 2
)

// Interrupt lines: I/O APIC pins, then lines for messages.
const (
	gsiSerial  = 4
	gsiEvent   = 9
	ioapicPins = topology.FirstRoute
)

// Memory slots.
const (
	slotECAM = iota
	slotTPM
	firstRAM // and those that follow: pieces of RAM
)
