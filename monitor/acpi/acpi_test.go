package acpi

import (
	"bytes"
	"encoding/binary"
	"testing"
)

var machine = Machine{
	CPUs: 4, LocalAPIC: 0xfee00000, IOAPIC: 0xfec00000, ECAM: 0xe0000000, PCIBase: 0xc0000000, PCISize: 0x20000000,
	SleepControl: 0x600, SleepStatus: 0x601, Reset: 0x602, ResetValue: 1, EventGSI: 9, SerialPort: 0x3f8, SerialIRQ: 4,
	TPM: &TPM{Base: 0xfed40000, Size: 0x6000, Log: 0xe8000, LogSize: 0x8000},
}

// Every table is reachable from the root, sums to zero and has the length it says.
func TestTables(t *testing.T) {
	const base = 0xe0000
	out, err := Build(machine, base, 0x8000)
	if err != nil {
		t.Fatal(err)
	}
	if string(out[:8]) != "RSD PTR " || checksum(out[:20]) != 0 || checksum(out[:36]) != 0 {
		t.Fatalf("RSDP % x", out[:36])
	}
	table := func(at uint64) []byte {
		t.Helper()
		p := out[at-base:]
		p = p[:binary.LittleEndian.Uint32(p[4:])]
		if checksum(p) != 0 {
			t.Errorf("%s does not sum to zero", p[:4])
		}
		return p
	}
	xsdt := table(binary.LittleEndian.Uint64(out[24:]))
	seen := map[string][]byte{}
	for p := xsdt[headerSize:]; len(p) > 0; p = p[8:] {
		tb := table(binary.LittleEndian.Uint64(p))
		seen[string(tb[:4])] = tb
	}
	facp := seen["FACP"]
	if len(facp) != 276 || binary.LittleEndian.Uint32(facp[112:])&flagHardwareReduced == 0 {
		t.Errorf("FACP of %d bytes", len(facp))
	}
	if binary.LittleEndian.Uint64(facp[116+4:]) != 0x602 || facp[128] != 1 || binary.LittleEndian.Uint64(facp[244+4:]) != 0x600 {
		t.Error("FACP names other registers")
	}
	if d := table(binary.LittleEndian.Uint64(facp[140:])); string(d[:4]) != "DSDT" {
		t.Errorf("DSDT is %q", d[:4])
	}
	if n := bytes.Count(seen["APIC"], []byte{1, 0, 0, 0}); n < 4 {
		t.Errorf("APIC enables %d processors", n)
	}
	tpm := seen["TPM2"]
	if len(tpm) != 76 || binary.LittleEndian.Uint64(tpm[40:]) != 0xfed40040 || tpm[48] != startMethodCRB ||
		binary.LittleEndian.Uint32(tpm[64:]) != 0x8000 || binary.LittleEndian.Uint64(tpm[68:]) != 0xe8000 {
		t.Errorf("TPM2 % x", tpm)
	}
	if len(seen["MCFG"]) != 60 {
		t.Errorf("MCFG of %d bytes", len(seen["MCFG"]))
	}
	if _, err := Build(machine, base, 100); err == nil {
		t.Error("tables overflow their room")
	}
}

// Encodings against the examples and rules of ACPI 6.5 §20.2.
func TestAML(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want []byte
	}{
		{"PNP0A03", eisaID("PNP0A03"), []byte{0x0c, 0x41, 0xd0, 0x0a, 0x03}},
		{"PNP0C0C", eisaID("PNP0C0C"), []byte{0x0c, 0x41, 0xd0, 0x0c, 0x0c}},
		{"byte", integer(0x42), []byte{0x0a, 0x42}},
		{"word", integer(0x1234), []byte{0x0b, 0x34, 0x12}},
		{"one", integer(1), []byte{1}},
		{"path", path("\\_SB_.PWRB"), []byte("\\\x2e_SB_PWRB")},
		{"short length", packageLength(make([]byte, 62))[:1], []byte{63}},
		{"long length", packageLength(make([]byte, 63))[:2], []byte{0x41, 0x04}},
		{"longer length", packageLength(make([]byte, 5000))[:3], []byte{0x8b, 0x38, 0x01}},
	} {
		if !bytes.Equal(c.got, c.want) {
			t.Errorf("%s: % x, want % x", c.name, c.got, c.want)
		}
	}
}
