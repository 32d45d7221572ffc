package isolate

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	layout "redoubt.dev/redoubt/isolate/view"
	"redoubt.dev/redoubt/kvm"
)

// view is a module's machine for one vCPU: another virtual machine over the guest's memory. The vCPU's thread runs both.
type view struct {
	*module
	vm     *kvm.VM
	vcpu   *kvm.VCPU
	layout *layout.View
	memory [2][]byte                   // the layout's
	sane   kvm.Sregs                   // the registers that nothing may change
	fixed  [len(fixedRegisters)]uint64 // of sane

	slots  map[uint64]grant  // pages of the guest's that the view has, by guest-physical address
	seen   map[uint64]uint64 // where they were mapped last
	past   map[uint64]uint64 // the same of pages that were taken away while the processor may remember them
	next   uint32
	stack  *stack // that is mapped
	shown  shown  // what it was when the module came
	slicer slicer
	kicks  sync.Mutex // over dead
	dead   bool       // the processor is gone
	aside  int        // slices in which it was found outside its code
	begun  int64      // its turn, since epoch
	trap   bool       // it stands in the stub of an exception
	user   []uint64   // pages of the process that runs, which the view has

	running bool // the vCPU is in it: it is to be kicked, and what it remembers stays until it comes back from the kernel
	stale   bool // what the processor has kept of its tables is to be dropped
	restack bool // the stack that is mapped, too
}

// A grant is a page that a view has: a slot of one page.
type grant struct {
	slot  uint32
	flags kvm.MemoryFlags
}

// Slots of a view's machine.
const (
	slotRW = iota
	slotRO
	firstGrant

	maxSlots = 32_000 // of KVM's
)

// view is the view of a module for the vCPU whose turn it is: made when that is first in it.
func (i *Isolation) view(m *module) (v *view, err error) {
	if v = m.views[i.turn.id]; v != nil {
		return v, nil
	}
	v = &view{module: m, slots: map[uint64]grant{}, seen: map[uint64]uint64{}, past: map[uint64]uint64{}, next: firstGrant}
	defer func() {
		if err != nil {
			v, err = nil, errors.Join(err, v.close())
		}
	}()
	if err := i.machine(v); err != nil {
		return v, err
	}
	if err := i.code(v, true); err != nil {
		return v, err
	}
	m.views[i.turn.id] = v
	return v, nil
}

// code maps a module's code, and grants it.
func (i *Isolation) code(v *view, grant bool) error {
	for _, r := range v.regions {
		for at := page(r.code.from); at < r.code.to; at += pageSize {
			p, err := i.place(at)
			if err != nil {
				return err
			}
			gpa := p.Physical + at - p.Virtual
			if grant {
				if err := i.grant(v, gpa, kvm.ReadOnly); err != nil {
					return err
				}
			}
			if err := v.layout.Map(at, gpa, layout.Execute); err != nil {
				return err
			}
			v.seen[gpa] = at
		}
	}
	return nil
}

// machine makes the virtual machine.
func (i *Isolation) machine(v *view) (err error) {
	if v.vm, err = i.cfg.System.CreateVM(); err != nil {
		return err
	}
	for n, size := range []int{layout.RWSize, layout.ROSize} {
		if v.memory[n], err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS); err != nil {
			return fmt.Errorf("the view's memory: %w", err)
		}
	}
	if v.layout, err = layout.New(v.memory[0], v.memory[1]); err != nil {
		return err
	}
	err = errors.Join(
		v.vm.SetPrivatePages(0xfeff_c000, 0xfeff_d000), // as the guest's own machine
		v.vm.ExitOnEmulationFailure(),
		v.vm.DenyMSRs(),
		v.vm.SetMemory(slotRW, 0, layout.Physical, v.memory[0]),
		v.vm.SetMemory(slotRO, kvm.ReadOnly, layout.ROPhysical, v.memory[1]),
	)
	if err != nil {
		return err
	}
	if v.vcpu, err = v.vm.CreateVCPU(0); err != nil {
		return err
	}
	v.vcpu.ShareRegs(true)
	v.vcpu.Follow(i.turn.VCPU)
	v.slicer.kick = v.kick
	if err := v.vcpu.SetCPUID(i.turn.CPUID); err != nil {
		return err
	}
	s, err := i.turn.VCPU.Sregs()
	if err != nil {
		return err
	}
	s.CR3 = v.layout.Root()
	s.CR4 &^= 1 << 17 // PCIDE: each entry may drop all translations by loading CR3
	s.GDT = kvm.Table{Base: layout.GDTBase, Limit: layout.GDTLimit}
	s.IDT = kvm.Table{Base: layout.IDTBase, Limit: layout.IDTLimit}
	s.TR.Base, s.TR.Limit = layout.TSSBase, layout.TSSLimit
	s.InterruptBitmap = [4]uint64{}
	if err := v.vcpu.CopyXCRs(i.turn.VCPU); err != nil {
		return err
	}
	if err := v.vcpu.SetSregs(s); err != nil {
		return err
	}
	if v.sane, err = v.vcpu.Sregs(); err != nil {
		return err
	}
	v.fixed = fixedOf(&v.sane)
	return i.copyThunks(v)
}

