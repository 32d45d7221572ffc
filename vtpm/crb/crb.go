// Package crb is the guest's TPM device: the Command Response Buffer interface of the TCG PC
// Client Platform TPM Profile (PTP) 1.05 §6.5.3, for locality 0.
//
// Registers are answered at once, whatever the TPM behind does: drivers give a TPM little time
// to show itself. The buffer is a page of memory that the guest reads and writes without
// exits; a command is copied out of it once, at Start, before anything looks at it. A command
// runs inside the write to Start: the vCPU waits in its exit for as long as the transport
// takes and uses no processor time, which is how a guest waits for a vTPM that is not ready.
//
// Everything the guest does is hostile: accesses of any width and alignment are legal here and
// harmless, commands out of order are dropped, lengths are checked.
package crb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
)

// Where the device lies in guest-physical memory. The buffer's page follows the registers of
// the five localities.
const (
	Base       = 0xfed4_0000
	Size       = 0x6000
	Buffer     = Base + 0x5000
	BufferSize = 4096
)

// A Transport executes TPM commands.
type Transport interface {
	// Execute runs one command and returns its response, both 10 to 4096 bytes. It may wait;
	// its error is final: the TPM is gone and the guest must not run on.
	Execute(locality uint8, command []byte) ([]byte, error)
}

// A Canceler is a Transport that can be told to give up the command being executed. Cancel
// comes from another goroutine than Execute's.
type Canceler interface{ Cancel() }

// ErrResponse says that the transport broke its promise.
var ErrResponse = errors.New("response of an impossible size")

// Registers of locality 0 (PTP 1.05 table 25).
const (
	locState  = 0x00
	locCtrl   = 0x08
	locSts    = 0x0c
	intfID    = 0x30
	ctrlReq   = 0x40
	ctrlSts   = 0x44
	ctrlStop  = 0x48
	ctrlStart = 0x4c
	cmdSize   = 0x58
	cmdLow    = 0x5c
	cmdHigh   = 0x60
	rspSize   = 0x64
	rspAddr   = 0x68
	registers = 0x80

	locStateEstablished = 1 << 0 // 1: no dynamic launch took place
	locStateAssigned    = 1 << 1
	locStateValid       = 1 << 7

	locCtrlRequest    = 1 << 0
	locCtrlRelinquish = 1 << 1

	locStsGranted = 1 << 0

	ctrlReqReady = 1 << 0
	ctrlReqIdle  = 1 << 1

	ctrlStsIdle = 1 << 1

	// intfIDValue: interface type and version CRB, locality 0 only, transfers of 64 bytes,
	// CRB capable and selected, selection locked; the vendor is the one TPM emulators use.
	intfIDValue = 1 | 1<<4 | 3<<11 | 1<<14 | 1<<17 | 1<<19 | 0x1014<<32 | 0x0001<<48
)

// TPM 2.0 Part 2: the header, and the answer to a command whose size is impossible.
const (
	headerSize    = 10
	rcCommandSize = 0x142
	tagNoSessions = 0x8001
)

// A Device is one TPM interface. It is safe for concurrent use; one command runs at a time.
type Device struct {
	transport Transport
	buffer    []byte // BufferSize bytes, shared with the guest
	onAccess  func()
	onCommand func()

	access, command sync.Once

	mu       sync.Mutex // not held while a command runs
	assigned bool       // locality 0 is granted
	idle     bool
	running  bool
	cancel   uint32
}

// New makes a device over buffer (BufferSize bytes of memory that the guest sees at Buffer).
// onAccess and onCommand, if not nil, are called once each: at the first access to a register
// and before the first command goes to the transport.
func New(t Transport, buffer []byte, onAccess, onCommand func()) (*Device, error) {
	if t == nil || len(buffer) != BufferSize {
		return nil, fmt.Errorf("crb: buffer of %d bytes, want %d and a transport", len(buffer), BufferSize)
	}
	if onAccess == nil {
		onAccess = func() {}
	}
	if onCommand == nil {
		onCommand = func() {}
	}
	return &Device{transport: t, buffer: buffer, onAccess: onAccess, onCommand: onCommand, idle: true}, nil
}

