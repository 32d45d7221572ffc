package qemu

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"testing"
)

func hexString(b []byte) string { return hex.EncodeToString(b) }

// testLog is a small crypto-agile log: the specification header and one event (TCG PFP 1.05
// §10.2, §10.4.5).
func testLog() []byte {
	le := binary.LittleEndian
	var spec []byte
	spec = append(spec, "Spec ID Event03\x00"...)
	spec = append(spec, 0, 0, 0, 0, 0, 2, 0, 2) // class, minor, major, errata, uintn
	spec = le.AppendUint32(spec, 1)
	spec = le.AppendUint16(spec, 0xb)
	spec = le.AppendUint16(spec, 32)
	spec = append(spec, 0)
	b := le.AppendUint32(nil, 0)
	b = le.AppendUint32(b, 3)
	b = append(b, make([]byte, 20)...)
	b = le.AppendUint32(b, uint32(len(spec)))
	b = append(b, spec...)
	b = le.AppendUint32(b, 8)
	b = le.AppendUint32(b, 0xd)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint16(b, 0xb)
	for i := range 32 {
		b = append(b, byte(i))
	}
	b = le.AppendUint32(b, 4)
	return append(b, "test"...)
}

// memory is a ram of a test: low RAM as a file would give it.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error)  { return copy(p, m[off:]), nil }
func (m memory) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }

// Places in the test's memory.
const (
	atRSDP = 0xf0010
	atRoot = 0x110000
	atFADT = 0x110400
	atTPM2 = 0x110800
	atLog  = 0x111000
	logLen = 0x400
)

func acpiTable(sig string, body []byte) []byte {
	b := make([]byte, acpiHeader, acpiHeader+len(body))
	copy(b, sig)
	b = append(b, body...)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)))
	b[9] -= sum(b)
	return b
}

func tpm2Table(addr uint64, length uint32) []byte {
	body := make([]byte, 40)
	binary.LittleEndian.PutUint32(body[28:], length)
	binary.LittleEndian.PutUint64(body[32:], addr)
	return acpiTable("TPM2", body)
}

// acpiMemory is 2 MiB with the tables; revision 0 has an RSDT, 2 an XSDT.
func acpiMemory(revision byte) memory {
	m := make(memory, 2<<20)
	r := m[atRSDP:]
	copy(r, "RSD PTR ")
	r[15] = revision
	var entries []byte
	for _, p := range []uint64{atFADT, atTPM2} {
		if revision == 0 {
			entries = binary.LittleEndian.AppendUint32(entries, uint32(p))
		} else {
			entries = binary.LittleEndian.AppendUint64(entries, p)
		}
	}
	if revision == 0 {
		binary.LittleEndian.PutUint32(r[16:], atRoot)
		copy(m[atRoot:], acpiTable("RSDT", entries))
	} else {
		binary.LittleEndian.PutUint64(r[24:], atRoot)
		copy(m[atRoot:], acpiTable("XSDT", entries))
	}
	r[8] -= sum(r[:20])
	copy(m[atFADT:], acpiTable("FACP", make([]byte, 100)))
	copy(m[atTPM2:], tpm2Table(atLog, logLen))
	return m
}

func TestLogArea(t *testing.T) {
	for _, revision := range []byte{0, 2} {
		m := acpiMemory(revision)
		r := ram{m, uint64(len(m))}
		for i := range logLen {
			m[atLog+i] = 0xee
		}
		if err := r.putLog(testLog()); err != nil {
			t.Fatalf("revision %d: %v", revision, err)
		}
		got, err := r.getLog()
		want := append(testLog(), make([]byte, logLen-len(testLog()))...)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("revision %d: %x, %v", revision, got, err)
		}
		if err := r.putLog(make([]byte, logLen+1)); err == nil {
			t.Error("a log larger than the area was taken")
		}
		if m[atLog+logLen] != 0 {
			t.Error("written past the area")
		}
	}
}

// Each way to have no area is an error.
func TestLogAreaHostile(t *testing.T) {
	le := binary.LittleEndian
	fix := func(b []byte) { b[9] -= sum(b[:le.Uint32(b[4:])]) }
	for name, change := range map[string]func(memory){
		"no RSDP":              func(m memory) { m[atRSDP] = 'x' },
		"RSDP sum":             func(m memory) { m[atRSDP+9]++ },
		"root outside":         func(m memory) { le.PutUint64(m[atRSDP+24:], 1<<62) },
		"root at the end":      func(m memory) { le.PutUint64(m[atRSDP+24:], uint64(len(m))-8) },
		"root wraps":           func(m memory) { le.PutUint64(m[atRSDP+24:], ^uint64(3)) },
		"root short":           func(m memory) { le.PutUint32(m[atRoot+4:], 35) },
		"root huge":            func(m memory) { le.PutUint32(m[atRoot+4:], 0xffff_ffff) },
		"root sum":             func(m memory) { m[atRoot+10]++ },
		"entry outside":        func(m memory) { le.PutUint64(m[atRoot+36:], 1<<40); fix(m[atRoot:]) },
		"no TPM2":              func(m memory) { m[atTPM2] = 'x' },
		"TPM2 sum":             func(m memory) { m[atTPM2+70]++ },
		"TPM2 without an area": func(m memory) { copy(m[atTPM2:], acpiTable("TPM2", make([]byte, 16))) },
		"area outside":         func(m memory) { copy(m[atTPM2:], tpm2Table(uint64(len(m))-1, 2)) },
		"area wraps":           func(m memory) { copy(m[atTPM2:], tpm2Table(^uint64(0), 2)) },
		"area huge":            func(m memory) { copy(m[atTPM2:], tpm2Table(0x1000, maxLogArea+1)) },
		"area empty":           func(m memory) { copy(m[atTPM2:], tpm2Table(atLog, 0)) },
	} {
		m := acpiMemory(2)
		change(m)
		before := bytes.Clone(m)
		r := ram{m, uint64(len(m))}
		if err := r.putLog(testLog()); !errors.Is(err, errNoLogArea) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(m, before) {
			t.Errorf("%s: memory was changed", name)
		}
	}
	small := ram{make(memory, 4096), 4096}
	if _, err := small.getLog(); !errors.Is(err, errNoLogArea) {
		t.Errorf("small memory: %v", err)
	}
}

// FuzzLogArea writes into the tables.
func FuzzLogArea(f *testing.F) {
	f.Add(uint32(atRSDP+16), []byte{0, 0, 0x11, 0})
	f.Add(uint32(atTPM2+4), []byte{0xff, 0xff})
	base := acpiMemory(2)
	m := make(memory, len(base))
	f.Fuzz(func(t *testing.T, at uint32, data []byte) {
		copy(m[rsdpStart:], base[rsdpStart:])
		copy(m[int(at)%len(m):], data)
		// Sums are the least of a guest's troubles: mend them.
		for _, p := range []int{atRoot, atFADT, atTPM2} {
			if n := int(binary.LittleEndian.Uint32(m[p+4:])); n >= acpiHeader && n <= maxTable {
				m[p+9] -= sum(m[p : p+n])
			}
		}
		m[atRSDP+8] -= sum(m[atRSDP : atRSDP+20])
		r := ram{m, uint64(len(m))}
		addr, n, err := r.logArea()
		if err == nil && (addr > uint64(len(m)) || n > uint64(len(m))-addr) {
			t.Fatalf("area of %d bytes at %#x", n, addr)
		}
	})
}
