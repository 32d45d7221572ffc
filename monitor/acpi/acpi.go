// Package acpi builds the ACPI tables of Redoubt's machine: hardware-reduced (ACPI 6.5 §4.1),
// so that a guest looks for no timer, no controller and no port that is not there.
package acpi

import (
	"encoding/binary"
	"fmt"
)

// Machine says what the tables describe. Addresses are guest-physical.
type Machine struct {
	CPUs             int    // local APIC IDs 0…CPUs-1
	LocalAPIC        uint32 // address
	IOAPIC           uint32
	ECAM             uint64 // configuration space of bus 0, 1 MiB
	PCIBase, PCISize uint32 // window for BARs

	SleepControl, SleepStatus, Reset uint16 // ports (§4.8.3.7); writing ResetValue resets
	ResetValue                       byte
	EventGSI                         uint32 // raised for the power button
	SerialPort                       uint16
	SerialIRQ                        uint

	TPM *TPM // nil: none
}

// TPM describes a command-response buffer TPM (TCG ACPI Specification 1.4 §7.3).
type TPM struct {
	Base, Size uint32 // registers and buffer; the control area is at Base+0x40
	Log        uint64 // event log area
	LogSize    uint32
}

// SleepOff is the SLP_TYP value of S5.
const SleepOff = 5

// startMethodCRB is the TPM2 table's start method 7: command response buffer interface.
const startMethodCRB = 7

// Sizes of what a table begins with, and of RSDP.
const (
	headerSize = 36
	rsdpSize   = 36
)

// Build returns the tables to put at guest-physical address base, the RSDP first. They must
// not need more than limit bytes.
func Build(m Machine, base uint64, limit int) ([]byte, error) {
	b := builder{base: base, out: make([]byte, rsdpSize)}
	dsdt := b.add("DSDT", 2, dsdt(m))
	tables := []uint64{b.add("FACP", 6, fadt(m, dsdt)), b.add("APIC", 5, madt(m)), b.add("MCFG", 1, mcfg(m))}
	if m.TPM != nil {
		tables = append(tables, b.add("TPM2", 4, tpm2(*m.TPM)))
	}
	var x []byte
	for _, t := range tables {
		x = binary.LittleEndian.AppendUint64(x, t)
	}
	xsdt := b.add("XSDT", 1, x)
	r := b.out[:rsdpSize] // §5.2.5.3
	copy(r, "RSD PTR ")
	copy(r[9:], oem)
	r[15] = 2
	binary.LittleEndian.PutUint32(r[20:], rsdpSize)
	binary.LittleEndian.PutUint64(r[24:], xsdt)
	r[8] = checksum(r[:20])
	r[32] = checksum(r)
	if len(b.out) > limit {
		return nil, fmt.Errorf("acpi: tables of %d bytes, room for %d", len(b.out), limit)
	}
	return b.out, nil
}

const oem = "RDOUBT"

type builder struct {
	base uint64
	out  []byte
}

// add appends a table of the body given and returns its address.
func (b *builder) add(signature string, revision byte, body []byte) uint64 {
	for len(b.out)%16 != 0 {
		b.out = append(b.out, 0)
	}
	t := make([]byte, headerSize, headerSize+len(body)) // §5.2.6
	copy(t, signature)
	binary.LittleEndian.PutUint32(t[4:], uint32(headerSize+len(body)))
	t[8] = revision
	copy(t[10:], oem)
	copy(t[16:], "REDOUBT ")
	binary.LittleEndian.PutUint32(t[24:], 1)
	copy(t[28:], "RDBT")
	binary.LittleEndian.PutUint32(t[32:], 1)
	t = append(t, body...)
	t[9] = checksum(t)
	at := b.base + uint64(len(b.out))
	b.out = append(b.out, t...)
	return at
}

func checksum(p []byte) byte {
	var s byte
	for _, b := range p {
		s += b
	}
	return -s
}

// port8 is the generic address of a byte-wide port (§5.2.3.2).
func port8(port uint16) []byte {
	return binary.LittleEndian.AppendUint64([]byte{1, 8, 0, 1}, uint64(port))
}

