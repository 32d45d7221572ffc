package monitor

import (
	"errors"
	"fmt"
	"sync/atomic"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/kvm"
	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/vtpm/crb"
)

// A vcpu is one virtual CPU and what its goroutine knows.
type vcpu struct {
	*kvm.VCPU
	m     *Machine
	still bool // under Machine.mu: it is not in the guest and will ask before it goes there
	away  bool // under Machine.mu: it is at the fence, so not in the guest, and will ask before it goes there

	untold uint64 // exits until Config.OnExits; the loop's

	exits [kvm.NumReasons]atomic.Uint64
	areas [numAreas]atomic.Uint64
}

// loop runs the vCPU until the machine stops.
//
// The way in and out costs no lock: whoever wants the vCPU out of the guest sets what it wants
// under Machine.mu, then kicks; the next Run comes back interrupted, also the one that only
// completes an access, and only then the vCPU looks.
func (c *vcpu) loop() {
	c.Lock()
	defer c.Unlock()
	defer func() { // the last word: it will not enter the guest again
		c.m.mu.Lock()
		c.still = true
		c.m.changed.Broadcast()
		c.m.mu.Unlock()
	}()
	if !c.admit() {
		return
	}
	c.untold = c.m.cfg.ExitsEvery // of none the count never comes back to nothing
	for {
		reason, err := c.Run()
		if errors.Is(err, kvm.ErrInterrupted) {
			if !c.admit() {
				return
			}
			continue
		}
		if reason < kvm.NumReasons {
			c.exits[reason].Add(1)
		}
		if c.untold--; c.untold == 0 {
			c.untold = c.m.cfg.ExitsEvery
			c.m.cfg.OnExits()
		}
		if c.m.coalesced {
			c.m.drain(c)
		}
		if err == nil {
			err = c.handle(reason)
		}
		if err != nil {
			c.m.end(Outcome{Crash, fmt.Sprintf("vCPU %d: %v", c.ID, err)})
		}
	}
}

// admit waits until the vCPU may enter the guest; false: never again.
func (c *vcpu) admit() bool {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	c.ClearKick()
	return c.wait()
}

// wait is the place where a paused vCPU stays. Machine.mu is held.
func (c *vcpu) wait() bool {
	for (c.m.paused || c.m.held) && !c.m.stop {
		if !c.still {
			c.still = true
			c.m.changed.Broadcast()
		}
		c.m.changed.Wait()
	}
	c.still = false
	return !c.m.stop
}

func (c *vcpu) handle(reason kvm.Reason) error {
	switch reason {
	case kvm.ExitIO:
		x, err := c.IO()
		if err != nil {
			return err
		}
		if c.m.fence != nil && x.Out && x.Port == isolate.ProbePort {
			ours, err := c.fenced(func() (bool, error) { return c.m.fence.Probed(c.ID, x.Port) })
			if ours || err != nil {
				return err
			}
		}
		return c.port(x)
	case kvm.ExitMMIO:
		return c.mmio(c.MMIO())
	case kvm.ExitShutdown:
		c.m.end(Outcome{TripleFault, fmt.Sprintf("vCPU %d shut down", c.ID)})
		return nil
	case kvm.ExitHalt, kvm.ExitInterrupted:
		return nil
	case kvm.ExitInternalError, kvm.ExitFailEntry:
		if c.m.fence != nil && reason == kvm.ExitInternalError {
			ours, err := c.fenced(func() (bool, error) { return c.m.fence.Fetched(c.ID) })
			if ours || err != nil {
				return err
			}
		}
		return errors.New(c.Failure())
	}
	return fmt.Errorf("unexpected exit %v", reason)
}

// port serves a port access: Count accesses of Size bytes each.
func (c *vcpu) port(x kvm.IO) error {
	for i := 0; i+x.Size <= len(x.Data); i += x.Size {
		p := x.Data[i : i+x.Size]
		if x.Out {
			c.portWrite(x.Port, p)
		} else {
			c.portRead(x.Port, p)
		}
	}
	return nil
}

func (c *vcpu) portRead(port uint16, p []byte) {
	for i := range p {
		p[i] = 0xff
	}
	switch {
	case port >= portSerial && port < portSerial+8:
		c.areas[areaSerial].Add(1)
		p[0] = c.m.serial.Read(byte(port - portSerial))
	case port == portSleepControl || port == portSleepStatus || port == portReset:
		c.areas[areaACPI].Add(1)
		p[0] = 0
	case port == portKeyboard:
		c.areas[areaOtherPort].Add(1)
		p[0] = 0 // a controller that is never busy: a guest that resets through it asks first
	default:
		c.areas[areaOtherPort].Add(1)
	}
}

