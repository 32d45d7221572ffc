package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The event log of a guest stands in its own memory, in an area named by the ACPI table TPM2
// (TCG ACPI Specification 1.3 §8): QEMU reserves it, firmware or this package fills it, the
// guest's kernel reads it when its TPM driver starts.
//
// Everything here is read from the guest's memory while it runs: each piece is copied before
// it is looked at, and every address is checked against the memory that there is.

// errNoLogArea says that the guest's memory names no event log area.
var errNoLogArea = errors.New("no event log area in the guest's ACPI tables")

const (
	rsdpStart  = 0xe0000 // ACPI 6.5 §5.2.5.1: the RSDP is here, on a 16-byte boundary
	rsdpEnd    = 0x100000
	acpiHeader = 36
	maxTable   = 64 << 10
	maxLogArea = 1 << 20

	// q35 puts all RAM below 4 GiB unless there are 2.75 GiB of it; then 2 GiB stay below.
	q35LowLimit = 0xb0000000
	q35LowSplit = 0x80000000
)

// lowRAM is how much of the RAM, which starts at address 0 and at offset 0 of the memfd, stands
// below 4 GiB. ACPI tables and the log are there: their addresses have 32 bits.
func lowRAM(memory uint64) uint64 {
	if memory >= q35LowLimit {
		return q35LowSplit
	}
	return memory
}

// ram is the first size bytes of guest memory, read and written through its descriptor: a
// mapping would fault in this process if QEMU shrank the file.
type ram struct {
	f interface {
		io.ReaderAt
		io.WriterAt
	}
	size uint64
}

// copyAt is a private copy of n bytes at a guest-physical address.
func (m ram) copyAt(addr, n uint64) ([]byte, error) {
	if err := m.inside(addr, n); err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if _, err := m.f.ReadAt(b, int64(addr)); err != nil {
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	return b, nil
}

func (m ram) inside(addr, n uint64) error {
	if addr > m.size || n > m.size-addr {
		return fmt.Errorf("%w: %d bytes at %#x are outside memory", errNoLogArea, n, addr)
	}
	return nil
}

// table copies the ACPI table at addr after checking its length and sum (ACPI 6.5 §5.2.6).
func (m ram) table(addr uint64) ([]byte, error) {
	h, err := m.copyAt(addr, acpiHeader)
	if err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(h[4:])
	if n < acpiHeader || n > maxTable {
		return nil, fmt.Errorf("%w: table at %#x of %d bytes", errNoLogArea, addr, n)
	}
	t, err := m.copyAt(addr, uint64(n))
	if err != nil {
		return nil, err
	}
	// The guest may have changed the length between the two copies.
	if binary.LittleEndian.Uint32(t[4:]) != n || sum(t) != 0 {
		return nil, fmt.Errorf("%w: table at %#x has a bad sum", errNoLogArea, addr)
	}
	return t, nil
}

func sum(b []byte) byte {
	var s byte
	for _, v := range b {
		s += v
	}
	return s
}

// rootTable finds the RSDP and gives the address of RSDT or XSDT and the size of its entries.
func (m ram) rootTable() (addr uint64, entry int, err error) {
	low, err := m.copyAt(rsdpStart, rsdpEnd-rsdpStart)
	if err != nil {
		return 0, 0, err
	}
	for ; len(low) >= acpiHeader; low = low[16:] {
		r := low[:acpiHeader]
		if string(r[:8]) != "RSD PTR " || sum(r[:20]) != 0 {
			continue
		}
		if x := binary.LittleEndian.Uint64(r[24:]); r[15] >= 2 && x != 0 {
			return x, 8, nil
		}
		return uint64(binary.LittleEndian.Uint32(r[16:])), 4, nil
	}
	return 0, 0, fmt.Errorf("%w: no RSDP", errNoLogArea)
}

// logArea is where the TPM2 table says that the event log is.
func (m ram) logArea() (addr, length uint64, err error) {
	root, size, err := m.rootTable()
	if err != nil {
		return 0, 0, err
	}
	t, err := m.table(root)
	if err != nil {
		return 0, 0, err
	}
	for e := t[acpiHeader:]; len(e) >= size; e = e[size:] {
		p := uint64(binary.LittleEndian.Uint32(e))
		if size == 8 {
			p = binary.LittleEndian.Uint64(e)
		}
		sig, err := m.copyAt(p, 4)
		if err != nil {
			return 0, 0, err
		}
		if string(sig) != "TPM2" {
			continue
		}
		return m.tpm2(p)
	}
	return 0, 0, fmt.Errorf("%w: no TPM2 table", errNoLogArea)
}

// tpm2 reads LAML and LASA, which follow 12 bytes of start-method parameters.
func (m ram) tpm2(p uint64) (addr, length uint64, err error) {
	const laml, lasa, end = 64, 68, 76
	t, err := m.table(p)
	if err != nil {
		return 0, 0, err
	}
	if len(t) < end {
		return 0, 0, fmt.Errorf("%w: TPM2 table of %d bytes has none", errNoLogArea, len(t))
	}
	length = uint64(binary.LittleEndian.Uint32(t[laml:]))
	addr = binary.LittleEndian.Uint64(t[lasa:])
	if addr == 0 || length == 0 || length > maxLogArea {
		return 0, 0, fmt.Errorf("%w: %d bytes at %#x", errNoLogArea, length, addr)
	}
	return addr, length, m.inside(addr, length)
}

// putLog writes the log into the area and zeros behind it.
func (m ram) putLog(log []byte) error {
	addr, n, err := m.logArea()
	if err != nil {
		return err
	}
	if uint64(len(log)) > n {
		return fmt.Errorf("event log of %d bytes: the guest's area has %d", len(log), n)
	}
	area := make([]byte, n)
	copy(area, log)
	if _, err := m.f.WriteAt(area, int64(addr)); err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	return nil
}

// getLog copies the whole area.
func (m ram) getLog() ([]byte, error) {
	addr, n, err := m.logArea()
	if err != nil {
		return nil, err
	}
	return m.copyAt(addr, n)
}