// FADT flags (§5.2.9, table 5.10) and boot architecture flags (table 5.11).
const (
	flagWBINVD          = 1 << 0
	flagPowerButton     = 1 << 4 // 1: not a fixed register
	flagSleepButton     = 1 << 5
	flagResetRegister   = 1 << 10
	flagHardwareReduced = 1 << 20

	bootNoVGA = 1 << 2
	bootNoRTC = 1 << 5
)

func fadt(m Machine, dsdt uint64) []byte {
	t := make([]byte, 276-headerSize)
	at := func(offset int) []byte { return t[offset-headerSize:] }
	binary.LittleEndian.PutUint32(at(40), uint32(dsdt))
	binary.LittleEndian.PutUint16(at(109), bootNoVGA|bootNoRTC)
	binary.LittleEndian.PutUint32(at(112),
		flagWBINVD|flagPowerButton|flagSleepButton|flagResetRegister|flagHardwareReduced)
	copy(at(116), port8(m.Reset))
	at(128)[0] = m.ResetValue
	at(131)[0] = 5 // minor version
	binary.LittleEndian.PutUint64(at(140), dsdt)
	copy(at(244), port8(m.SleepControl))
	copy(at(256), port8(m.SleepStatus))
	copy(at(268), "Redoubt\x00")
	return t
}

// madt: §5.2.12. The legacy controllers are absent.
func madt(m Machine) []byte {
	t := binary.LittleEndian.AppendUint32(nil, m.LocalAPIC)
	t = binary.LittleEndian.AppendUint32(t, 0)
	for i := range m.CPUs {
		t = append(t, 0, 8, byte(i), byte(i), 1, 0, 0, 0)
	}
	t = append(t, 1, 12, byte(m.CPUs), 0)
	t = binary.LittleEndian.AppendUint32(t, m.IOAPIC)
	t = binary.LittleEndian.AppendUint32(t, 0)
	return append(t, 4, 6, 0xff, 0, 0, 1) // NMI at LINT1 of every processor
}

// mcfg: PCI Firmware 3.2 §4.1.2, bus 0 alone.
func mcfg(m Machine) []byte {
	t := make([]byte, 8, 24)
	t = binary.LittleEndian.AppendUint64(t, m.ECAM)
	return append(t, 0, 0, 0, 0, 0, 0, 0, 0)
}

func tpm2(p TPM) []byte {
	t := make([]byte, 4, 40)                                     // client platform
	t = binary.LittleEndian.AppendUint64(t, uint64(p.Base)+0x40) // control area
	t = binary.LittleEndian.AppendUint32(t, startMethodCRB)
	t = append(t, make([]byte, 12)...)
	t = binary.LittleEndian.AppendUint32(t, p.LogSize)
	return binary.LittleEndian.AppendUint64(t, p.Log)
}

func dsdt(m Machine) []byte {
	devices := [][]byte{
		device("PCI0",
			name("_HID", eisaID("PNP0A08")), name("_CID", eisaID("PNP0A03")),
			name("_SEG", integer(0)), name("_BBN", integer(0)), name("_UID", integer(0)),
			name("_CRS", resources(buses(0, 0), window(m.PCIBase, m.PCISize)))),
		// The configuration window is reserved as a motherboard resource (PCI Firmware 3.2 §4.1.2).
		device("MBRD", name("_HID", eisaID("PNP0C02")), name("_UID", integer(1)),
			name("_CRS", resources(memory32(uint32(m.ECAM), 1<<20)))),
		device("COM1", name("_HID", eisaID("PNP0501")), name("_UID", integer(1)),
			name("_CRS", resources(ports(m.SerialPort, 8), isaIRQ(m.SerialIRQ)))),
		device("PWRB", name("_HID", eisaID("PNP0C0C"))),
		// The generic event device (§5.6.9) is the hardware-reduced machine's way to notify.
		device("GEDV", name("_HID", str("ACPI0013")), name("_UID", integer(0)),
			name("_CRS", resources(interrupt(m.EventGSI))),
			method("_EVT", 1, notify("\\_SB_.PWRB", 0x80))),
	}
	if m.TPM != nil {
		devices = append(devices, device("TPM0", name("_HID", str("MSFT0101")), name("_UID", integer(0)),
			name("_STA", integer(0xf)), name("_CRS", resources(memory32(m.TPM.Base, m.TPM.Size)))))
	}
	return concat(
		name("_S5_", list(integer(SleepOff), integer(0), integer(0), integer(0))),
		scope("\\_SB_", devices...),
	)
}