// Read serves a guest's read of len(p) bytes at offset off from Base. What is not a register of
// locality 0 reads as ones.
func (d *Device) Read(off uint64, p []byte) {
	d.access.Do(d.onAccess)
	image := d.image()
	for i := range p {
		p[i] = 0xff
		if o := off + uint64(i); o < registers {
			p[i] = image[o]
		}
	}
}

// image is the registers as they are now.
func (d *Device) image() (r [registers]byte) {
	put := func(off int, v uint32) { binary.LittleEndian.PutUint32(r[off:], v) }
	d.mu.Lock()
	defer d.mu.Unlock()
	state := uint32(locStateValid | locStateEstablished)
	if d.assigned {
		state |= locStateAssigned
		put(locSts, locStsGranted)
	}
	put(locState, state)
	binary.LittleEndian.PutUint64(r[intfID:], intfIDValue)
	if d.idle {
		put(ctrlSts, ctrlStsIdle)
	}
	put(ctrlStop, d.cancel)
	if d.running {
		put(ctrlStart, 1)
	}
	put(cmdSize, BufferSize)
	put(cmdLow, Buffer&0xffff_ffff)
	put(cmdHigh, Buffer>>32)
	put(rspSize, BufferSize)
	binary.LittleEndian.PutUint64(r[rspAddr:], Buffer)
	return r
}

// Write is a guest's write at offset off from Base. Registers are 32 bits wide: a shorter
// aligned write counts as one with zeros above, an 8-byte one as two; others are dropped. It
// returns an error only when the transport failed.
func (d *Device) Write(off uint64, p []byte) error {
	d.access.Do(d.onAccess)
	if off%4 != 0 || off >= registers || len(p) > 8 {
		return nil
	}
	for len(p) > 0 {
		var word [4]byte
		n := copy(word[:], p)
		if err := d.set(off, binary.LittleEndian.Uint32(word[:])); err != nil {
			return err
		}
		off, p = off+4, p[n:]
	}
	return nil
}

func (d *Device) set(reg uint64, v uint32) error {
	d.mu.Lock()
	if d.running && reg != ctrlStop {
		d.mu.Unlock()
		return nil
	}
	switch reg {
	case locCtrl:
		if v&locCtrlRequest != 0 {
			d.assigned = true
		}
		if v&locCtrlRelinquish != 0 {
			d.assigned = false
		}
	case ctrlReq:
		switch {
		case !d.assigned:
		case v&ctrlReqReady != 0:
			d.idle = false
		case v&ctrlReqIdle != 0:
			d.idle = true
		}
	case ctrlStop:
		d.cancel = v & 1
		if c, ok := d.transport.(Canceler); ok && d.running && v&1 != 0 {
			c.Cancel()
		}
	case ctrlStart:
		if v&1 != 0 && d.assigned && !d.idle {
			d.running = true
			d.mu.Unlock()
			return d.execute()
		}
	}
	d.mu.Unlock()
	return nil
}

// execute runs the command in the buffer. d.running keeps all others out.
func (d *Device) execute() error {
	var command [BufferSize]byte
	copy(command[:], d.buffer) // once: the guest may change it meanwhile
	response, err := d.respond(command[:])
	if err == nil {
		copy(d.buffer, response)
	}
	d.mu.Lock()
	d.running = false
	d.mu.Unlock()
	return err
}

func (d *Device) respond(command []byte) ([]byte, error) {
	n := binary.BigEndian.Uint32(command[2:])
	if n < headerSize || n > BufferSize {
		r := binary.BigEndian.AppendUint16(nil, tagNoSessions)
		r = binary.BigEndian.AppendUint32(r, headerSize)
		return binary.BigEndian.AppendUint32(r, rcCommandSize), nil
	}
	d.command.Do(d.onCommand)
	response, err := d.transport.Execute(0, command[:n])
	if err != nil {
		return nil, fmt.Errorf("TPM: %w", err)
	}
	if len(response) < headerSize || len(response) > BufferSize {
		return nil, fmt.Errorf("TPM: %w: %d bytes", ErrResponse, len(response))
	}
	return response, nil
}
