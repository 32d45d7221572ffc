package monitor

import (
	"errors"
	"fmt"

	"redoubt.dev/redoubt/kvm"
)

// msrTSC is IA32_TIME_STAMP_COUNTER.
const msrTSC = 0x10

// frozenClock is the guest's time at Pause.
type frozenClock struct {
	kvm kvm.Clock
	tsc uint64 // of vCPU 0
}

// Pause brings every vCPU out of the guest and stops its clock; it returns when none runs. A
// vCPU waiting in the TPM transport counts as stopped, so the transport itself may call Pause.
// Pausing a paused machine does nothing.
func (m *Machine) Pause() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.paused || m.ended || m.stop {
		return nil
	}
	m.paused = true
	for _, c := range m.vcpus {
		c.Kick()
	}
	for !m.allStill() && !m.stop {
		m.changed.Wait()
	}
	if m.stop {
		return errors.New("monitor: pause: the machine stopped")
	}
	if err := m.freeze(); err != nil {
		return fmt.Errorf("monitor: pause: %w", err)
	}
	return nil
}

// Resume lets the guest go on as if no time had passed.
func (m *Machine) Resume() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.paused {
		return nil
	}
	if m.closed || m.stop {
		return errors.New("monitor: resume: the machine stopped")
	}
	if err := m.thaw(); err != nil {
		return fmt.Errorf("monitor: resume: %w", err)
	}
	m.paused = false
	m.changed.Broadcast()
	return nil
}

func (m *Machine) allStill() bool {
	for _, c := range m.vcpus {
		if !c.still {
			return false
		}
	}
	return true
}

// freeze notes the guest's time. Every vCPU is still.
func (m *Machine) freeze() error {
	var err error
	if m.clock.kvm, err = m.vm.Clock(); err != nil {
		return err
	}
	m.clock.tsc, err = m.tsc()
	return err
}

func (m *Machine) tsc() (uint64, error) {
	r := []kvm.MSR{{Index: msrTSC}}
	err := m.vcpus[0].MSRs(r)
	return r[0].Value, err
}

// thaw sets the guest's time back to what freeze noted: each vCPU's counter by the same
// distance, so that they stay in step with each other; then kvmclock, and the word to the
// guest's watchdogs that it was stopped.
func (m *Machine) thaw() error {
	now, err := m.tsc()
	if err != nil {
		return err
	}
	lost := now - m.clock.tsc
	for _, c := range m.vcpus {
		if err := c.rewind(lost, m.clock.tsc); err != nil {
			return err
		}
	}
	if err := m.vm.SetClock(m.clock.kvm); err != nil {
		return err
	}
	for _, c := range m.vcpus {
		if err := c.MarkStopped(); err != nil {
			return err
		}
	}
	return nil
}

// rewind takes lost ticks off the vCPU's counter; where the kernel cannot do it exactly, it
// sets the counter, and the kernel keeps counters written together in step.
func (c *vcpu) rewind(lost, value uint64) error {
	off, err := c.TSCOffset()
	if errors.Is(err, kvm.ErrNotSupported) {
		return c.SetMSRs([]kvm.MSR{{Index: msrTSC, Value: value}})
	}
	if err != nil {
		return err
	}
	return c.SetTSCOffset(off - lost)
}

const (
	flagInterrupts = 1 << 9 // RFLAGS.IF, Intel SDM volume 1, §3.4.3.3
	resetFlags     = 2
)

// Masked says which vCPUs have interrupts switched off, but for those that the guest has never started. The machine is paused.
func (m *Machine) Masked() (masked []int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.paused || m.stop {
		return nil, errors.New("monitor: the machine is not paused")
	}
	for _, c := range m.vcpus {
		r, err := c.Regs()
		if err != nil {
			return nil, fmt.Errorf("monitor: vCPU %d: %w", c.ID, err)
		}
		// After a reset only the first one runs; the others wait, at an address no kernel runs at, for their start.
		if r.RFLAGS&flagInterrupts == 0 && (c.ID == 0 || r.RFLAGS != resetFlags || r.RIP != 0xfff0) {
			masked = append(masked, c.ID)
		}
	}
	return masked, nil
}

// Exits is how often the guest's vCPUs have left it since the start. It may be called at any time.
func (m *Machine) Exits() (n uint64) {
	for _, c := range m.vcpus {
		for r := range c.exits {
			n += c.exits[r].Load()
		}
	}
	return n
}