func (c *vcpu) portWrite(port uint16, p []byte) {
	v := p[0]
	switch {
	case port >= portSerial && port < portSerial+8:
		c.areas[areaSerial].Add(1)
		c.m.serial.Write(byte(port-portSerial), v)
		return
	case port == portSleepControl && v&sleepEnable != 0:
		// Only S5 is offered; any other state a guest invents is an end as well.
		c.m.end(Outcome{PowerOff, fmt.Sprintf("sleep state %d", v>>2&7)})
	case port == portReset && v == resetValue:
		c.m.end(Outcome{Reboot, "reset register"})
	case port == portKeyboard && v == keyboardReset:
		c.m.end(Outcome{Reboot, "keyboard controller"})
	case port == portResetControl && v&resetControlSystem != 0:
		c.m.end(Outcome{Reboot, "reset control register"})
	}
	c.areas[areaOtherPort].Add(1)
}

// mmio serves an access to an address without memory.
func (c *vcpu) mmio(x kvm.MMIO) error {
	n := uint64(len(x.Data))
	switch a := x.Address; {
	case c.m.tpm != nil && a >= crb.Base && a < crb.Base+crb.Size:
		c.areas[areaTPM].Add(1)
		if c.m.fence != nil {
			if _, err := c.fenced(func() (bool, error) { return true, c.m.fence.Plant(c.ID) }); err != nil {
				return err // what was to be fenced does not run without
			}
		}
		if x.Write {
			return c.tpmWrite(a-crb.Base, x.Data)
		}
		c.m.tpm.Read(a-crb.Base, x.Data)
	case a >= ecamBase && a < ecamBase+pci.ECAMSize:
		c.areas[areaConfig].Add(1)
		if x.Write && n <= ecamBase+pci.ECAMSize-a {
			c.m.bus.WriteConfig(a-ecamBase, x.Data)
		} else if !x.Write {
			c.m.bus.ReadConfig(a-ecamBase, x.Data)
		}
	case a >= barBase && a < barLimit:
		c.areas[areaBAR].Add(1)
		if x.Write {
			c.m.bus.Write(a, x.Data)
		} else {
			c.m.bus.Read(a, x.Data)
		}
	case c.m.fence != nil && c.m.fence.Touched(a, x.Data, x.Write):
		c.areas[areaFenced].Add(1)
	default:
		c.areas[areaOtherMemory].Add(1)
		if !x.Write {
			for i := range x.Data {
				x.Data[i] = 0xff
			}
		}
	}
	return nil
}

// tpmWrite may wait in the transport: meanwhile the vCPU counts as still, and it goes back to
// the guest only when the guest may run.
func (c *vcpu) tpmWrite(off uint64, p []byte) error {
	// The shared page must not change under a command that waits for long.
	data := append([]byte(nil), p...)
	c.m.mu.Lock()
	c.still = true
	c.m.changed.Broadcast()
	c.m.mu.Unlock()
	err := c.m.tpm.Write(off, data)
	c.m.mu.Lock()
	c.wait()
	c.m.mu.Unlock()
	return err
}

// transport is the configured one; it exists to keep the machine's own methods off the TPM's.
type transport struct{ m *Machine }

func (t transport) Execute(locality uint8, command []byte) ([]byte, error) {
	return t.m.cfg.TPM.Execute(locality, command)
}

func (t transport) Cancel() {
	if c, ok := t.m.cfg.TPM.(crb.Canceler); ok {
		c.Cancel()
	}
}

// drain takes the console bytes that the kernel queued, before anything else is looked at.
func (m *Machine) drain(c *vcpu) {
	m.ring.Lock()
	defer m.ring.Unlock()
	var buf [256]byte
	n := 0
	c.Drain(func(w kvm.Coalesced) {
		if !w.Port || w.Address != portSerial || w.Len != 1 {
			return
		}
		if n == len(buf) {
			m.serial.Write(0, buf[:n]...)
			n = 0
		}
		buf[n] = w.Data[0]
		n++
	})
	if n > 0 {
		m.serial.Write(0, buf[:n]...)
	}
}
