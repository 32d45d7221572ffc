package serial

import (
	"bytes"
	"testing"
)

type bench struct {
	*Port
	out  bytes.Buffer
	high bool
	rose int
}

func newBench() *bench {
	b := &bench{}
	b.Port = New(&b.out, func(high bool) {
		b.high = high
		if high {
			b.rose++
		}
	})
	return b
}

func TestTransmit(t *testing.T) {
	b := newBench()
	if b.Read(regLSR) != lsrTHREmpty|lsrIdle {
		t.Error("a fresh transmitter is not empty")
	}
	b.Write(regData, []byte("hello ")...)
	b.Write(regData, 'x')
	if b.out.String() != "hello x" || b.Written() != 7 {
		t.Errorf("sent %q", b.out.String())
	}
	if b.high {
		t.Error("an interrupt that nobody enabled")
	}
}

// Each of the interrupt's causes rises, is named, and goes when served (PC16550D §8.6).
func TestInterrupts(t *testing.T) {
	b := newBench()
	b.Write(regIIR, fcrEnable)
	b.Write(regIER, ierReceive|ierTransmit)
	if !b.high || b.Read(regIIR) != iirFIFO|iirTransmit {
		t.Error("enabling the transmitter's interrupt does not raise it")
	}
	if b.high || b.Read(regIIR) != iirFIFO|iirNone {
		t.Error("naming the transmitter does not quiet it")
	}
	b.Write(regData, 'a')
	if b.rose != 2 {
		t.Error("an emptied transmitter does not interrupt")
	}
	if !b.Receive([]byte("xy")) || b.Read(regIIR) != iirFIFO|iirReceive || b.Read(regLSR)&lsrReady == 0 {
		t.Error("input does not show")
	}
	if b.Read(regData) != 'x' || b.Read(regData) != 'y' || b.Read(regLSR)&lsrReady != 0 {
		t.Error("input is not what came")
	}
	b.Read(regIIR)
	if b.high {
		t.Error("the line stays high")
	}
}

// What drivers do to find out what they have.
func TestProbe(t *testing.T) {
	b := newBench()
	b.Write(regLCR, lcrDLAB)
	b.Write(regData, 0x34)
	b.Write(regIER, 0x12)
	if b.Read(regData) != 0x34 || b.Read(regIER) != 0x12 || b.out.Len() != 0 {
		t.Error("the divisor is not kept")
	}
	b.Write(regLCR, 3)
	b.Write(regIER, 0xff)
	if b.Read(regIER) != ierMask || b.Read(regLCR) != 3 {
		t.Error("reserved bits are kept")
	}
	b.Write(regIER, 0)
	b.Write(regSCR, 0xa5)
	b.Write(regMCR, mcrLoop|0x0a)
	if b.Read(regSCR) != 0xa5 || b.Read(regMSR) != 0x90 {
		t.Errorf("loop-back reads %#x", b.Read(regMSR))
	}
	b.Write(regData, 'z')
	if b.out.Len() != 0 || b.Read(regData) != 'z' {
		t.Error("loop-back leaves the port")
	}
	b.Write(regMCR, 0)
	if b.Read(regMSR) != msrReady || b.Read(9) != 0xff {
		t.Error("idle inputs are wrong")
	}
}

func TestCloseFreesReceive(t *testing.T) {
	b := newBench()
	done := make(chan bool)
	go func() { done <- b.Receive(make([]byte, queueSize+1)) }()
	b.Close()
	if <-done {
		t.Error("Receive on a closed port succeeds")
	}
}

func FuzzRegisters(f *testing.F) {
	f.Add([]byte{0x81, 0xff, 0x80, 'a', 2, 0, 0x84, 0x10, 0x80, 'b', 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		b := newBench()
		for ; len(script) >= 2; script = script[2:] {
			switch reg := script[0] & 7; script[0] >> 6 {
			case 0:
				b.Read(reg)
			case 1:
				b.queue = append(b.queue[:0], script[1])
				b.mu.Lock()
				b.update()
				b.mu.Unlock()
			default:
				b.Write(reg, script[1])
			}
			if b.high != (b.cause() != iirNone) {
				t.Fatal("the line and the cause disagree")
			}
			if len(b.queue) > queueSize {
				t.Fatal("the queue grows")
			}
		}
	})
}
