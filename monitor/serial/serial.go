// Package serial is a 16550A UART without wires: what the guest writes goes to a writer at
// once, what comes in waits in its receive queue.
//
// It is built for few exits: the transmitter is always empty, so a driver with a FIFO writes
// 16 bytes a time without asking; and writes to the data register may be queued by the kernel
// and handed over later ([Port.Write] in order), because every other register access, which
// brings the queue along, sees them first.
//
// Reference: National Semiconductor PC16550D data sheet §8.
package serial

import (
	"io"
	"sync"
)

// Registers are at offsets 0–7.
const Registers = 8

// Offsets.
const (
	regData = 0 // divisor low with DLAB
	regIER  = 1 // divisor high with DLAB
	regIIR  = 2 // FCR on writes
	regLCR  = 3
	regMCR  = 4
	regLSR  = 5
	regMSR  = 6
	regSCR  = 7
)

const (
	ierReceive  = 1 << 0
	ierTransmit = 1 << 1
	ierMask     = 0x0f

	iirNone     = 0x01
	iirTransmit = 0x02
	iirReceive  = 0x04
	iirFIFO     = 0xc0

	fcrEnable       = 1 << 0
	fcrClearReceive = 1 << 1

	lcrDLAB = 1 << 7

	mcrLoop = 1 << 4
	mcrMask = 0x1f

	lsrReady    = 1 << 0
	lsrTHREmpty = 1 << 5
	lsrIdle     = 1 << 6

	msrReady = 0xb0 // carrier, data set ready, clear to send
)

// queueSize bounds what waits to be read by the guest.
const queueSize = 4096

// A Port is one UART, safe for concurrent use.
type Port struct {
	out  io.Writer
	line func(high bool) // the interrupt line

	mu            sync.Mutex
	room          *sync.Cond // receive queue shrank, or closed
	queue         []byte
	closed        bool
	ier, lcr, mcr byte
	fcr, scr      byte
	divisor       [2]byte
	sent          bool // "transmitter empty" interrupt is due
	high          bool // the line, as last told
	written       uint64
}

// New makes a port. out gets the guest's output from its vCPU's goroutine: it should not block
// for long. line drives the interrupt; it is called under the port's lock.
func New(out io.Writer, line func(high bool)) *Port {
	p := &Port{out: out, line: line, divisor: [2]byte{1, 0}}
	p.room = sync.NewCond(&p.mu)
	return p
}

// Read is the guest's read of a register.
func (p *Port) Read(reg byte) byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch reg {
	case regData:
		if p.lcr&lcrDLAB != 0 {
			return p.divisor[0]
		}
		if len(p.queue) == 0 {
			return 0
		}
		b := p.queue[0]
		p.queue = p.queue[1:]
		p.room.Signal()
		p.update()
		return b
	case regIER:
		if p.lcr&lcrDLAB != 0 {
			return p.divisor[1]
		}
		return p.ier
	case regIIR:
		v := p.cause()
		if v == iirTransmit { // reading it is the acknowledgement
			p.sent = false
			p.update()
		}
		if p.fcr&fcrEnable != 0 {
			v |= iirFIFO
		}
		return v
	case regLCR:
		return p.lcr
	case regMCR:
		return p.mcr
	case regLSR:
		v := byte(lsrTHREmpty | lsrIdle)
		if len(p.queue) > 0 {
			v |= lsrReady
		}
		return v
	case regMSR:
		if p.mcr&mcrLoop != 0 {
			// Outputs come back as inputs: RTS→CTS, DTR→DSR, OUT1→RI, OUT2→DCD.
			return p.mcr&1<<5 | p.mcr&2<<3 | p.mcr&4<<4 | p.mcr&8<<4
		}
		return msrReady
	case regSCR:
		return p.scr
	}
	return 0xff
}

// Write is the guest's write to a register, one or more bytes in order. The writer's errors
// are dropped: a console that nobody can take is no reason to stop a guest.
func (p *Port) Write(reg byte, data ...byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if reg == regData && p.lcr&lcrDLAB == 0 {
		p.transmit(data)
		return
	}
	for _, b := range data {
		p.write(reg, b)
	}
	p.update()
}

func (p *Port) transmit(data []byte) {
	if p.mcr&mcrLoop != 0 {
		if n := queueSize - len(p.queue); len(data) > n {
			data = data[:n]
		}
		p.queue = append(p.queue, data...)
	} else {
		p.written += uint64(len(data))
		_, _ = p.out.Write(data)
	}
	p.sent = true
	p.update()
}

func (p *Port) write(reg, b byte) {
	switch reg {
	case regData:
		p.divisor[0] = b
	case regIER:
		if p.lcr&lcrDLAB != 0 {
			p.divisor[1] = b
			return
		}
		if b&^p.ier&ierTransmit != 0 { // enabling it with an empty transmitter raises it
			p.sent = true
		}
		p.ier = b & ierMask
	case regIIR:
		p.fcr = b & fcrEnable
		if b&fcrClearReceive != 0 {
			p.queue = nil
			p.room.Signal()
		}
	case regLCR:
		p.lcr = b
	case regMCR:
		p.mcr = b & mcrMask
	case regSCR:
		p.scr = b
	}
}

// cause is the interrupt identification without the FIFO bits.
func (p *Port) cause() byte {
	switch {
	case p.ier&ierReceive != 0 && len(p.queue) > 0:
		return iirReceive
	case p.ier&ierTransmit != 0 && p.sent:
		return iirTransmit
	}
	return iirNone
}

func (p *Port) update() {
	if high := p.cause() != iirNone; high != p.high {
		p.high = high
		p.line(high)
	}
}

// Receive hands input to the guest and waits while its queue is full. It reports false once
// the port is closed.
func (p *Port) Receive(data []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(data) > 0 {
		for len(p.queue) >= queueSize && !p.closed {
			p.room.Wait()
		}
		if p.closed {
			return false
		}
		n := min(len(data), queueSize-len(p.queue))
		p.queue = append(p.queue, data[:n]...)
		data = data[n:]
		p.update()
	}
	return !p.closed
}

// Close lets go of a waiting Receive.
func (p *Port) Close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.room.Broadcast()
}

// Written counts the bytes the guest has sent.
func (p *Port) Written() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.written
}
