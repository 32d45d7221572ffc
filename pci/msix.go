package pci

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
)

// MSI-X (PCI 3.0 §6.8.2).
const (
	capMSIX        = 0x11
	msixCapLength  = 12
	msixEnable     = 1 << 15
	msixMaskAll    = 1 << 14
	msixEntrySize  = 16
	msixEntryMask  = 1 << 0
	msixVectorCtrl = 12
)

// msix is a function's vectors. A vector is let through while the function's MSI-X is enabled,
// not masked as a whole, and the entry is not masked; else its line keeps events back.
type msix struct {
	mu      sync.Mutex // below Function.mu
	table   []byte     // msixEntrySize bytes a vector, as the guest sees it
	control uint16     // message control: enable and mask-all bits
	lines   []Line     // nil before attach
	open    []bool     // line is unmasked, as last told
}

func newMSIX(vectors int) *msix {
	m := &msix{table: make([]byte, vectors*msixEntrySize), open: make([]bool, vectors)}
	for v := range vectors { // §6.8.2.9: masked after reset
		m.table[v*msixEntrySize+msixVectorCtrl] = msixEntryMask
	}
	return m
}

// capability: the table at offset half of the BAR, the pending bits in its second half.
func (m *msix) capability(half uint64) Capability {
	data := make([]byte, msixCapLength)
	data[0] = capMSIX
	binary.LittleEndian.PutUint16(data[2:], uint16(len(m.open)-1))
	binary.LittleEndian.PutUint32(data[4:], uint32(half))
	binary.LittleEndian.PutUint32(data[8:], uint32(half+half/2))
	mask := make([]byte, msixCapLength)
	binary.LittleEndian.PutUint16(mask[2:], msixEnable|msixMaskAll)
	return Capability{Data: data, Writable: mask, OnWrite: func(data []byte) []byte {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.control = binary.LittleEndian.Uint16(data[2:])
		for v := range m.open {
			m.apply(v, false)
		}
		return nil
	}}
}

func (m *msix) attach(irq Interrupts, route uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for v := range m.open {
		l, err := irq.NewLine(route + uint32(v))
		if err != nil {
			return fmt.Errorf("vector %d: %w", v, err)
		}
		m.lines = append(m.lines, l)
	}
	return nil
}

func (m *msix) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lines {
		_ = l.Close() // the machine is going away
	}
	m.lines = nil
}

func (m *msix) file(v int) *os.File {
	m.mu.Lock()
	defer m.mu.Unlock()
	if v < 0 || v >= len(m.lines) {
		return nil
	}
	return m.lines[v].File()
}

// apply tells line v what the registers say; changed: its message may be new.
func (m *msix) apply(v int, changed bool) {
	if v >= len(m.lines) {
		return
	}
	e := m.table[v*msixEntrySize:]
	open := m.control&msixEnable != 0 && m.control&msixMaskAll == 0 && e[msixVectorCtrl]&msixEntryMask == 0
	if open == m.open[v] && (!open || !changed) {
		return
	}
	var err error
	if open {
		err = m.lines[v].Unmask(binary.LittleEndian.Uint64(e), binary.LittleEndian.Uint32(e[8:]))
	} else {
		err = m.lines[v].Mask()
	}
	// A message the kernel refuses (a hostile address) leaves the vector closed: that is the
	// guest's own loss.
	m.open[v] = open && err == nil
}

// read serves the table and the pending bits; off is relative to the table, pba is where the
// pending bits begin.
func (m *msix) read(off, pba uint64, p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off < pba {
		if end := off + uint64(len(p)); end <= uint64(len(m.table)) {
			copy(p, m.table[off:end])
		}
		return
	}
	for i := range p {
		for bit := range 8 {
			v := (off-pba+uint64(i))*8 + uint64(bit)
			if v < uint64(len(m.lines)) && !m.open[v] && m.lines[v].Pending() {
				p[i] |= 1 << bit
			}
		}
	}
}

// write changes the table; only aligned 4- and 8-byte writes count (§6.8.2).
func (m *msix) write(off uint64, p []byte) {
	n := uint64(len(p))
	if (n != 4 && n != 8) || off%n != 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if off+n > uint64(len(m.table)) {
		return
	}
	copy(m.table[off:], p)
	v := int(off / msixEntrySize)
	e := m.table[v*msixEntrySize:]
	e[0] &^= 3 // message addresses are DWORD-aligned
	binary.LittleEndian.PutUint32(e[msixVectorCtrl:], binary.LittleEndian.Uint32(e[msixVectorCtrl:])&msixEntryMask)
	m.apply(v, true)
}
