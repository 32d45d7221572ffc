package kvm

import (
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
)

// machine is a VM with one page of code at 0 and one vCPU in real mode.
func machine(t *testing.T, code []byte) (*VM, *VCPU) {
	t.Helper()
	s, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	vm, err := s.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	memory, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	copy(memory, code)
	if err := errors.Join(vm.SetMemory(0, 0, 0, memory), vm.SetPrivatePages(0xfeffc000, 0xfeffd000)); err != nil {
		t.Fatal(err)
	}
	c, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	sregs, err := c.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	sregs.CS.Base, sregs.CS.Selector = 0, 0
	if err := errors.Join(c.SetSregs(sregs), c.SetRegs(Regs{RFLAGS: 2})); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(), vm.Close(), s.Close(), unix.Munmap(memory)); err != nil {
			t.Error(err)
		}
	})
	return vm, c
}

// Exits carry what the guest did, and what the caller answers arrives.
func TestRunExits(t *testing.T) {
	lab.NeedsKVM(t)
	_, c := machine(t, []byte{
		0xe4, 0x42, // in $0x42, %al
		0xe6, 0x43, // out %al, $0x43
		0xa2, 0x00, 0x20, // mov %al, 0x2000: no memory there
		0xf4, // hlt
	})
	c.Lock()
	defer c.Unlock()
	next := func(want Reason) {
		t.Helper()
		for {
			r, err := c.Run()
			if errors.Is(err, ErrInterrupted) { // the Go runtime's own signal
				continue
			}
			if err != nil || r != want {
				t.Fatalf("exit %v, %v; want %v", r, err, want)
			}
			return
		}
	}
	next(ExitIO)
	x, err := c.IO()
	if err != nil || x.Out || x.Port != 0x42 || len(x.Data) != 1 {
		t.Fatalf("%+v, %v", x, err)
	}
	x.Data[0] = 0x5a
	next(ExitIO)
	if x, err = c.IO(); err != nil || !x.Out || x.Port != 0x43 || x.Data[0] != 0x5a {
		t.Fatalf("%+v, %v", x, err)
	}
	next(ExitMMIO)
	if m := c.MMIO(); !m.Write || m.Address != 0x2000 || len(m.Data) != 1 || m.Data[0] != 0x5a {
		t.Fatalf("%+v", m)
	}
	next(ExitHalt)
}

// A kick reaches a guest that never exits, and one that comes before Run is not lost.
func TestKick(t *testing.T) {
	lab.NeedsKVM(t)
	_, c := machine(t, []byte{0xe6, 0x10, 0xeb, 0xfe}) // out; then jump to itself
	locked, kicked := make(chan struct{}), make(chan struct{})
	var run sync.WaitGroup
	run.Go(func() {
		c.Lock()
		defer c.Unlock()
		for {
			if r, err := c.Run(); err == nil && r == ExitIO {
				break
			}
		}
		close(locked)
		for { // the runtime's signals may come first: only the kick is for us
			if _, err := c.Run(); !errors.Is(err, ErrInterrupted) {
				t.Errorf("Run: %v", err)
				return
			}
			select {
			case <-kicked:
				return
			default:
			}
		}
	})
	<-locked
	close(kicked)
	c.Kick()
	run.Wait()
	c.Lock()
	defer c.Unlock()
	if _, err := c.Run(); !errors.Is(err, ErrInterrupted) {
		t.Errorf("Run after a kick: %v", err)
	}
}

// Coalesced writes cost no exit and arrive in order.
func TestCoalescedPort(t *testing.T) {
	lab.NeedsKVM(t)
	vm, c := machine(t, []byte{
		0xb0, 'a', 0xe6, 0x42, 0xb0, 'b', 0xe6, 0x42, 0xb0, 'c', 0xe6, 0x42, // out 'a', 'b', 'c'
		0xf4,
	})
	if err := vm.CoalescePort(0x42); err != nil {
		t.Fatal(err)
	}
	c.Lock()
	defer c.Unlock()
	for {
		r, err := c.Run()
		if errors.Is(err, ErrInterrupted) {
			continue
		}
		if err != nil || r != ExitHalt {
			t.Fatalf("exit %v, %v", r, err)
		}
		break
	}
	var got []byte
	c.Drain(func(w Coalesced) {
		if w.Port && w.Address == 0x42 && w.Len == 1 {
			got = append(got, w.Data[0])
		}
	})
	if string(got) != "abc" {
		t.Errorf("drained %q", got)
	}
}

func TestTSCOffset(t *testing.T) {
	lab.NeedsKVM(t)
	_, c := machine(t, []byte{0xf4})
	off, err := c.TSCOffset()
	if err != nil {
		t.Fatal(err)
	}
	// A host whose own counter is unstable (the lab's) lets it drift while nobody runs.
	const back, drift = 1 << 40, 1 << 34
	if err := c.SetTSCOffset(off - back); err != nil {
		t.Fatal(err)
	}
	got, err := c.TSCOffset()
	if d := int64(got - (off - back)); err != nil || d > drift || d < -drift {
		t.Errorf("offset %d, %v; want about %d", got, err, off-back)
	}
}
