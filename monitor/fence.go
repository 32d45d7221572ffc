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
	m.fence, err = isolate.New(isolate.Config{
		System: sys, Kernel: m.vcpus[0].VCPU, CPUID: cpuid(supported, 0, 1, deadline > 0),
		Memory: m.mem, Punch: m.punch, Modules: *m.cfg.Modules, OnEvent: m.cfg.OnModule,
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
