package virtio

import (
	"encoding/binary"

	"redoubt.dev/redoubt/pci"
)

// Layout of the BAR: one 4 KiB page a structure (virtio 1.2 §4.1.4).
const (
	commonOffset = 0x0000
	isrOffset    = 0x1000
	configOffset = 0x2000
	notifyOffset = 0x3000
	page         = 0x1000
	barSize      = 0x4000
	notifyStride = 4
)

// ISR bits (virtio 1.2 §4.1.4.5).
const (
	isrQueue  = 1
	isrConfig = 2
)

// Common configuration registers (virtio 1.2 §4.1.4.3).
const (
	regDeviceFeatureSelect = 0x00
	regDeviceFeature       = 0x04
	regDriverFeatureSelect = 0x08
	regDriverFeature       = 0x0c
	regConfigVector        = 0x10
	regNumQueues           = 0x12
	regStatus              = 0x14
	regGeneration          = 0x15
	regQueueSelect         = 0x16
	regQueueSize           = 0x18
	regQueueVector         = 0x1a
	regQueueEnable         = 0x1c
	regQueueNotifyOff      = 0x1e
	regQueueArea           = 0x20 // three addresses, 8 bytes each
	regQueueAreaEnd        = 0x38
	commonLength           = 0x38
)

// capabilities are the vendor capabilities that say where the structures are (§4.1.4).
func capabilities() []pci.Capability {
	at := func(kind byte, offset, length uint32, more ...uint32) pci.Capability {
		b := []byte{0x09, 0, byte(16 + 4*len(more)), kind, 0, 0, 0, 0}
		for _, v := range append([]uint32{offset, length}, more...) {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		return pci.Capability{Data: b}
	}
	return []pci.Capability{
		at(1, commonOffset, commonLength),
		at(2, notifyOffset, page, notifyStride),
		at(3, isrOffset, 1),
		at(4, configOffset, page),
	}
}

// ReadBAR implements pci.Device. What is no register reads as zero.
func (d *Device) ReadBAR(offset uint64, p []byte) {
	clear(p)
	switch {
	case offset < commonLength:
		d.mu.Lock()
		defer d.mu.Unlock()
		d.readCommon(offset, p)
	case offset == isrOffset:
		d.mu.Lock()
		defer d.mu.Unlock()
		p[0], d.isr = d.isr, 0
	case offset >= configOffset && offset < configOffset+page:
		d.backend.ReadConfig(offset-configOffset, p)
	}
}

// readCommon gives any aligned part of the registers: they are laid out and copied.
func (d *Device) readCommon(offset uint64, p []byte) {
	var b [commonLength + 8]byte
	le := binary.LittleEndian
	le.PutUint32(b[regDeviceFeatureSelect:], d.devSel)
	le.PutUint32(b[regDeviceFeature:], half(d.features, d.devSel))
	le.PutUint32(b[regDriverFeatureSelect:], d.drvSel)
	le.PutUint32(b[regDriverFeature:], half(d.accepted, d.drvSel))
	le.PutUint16(b[regConfigVector:], d.cfgVec)
	le.PutUint16(b[regNumQueues:], uint16(len(d.queues)))
	b[regStatus] = d.status
	le.PutUint16(b[regQueueSelect:], d.sel)
	if q := d.selected(); q != nil {
		le.PutUint16(b[regQueueSize:], q.size)
		le.PutUint16(b[regQueueVector:], q.vector)
		if q.enable {
			b[regQueueEnable] = 1
		}
		le.PutUint16(b[regQueueNotifyOff:], d.sel)
		for i, a := range q.area {
			le.PutUint64(b[regQueueArea+8*i:], a)
		}
	}
	copy(p, b[offset:])
}

// half is 32 bits of a feature set; beyond 64 there are none.
func half(v uint64, sel uint32) uint32 {
	if sel > 1 {
		return 0
	}
	return uint32(v >> (32 * sel))
}

func (d *Device) selected() *queue {
	if int(d.sel) >= len(d.queues) {
		return nil
	}
	return d.queues[d.sel]
}

// WriteBAR implements pci.Device. A register is written with its own width (§4.1.3.1; 64-bit
// ones in halves, too); other writes are dropped.
func (d *Device) WriteBAR(offset uint64, p []byte) {
	switch {
	case offset < commonLength:
		var b [8]byte
		copy(b[:], p)
		d.writeCommon(offset, len(p), binary.LittleEndian.Uint64(b[:]))
	case offset >= notifyOffset && (offset-notifyOffset)%notifyStride == 0:
		if i := (offset - notifyOffset) / notifyStride; i < uint64(len(d.bells)) {
			one := [8]byte{1}
			_, _ = d.bells[i].Write(one[:]) // full or closed: the queue's goroutine is awake or gone
		}
	}
}

func (d *Device) writeCommon(offset uint64, width int, v uint64) {
	vector := uint16(noVector)
	defer func() { d.signal(vector) }()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reset {
		return // the driver must wait until status reads 0 (§4.1.4.3.2)
	}
	switch {
	case width == 1 && offset == regStatus:
		vector = d.writeStatus(uint8(v))
	case width == 4 && offset == regDeviceFeatureSelect:
		d.devSel = uint32(v)
	case width == 4 && offset == regDriverFeatureSelect:
		d.drvSel = uint32(v)
	case width == 4 && offset == regDriverFeature:
		if d.status&statusFeaturesOK == 0 && d.drvSel <= 1 {
			shift := 32 * d.drvSel
			d.accepted = d.accepted&^(0xffff_ffff<<shift) | uint64(uint32(v))<<shift
		}
	case width == 2 && offset == regConfigVector:
		d.cfgVec = d.vector(uint16(v))
	case width == 2 && offset == regQueueSelect:
		d.sel = uint16(v)
	default:
		d.writeQueue(offset, width, v)
	}
}

// writeQueue writes a register of the selected queue. The layout is frozen once the queue is
// enabled or the device runs (§4.1.4.3.2).
func (d *Device) writeQueue(offset uint64, width int, v uint64) {
	q := d.selected()
	if q == nil {
		return
	}
	if width == 2 && offset == regQueueVector {
		q.vector = d.vector(uint16(v))
		return
	}
	if q.enable || d.status&statusFeaturesOK == 0 || d.status&statusDriverOK != 0 {
		return
	}
	switch {
	case width == 2 && offset == regQueueSize:
		if n := uint16(v); n != 0 && n&(n-1) == 0 && n <= q.max {
			q.size = n
		}
	case width == 2 && offset == regQueueEnable:
		q.enable = v == 1
	case offset >= regQueueArea && offset < regQueueAreaEnd:
		a := &q.area[(offset-regQueueArea)/8]
		switch {
		case width == 8 && offset%8 == 0:
			*a = v
		case width == 4 && offset%8 == 0:
			*a = *a&^0xffff_ffff | v
		case width == 4 && offset%8 == 4:
			*a = *a&0xffff_ffff | v<<32
		}
	}
}

// vector is what a vector register reads as after v was written: none, if there is no such
// vector (§4.1.5.1.2.1).
func (d *Device) vector(v uint16) uint16 {
	if int(v) > len(d.queues) {
		return noVector
	}
	return v
}

// wake tells the controller that there is something to do.
func (d *Device) wake() {
	select {
	case d.restart <- struct{}{}:
	default:
	}
}

// writeStatus carries out the driver's progress (§3.1.1) and returns the vector to signal. d.mu
// is held.
func (d *Device) writeStatus(v uint8) uint16 {
	if v == 0 {
		d.reset = true
		if !d.started {
			d.clear()
			return noVector
		}
		d.wake()
		return noVector
	}
	added := v &^ d.status
	// Bits are only added (§2.1.1); NEEDS_RESET is the device's.
	if added&statusFeaturesOK != 0 && (d.accepted&^d.features != 0 || d.accepted&FeatureVersion1 == 0) {
		added &^= statusFeaturesOK
	}
	if d.status&statusFeaturesOK == 0 && added&statusFeaturesOK == 0 {
		added &^= statusDriverOK
	}
	d.status |= added &^ statusNeedsReset
	if added&statusDriverOK == 0 || d.err != nil {
		return noVector
	}
	if err := d.driverOK(); err != nil {
		d.err = err
		d.status |= statusNeedsReset
		return d.configInterrupt()
	}
	// Chains may have been made available before; an eventfd write never blocks here.
	for i := range d.bells {
		one := [8]byte{1}
		_, _ = d.bells[i].Write(one[:])
	}
	return noVector
}
