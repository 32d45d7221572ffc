package crb

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
)

// echo answers every command with its own header and the bytes it got.
type echo struct {
	got [][]byte
	err error
	run func()
}

func (e *echo) Execute(locality uint8, command []byte) ([]byte, error) {
	e.got = append(e.got, append([]byte{locality}, command...))
	if e.run != nil {
		e.run()
	}
	if e.err != nil {
		return nil, e.err
	}
	return append([]byte(nil), command...), nil
}

func word(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

func (d *Device) read32(reg uint64) uint32 {
	p := make([]byte, 4)
	d.Read(reg, p)
	return binary.LittleEndian.Uint32(p)
}

func (d *Device) must(t *testing.T, reg uint64, v uint32) {
	t.Helper()
	if err := d.Write(reg, word(v)); err != nil {
		t.Fatal(err)
	}
}

func command(n int) []byte {
	c := make([]byte, n)
	binary.BigEndian.PutUint16(c, tagNoSessions)
	binary.BigEndian.PutUint32(c[2:], uint32(n))
	for i := 6; i < n; i++ {
		c[i] = byte(i)
	}
	return c
}

// A driver's whole conversation (PTP 1.05 §6.5.3.5).
func TestCommand(t *testing.T) {
	buffer := make([]byte, BufferSize)
	tpm := &echo{}
	accesses, commands := 0, 0
	d, err := New(tpm, buffer, func() { accesses++ }, func() { commands++ })
	if err != nil {
		t.Fatal(err)
	}
	if d.read32(locState) != locStateValid|locStateEstablished || d.read32(locSts) != 0 {
		t.Error("a fresh device has a locality")
	}
	if id := d.read32(intfID); id&0xf != 1 || id>>17&3 != 1 {
		t.Errorf("interface %#x is not a CRB", id)
	}
	d.must(t, ctrlStart, 1)
	d.must(t, locCtrl, locCtrlRequest)
	d.must(t, ctrlStart, 1)
	if len(tpm.got) != 0 {
		t.Fatal("a command ran while the TPM was idle")
	}
	if d.read32(locState)&locStateAssigned == 0 || d.read32(ctrlSts)&ctrlStsIdle == 0 {
		t.Error("locality not granted, or not idle")
	}
	d.must(t, ctrlReq, ctrlReqReady)
	if d.read32(ctrlReq) != 0 || d.read32(ctrlSts) != 0 {
		t.Error("not ready")
	}
	want := command(20)
	copy(buffer, want)
	tpm.run = func() {
		if d.read32(ctrlStart) != 1 {
			t.Error("Start reads 0 while the command runs")
		}
		d.must(t, ctrlReq, ctrlReqIdle) // dropped
		clear(buffer)                   // the guest changes the buffer: too late
	}
	d.must(t, ctrlStart, 1)
	if len(tpm.got) != 1 || tpm.got[0][0] != 0 || !bytes.Equal(tpm.got[0][1:], want) {
		t.Errorf("the TPM got %x", tpm.got)
	}
	if !bytes.Equal(buffer[:20], want) || d.read32(ctrlStart) != 0 || d.read32(ctrlSts) != 0 {
		t.Errorf("response %x, start %d", buffer[:20], d.read32(ctrlStart))
	}
	d.must(t, ctrlReq, ctrlReqIdle)
	d.must(t, locCtrl, locCtrlRelinquish)
	if d.read32(locSts) != 0 || d.read32(ctrlSts) != ctrlStsIdle {
		t.Error("not relinquished")
	}
	if accesses != 1 || commands != 1 {
		t.Errorf("%d accesses and %d commands were told", accesses, commands)
	}
}

func ready(t *testing.T, tpm Transport, buffer []byte) *Device {
	t.Helper()
	d, err := New(tpm, buffer, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.must(t, locCtrl, locCtrlRequest)
	d.must(t, ctrlReq, ctrlReqReady)
	return d
}

// A size that cannot be is answered here: the transport sees only whole commands.
func TestImpossibleSizes(t *testing.T) {
	for _, n := range []uint32{0, 9, BufferSize + 1, 1 << 31, 0xffff_ffff} {
		buffer := make([]byte, BufferSize)
		tpm := &echo{}
		d := ready(t, tpm, buffer)
		binary.BigEndian.PutUint32(buffer[2:], n)
		d.must(t, ctrlStart, 1)
		if len(tpm.got) != 0 || binary.BigEndian.Uint32(buffer[6:]) != rcCommandSize {
			t.Errorf("size %d: %d commands, response %x", n, len(tpm.got), buffer[:10])
		}
	}
}

func TestTransportFailure(t *testing.T) {
	gone := errors.New("gone")
	buffer := make([]byte, BufferSize)
	copy(buffer, command(10))
	if err := ready(t, &echo{err: gone}, buffer).Write(ctrlStart, word(1)); !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
	for _, n := range []int{0, 9, BufferSize + 1} {
		if err := ready(t, sized(n), buffer).Write(ctrlStart, word(1)); !errors.Is(err, ErrResponse) {
			t.Errorf("response of %d bytes: error %v", n, err)
		}
	}
}

type sized int

func (n sized) Execute(uint8, []byte) ([]byte, error) { return make([]byte, n), nil }

// canceler waits in Execute for Cancel.
type canceler struct {
	entered, canceled chan struct{}
}

func (c canceler) Execute(_ uint8, command []byte) ([]byte, error) {
	close(c.entered)
	<-c.canceled
	return command, nil
}
func (c canceler) Cancel() { close(c.canceled) }

func TestCancel(t *testing.T) {
	buffer := make([]byte, BufferSize)
	copy(buffer, command(10))
	c := canceler{make(chan struct{}), make(chan struct{})}
	d := ready(t, c, buffer)
	d.must(t, ctrlStop, 1) // nothing runs: only remembered
	d.must(t, ctrlStop, 0)
	var run sync.WaitGroup
	run.Go(func() { d.must(t, ctrlStart, 1) })
	<-c.entered
	d.must(t, ctrlStop, 1)
	run.Wait()
}

// Accesses of any shape are harmless; other localities are not there.
func TestShapes(t *testing.T) {
	d := ready(t, &echo{}, make([]byte, BufferSize))
	p := make([]byte, 8)
	d.Read(rspAddr, p)
	if binary.LittleEndian.Uint64(p) != Buffer {
		t.Errorf("response address %#x", p)
	}
	d.Read(cmdLow+1, p[:2])
	if p[0] != Buffer>>8&0xff || p[1] != Buffer>>16&0xff {
		t.Errorf("unaligned read %x", p[:2])
	}
	d.Read(registers-1, p[:4])
	d.Read(0x1000, p[:4])
	if p[0] != 0xff {
		t.Error("locality 1 is there")
	}
	if err := errors.Join(d.Write(ctrlReq+1, []byte{1}), d.Write(ctrlReq, []byte{ctrlReqIdle}), d.Write(ctrlSts, make([]byte, 8))); err != nil {
		t.Error(err)
	}
	if d.read32(ctrlSts) != ctrlStsIdle {
		t.Error("a byte write to a register was dropped")
	}
}

// FuzzRegisters plays a hostile driver: each 4 bytes are one access.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{1, 8, 4, 1, 1, 0x40, 4, 1, 2, 3, 10, 0, 1, 0x4c, 4, 1, 0, 0x44, 4, 0})
	f.Add([]byte{1, 0x4c, 8, 1, 0, 0x7d, 8, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		buffer := make([]byte, BufferSize)
		tpm := &echo{}
		d, err := New(tpm, buffer, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		for ; len(script) >= 4; script = script[4:] {
			off, p := uint64(script[1]), make([]byte, script[2]%10)
			for i := range p {
				p[i] = script[3]
			}
			switch script[0] % 3 {
			case 0:
				d.Read(off, p)
			case 1:
				if err := d.Write(off, p); err != nil {
					t.Fatal(err)
				}
			case 2:
				copy(buffer[off:], p)
			}
		}
		for _, c := range tpm.got {
			if n := len(c) - 1; n < headerSize || n > BufferSize || c[0] != 0 {
				t.Errorf("the transport got %d bytes at locality %d", n, c[0])
			}
		}
	})
}