// copyThunks gives the view the kernel's thunks at their own addresses, and nothing else of the pages that they are on:
// what else a module calls there ends in a halt.
func (i *Isolation) copyThunks(v *view) error {
	n := 0
	for _, t := range i.kernel.thunks {
		for at := page(t.from); at < t.to; at += pageSize {
			if n == layout.MaxThunks {
				return fmt.Errorf("the kernel's thunks take more than %d pages", n)
			}
			from, err := i.bytes(at, pageSize)
			if err != nil {
				return err
			}
			to, gpa := v.layout.Thunk(n)
			for k := range to {
				to[k] = halt
				if i.kernel.thunk(at + uint64(k)) {
					to[k] = from[k]
				}
			}
			if err := v.layout.Map(at, gpa, layout.Execute); err != nil {
				return err
			}
			n++
		}
	}
	return nil
}

const halt = 0xf4

// grant gives a view a page of the guest's.
func (i *Isolation) grant(v *view, gpa uint64, flags kvm.MemoryFlags) error {
	b, err := i.cfg.Memory.Slice(gpa, pageSize)
	if err != nil {
		return err
	}
	g, ok := v.slots[gpa]
	if ok {
		if err := v.vm.SetMemory(g.slot, 0, gpa, nil); err != nil {
			return err
		}
	} else {
		if !v.room() {
			return fmt.Errorf("the view has %d pages already", len(v.slots))
		}
		g.slot = v.next
		v.next++
	}
	if err := v.vm.SetMemory(g.slot, flags, gpa, b); err != nil {
		return err
	}
	g.flags = flags
	v.slots[gpa] = g
	return nil
}

// room says whether the view may have another page.
func (v *view) room() bool { return len(v.slots) < maxGrants && v.next < maxSlots }

// revoke takes a page from a view.
func (v *view) revoke(gpa uint64) error {
	at, seen := v.seen[gpa]
	if seen {
		v.layout.Unmap(at)
		delete(v.seen, gpa)
		if v.running && len(v.past) < maxGrants {
			v.past[gpa] = at
		}
		v.stale = true
	}
	g, ok := v.slots[gpa]
	if !ok {
		return nil
	}
	delete(v.slots, gpa)
	return v.vm.SetMemory(g.slot, 0, gpa, nil)
}

// punch takes the code of all views out of the kernel's.
func (i *Isolation) punch() error {
	var pages []uint64
	for at := range i.text {
		p, err := i.place(at)
		if err != nil {
			return err
		}
		pages = append(pages, p.Physical+at-p.Virtual)
	}
	slices.Sort(pages)
	return i.cfg.Punch(i.turn.id, pages)
}

// forget takes everything from a view but its own, its code and its stack. The view does not run.
func (i *Isolation) forget(v *view) error {
	if err := v.layout.Clear(); err != nil {
		return err
	}
	v.stale = true
	if s := v.stack; s != nil { // its contents stay
		for n := range s.pages {
			_, gpa := v.layout.Stack(n)
			if err := v.layout.Map(s.from+uint64(n)*pageSize, gpa, layout.Write); err != nil {
				return err
			}
		}
	}
	clear(v.seen)
	if err := i.code(v, false); err != nil {
		return err
	}
	for gpa, g := range v.slots {
		if _, code := v.seen[gpa]; code {
			continue
		}
		if err := v.vm.SetMemory(g.slot, 0, gpa, nil); err != nil {
			return err
		}
		delete(v.slots, gpa)
	}
	v.next = firstGrant
	for _, g := range v.slots {
		v.next = max(v.next, g.slot+1)
	}
	return i.copyThunks(v)
}

// kick ends the module's slice.
func (v *view) kick() {
	v.kicks.Lock()
	defer v.kicks.Unlock()
	if !v.dead { // the slicer may be late
		v.vcpu.Kick()
	}
}

func (v *view) close() error {
	var errs []error
	v.kicks.Lock()
	v.dead = true
	v.kicks.Unlock()
	if v.vcpu != nil {
		errs = append(errs, v.vcpu.Close())
	}
	if v.vm != nil {
		errs = append(errs, v.vm.Close())
	}
	for n, m := range v.memory {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
			v.memory[n] = nil
		}
	}
	return errors.Join(errs...)
}
