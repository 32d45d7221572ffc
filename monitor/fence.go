package monitor

import (
	"cmp"
	"fmt"
	"slices"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/kvm"
)

// makeFence makes what isolates the guest's modules, if anything does.
func (m *Machine) makeFence(sys *kvm.System) error {
	if m.cfg.Modules == nil {
		return nil
	}
	supported, err := sys.SupportedCPUID()
	if err != nil {
		return err
	}
	deadline, err := sys.Check(kvm.TSCDeadline)
	if err != nil {
		return err
	}
	var cpus []isolate.CPU
	for id, c := range m.vcpus {
		cpus = append(cpus, isolate.CPU{VCPU: c.VCPU, CPUID: cpuid(supported, id, len(m.vcpus), deadline > 0)})
	}
	m.fence, err = isolate.New(isolate.Config{
		System: sys, CPUs: cpus, Memory: m.mem, Modules: *m.cfg.Modules, OnEvent: m.cfg.OnModule, Hold: m.hold,
		// RAM is in no slot while a piece of it is made two.
		Punch: func(cpu int, pages []uint64) error { return m.hold(cpu, func() error { return m.punch(pages) }) },
	})
	if err != nil {
		return err
	}
	return m.vm.ExitOnEmulationFailure()
}

// Fenced reports on the guest's modules; false: they are not fenced.
func (m *Machine) Fenced() (isolate.Report, bool) {
	if m.fence == nil {
		return isolate.Report{}, false
	}
	return m.fence.Report(), true
}

// fenced lets a vCPU do something at the fence, where it may wait for others and run a module: it is not in the guest meanwhile,
// and does not go back while another one holds it.
func (c *vcpu) fenced(do func() (bool, error)) (bool, error) {
	c.m.mu.Lock()
	c.away = true
	if c.m.held {
		c.m.changed.Broadcast()
	}
	c.m.mu.Unlock()
	ours, err := do()
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	for c.m.held && !c.m.stop {
		c.m.changed.Wait()
	}
	c.away = false
	return ours, err
}

// hold runs f while no vCPU but the caller's, which is out, is in the guest. One at a time may hold: the fence sees to that.
func (m *Machine) hold(cpu int, f func() error) error {
	m.mu.Lock()
	m.held = true
	for _, c := range m.vcpus {
		if c.ID != cpu {
			c.Kick()
		}
	}
	for !m.othersOut(cpu) && !m.stop {
		m.changed.Wait()
	}
	stopped := m.stop
	m.mu.Unlock()
	var err error
	if !stopped { // else none goes back there
		err = f()
	}
	m.mu.Lock()
	m.held = false
	m.changed.Broadcast()
	m.mu.Unlock()
	return err
}

func (m *Machine) othersOut(cpu int) bool {
	for _, c := range m.vcpus {
		if c.ID != cpu && !c.still && !c.away {
			return false
		}
	}
	return true
}

// piece is RAM in one memory slot.
type piece struct {
	gpa  uint64
	size uint64
}

// punch gives the machine all RAM but some pages, by address, in order. No vCPU is in the guest.
func (m *Machine) punch(holes []uint64) error {
	want := map[piece]bool{}
	for _, r := range []piece{{0, uint64(len(m.mem.low))}, {highRAMBase, uint64(len(m.mem.high))}} {
		at := r.gpa
		for _, h := range holes {
			if h < r.gpa || h >= r.gpa+r.size {
				continue
			}
			if h > at {
				want[piece{at, h - at}] = true
			}
			at = h + pageSize
		}
		if at < r.gpa+r.size {
			want[piece{at, r.gpa + r.size - at}] = true
		}
	}
	for p, slot := range m.pieces {
		if want[p] {
			delete(want, p)
			continue
		}
		if err := m.vm.SetMemory(slot, 0, p.gpa, nil); err != nil {
			return err
		}
		delete(m.pieces, p)
		m.free = append(m.free, slot)
	}
	slices.SortFunc(m.free, func(a, b uint32) int { return cmp.Compare(b, a) })
	for p := range want {
		b, err := m.mem.Slice(p.gpa, p.size)
		if err != nil {
			return fmt.Errorf("RAM at %#x: %w", p.gpa, err)
		}
		slot := firstRAM + uint32(len(m.pieces))
		if n := len(m.free); n > 0 {
			slot, m.free = m.free[n-1], m.free[:n-1]
		}
		if err := m.vm.SetMemory(slot, 0, p.gpa, b); err != nil {
			return err
		}
		m.pieces[p] = slot
	}
	return nil
}
