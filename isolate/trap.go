package isolate

import (
	"encoding/binary"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/paging"
	"redoubt.dev/redoubt/isolate/policy"
	layout "redoubt.dev/redoubt/isolate/view"
	"redoubt.dev/redoubt/kvm"
)

// Vectors of exceptions (Intel SDM volume 3A, table 6-1).
const (
	invalidOpcode     = 6
	generalProtection = 13
	pageFault         = 14

	// mended are the exceptions that a module's own instructions raise and that the kernel's handlers mend or make an oops of. Of
	// others (double faults, machine checks, software interrupts, single steps) a module could only pretend that they came.
	mended = 1<<0 | 1<<3 | 1<<4 | 1<<5 | 1<<invalidOpcode | 1<<10 | 1<<11 | 1<<12 | 1<<generalProtection | 1<<pageFault | 1<<16 | 1<<17 | 1<<19
)

// Of a page fault's error code.
const (
	faultPresent = 1 << 0
	faultWrite   = 1 << 1
	faultFetch   = 1 << 4
)

// trapped serves an exception of a view. r is as the stub has it.
func (i *Isolation) trapped(v *view, r kvm.Regs) (done bool, err error) {
	t := v.layout.Trap()
	r.RIP, r.RSP, r.RFLAGS = t.RIP, t.RSP, t.RFLAGS
	if t.Vector == pageFault {
		s, err := v.vcpu.SpecialRegs()
		if err != nil {
			return false, err
		}
		if t.Error&faultFetch != 0 {
			if r.RIP != s.CR2 || v.hasCode(r.RIP) {
				return true, i.killTrapped(v, r, Event{Kind: Control, Detail: fmt.Sprintf("code at %#x where the module has none", s.CR2)})
			}
			// What the stub was about needs no end: the view goes on elsewhere, with registers that are set, and KVM then leaves
			// alone the instruction that wrote to the port.
			return i.left(v, r)
		}
		ok, err := i.ensure(v, s.CR2, t.Error)
		if err != nil {
			return false, err
		}
		if ok {
			switch v.trap = true; {
			case v.hasCode(r.RIP):
				if v.aside = 0; v.late() {
					return true, i.interrupt(v, r)
				}
			case v.late(): // in a thunk, for a spell once more
				v.begun = since()
				if v.aside++; v.aside > maxAside {
					return true, i.killTrapped(v, r, Event{Kind: Control, Detail: fmt.Sprintf("it runs at %#x and does not come back", r.RIP)})
				}
			}
			if !v.stale {
				return false, nil // the stub goes back and tries again
			}
			if err := v.drain(); err != nil {
				return false, err
			}
			return false, i.resume(v, r)
		}
		if err := i.setCR2(s.CR2); err != nil {
			return false, err
		}
	}
	return true, i.hand(v, r, t)
}

func (i *Isolation) killTrapped(v *view, r kvm.Regs, e Event) error {
	if err := v.drain(); err != nil {
		return err
	}
	return i.kill(v, &r, r.RIP, e)
}

// hand gives an exception of the module's to the kernel, whose handler mends it or makes an oops of it.
func (i *Isolation) hand(v *view, r kvm.Regs, t layout.Trap) error {
	if err := v.drain(); err != nil {
		return err
	}
	if !v.hasCode(r.RIP) && !i.kernel.thunk(r.RIP) {
		return i.kill(v, &r, 0, Event{Kind: Control, Detail: fmt.Sprintf("exception %d at %#x, where the module has no code", t.Vector, r.RIP)})
	}
	if t.Vector >= 32 || mended>>t.Vector&1 == 0 {
		return i.kill(v, &r, r.RIP, Event{Kind: Control, Detail: fmt.Sprintf("exception %d", t.Vector)})
	}
	if e := i.insane(v); e != nil {
		return i.kill(v, &r, 0, *e)
	}
	if e := i.privileged(v, r, t); e != nil {
		e.At = v.describe(r.RIP)
		i.refused(v, *e)
	}
	s := v.stack
	base, ok := v.frames.Base(s.from)
	if !ok || !s.leaves(r.RSP) || r.RSP > base {
		return i.kill(v, &r, r.RIP, Event{Kind: Stack, Detail: fmt.Sprintf("the stack pointer is %#x", r.RSP)})
	}
	if err := v.frames.Fault(s.from, r.RIP, r.RSP); err != nil {
		return i.kill(v, &r, r.RIP, Event{Kind: Stack, Detail: err.Error()})
	}
	i.writeBack(v, r.RSP, base)
	r.RFLAGS = r.RFLAGS&flagsOfModule | flagsFixed
	return i.raise(r, t.Vector, t.Error)
}

// privileged names what a #GP was for: an instruction that a view refuses.
func (i *Isolation) privileged(v *view, r kvm.Regs, t layout.Trap) *Event {
	if t.Vector != generalProtection {
		return nil
	}
	b, err := i.bytes(r.RIP, 2)
	if err != nil || b[0] != 0x0f {
		return nil
	}
	switch b[1] {
	case 0x30:
		return &Event{Kind: Control, Symbol: fmt.Sprintf("MSR %#x", uint32(r.RCX)), Detail: "written"}
	case 0x32:
		return &Event{Kind: Control, Symbol: fmt.Sprintf("MSR %#x", uint32(r.RCX)), Detail: "read"}
	}
	return nil
}

func (i *Isolation) setCR2(a uint64) error {
	s, err := i.turn.VCPU.Sregs()
	if err != nil {
		return err
	}
	s.CR2 = a
	return i.turn.VCPU.SetSregs(s)
}

// raise delivers an exception to the kernel as a processor would, with the registers that it had (Intel SDM volume 3A,
// 6.14 "Exception and Interrupt Handling in 64-bit Mode"): by the kernel's own descriptor tables, on its own stack. That
// KVM would do it, too; but each vendor's processors want their own words for what the module's breakpoints are.
func (i *Isolation) raise(r kvm.Regs, vector byte, code uint64) error {
	s, err := i.turn.VCPU.Sregs()
	if err != nil {
		return err
	}
	var gate [16]byte
	for n := 0; n < 16; n += 8 {
		b, err := i.bytes(s.IDT.Base+uint64(vector)*16+uint64(n), 8)
		if err != nil {
			return fmt.Errorf("the kernel's gate of exception %d: %w", vector, err)
		}
		copy(gate[n:], b)
	}
	le := binary.LittleEndian
	if gate[5]&0x80 == 0 {
		return fmt.Errorf("the kernel has no gate for exception %d", vector)
	}
	handler := uint64(le.Uint16(gate[0:])) | uint64(le.Uint16(gate[6:]))<<16 | uint64(le.Uint32(gate[8:]))<<32
	sp := r.RSP
	if ist := gate[4] & 7; ist != 0 {
		at := s.TR.Base + 0x24 + uint64(ist-1)*8
		sp = 0
		for n := range uint64(2) { // the TSS is packed: a word of it may cross a page, a half may not
			b, err := i.bytes(at+n*4, 4)
			if err != nil {
				return fmt.Errorf("the kernel's stack of exception %d: %w", vector, err)
			}
			sp |= uint64(le.Uint32(b)) << (n * 32)
		}
	}
	sp &^= 15
	push := func(w uint64) {
		if err != nil {
			return
		}
		sp -= 8
		var b []byte
		if b, err = i.bytes(sp, 8); err == nil {
			le.PutUint64(b, w)
		}
	}
	push(layout.DataSelector)
	push(r.RSP)
	push(r.RFLAGS)
	push(layout.CodeSelector)
	push(r.RIP)
	if layout.HasErrorCode(vector) {
		push(code)
	}
	if err != nil {
		return fmt.Errorf("the kernel's stack of exception %d: %w", vector, err)
	}
	r.RIP, r.RSP = handler, sp
	r.RFLAGS &^= flagIF | flagTF | flagNT | flagRF
	return i.turn.VCPU.SetRegs(r)
}

// ensure maps the page of an address that a module touches, as the kernel has it mapped, and grants it as far as may be. false:
// the kernel has no such page either, or not for this.
func (i *Isolation) ensure(v *view, at, code uint64) (bool, error) {
	m, ok := i.mapped(at)
	if !ok { // as for the kernel itself: its handler will say
		return false, nil
	}
	if code&faultWrite != 0 && !m.Writable {
		i.refused(v, Event{Kind: WriteData, Address: at, Symbol: i.describe(at), Detail: "read-only for the kernel, too"})
		return false, nil
	}
	gpa := page(m.Physical + at - m.Virtual)
	if code&faultPresent != 0 { // it is mapped: only that the kernel has made it writable since can be mended
		if where, seen := v.seen[gpa]; !seen || where != page(at) || m.User || code&faultWrite == 0 {
			return false, nil
		}
	}
	if !v.room() { // the slots are used up, most by pages that it had once
		if err := i.forget(v); err != nil {
			return false, err
		}
	}
	rights := layout.Rights(0)
	if m.Writable {
		rights |= layout.Write
	}
	if m.User {
		rights |= layout.User
	}
	if err := i.mapPage(v, page(at), gpa, rights); err != nil {
		return false, err
	}
	v.seen[gpa] = page(at)
	if m.User {
		v.user = append(v.user, gpa)
	}
	if !i.isRAM(gpa) { // a device's: each access comes to be judged
		return true, nil
	}
	if _, granted := v.slots[gpa]; granted {
		return true, nil
	}
	switch {
	case v.has(at) && m.Writable && !v.self.meets(page(at)), v.objects.whole(page(at)):
		return true, i.grant(v, gpa, 0)
	case i.foreign(v, i.home(at)) != nil:
		return true, nil // each access comes to be judged
	}
	if err := i.grant(v, gpa, kvm.ReadOnly); err != nil {
		return false, err
	}
	i.account(v.name, func(a *Account) { a.Reads++ })
	return true, nil
}

func (i *Isolation) mapped(at uint64) (paging.Mapping, bool) {
	m, err := i.place(at)
	return m, err == nil
}

func (i *Isolation) isRAM(gpa uint64) bool {
	_, err := i.cfg.Memory.Slice(gpa, pageSize)
	return err == nil
}

// mapPage maps a page, and starts the tables anew where they are full.
func (i *Isolation) mapPage(v *view, at, gpa uint64, rights layout.Rights) error {
	err := v.layout.Map(at, gpa, rights)
	if errors.Is(err, layout.ErrTables) {
		if err := i.forget(v); err != nil {
			return err
		}
		err = v.layout.Map(at, gpa, rights)
	}
	return err
}

// accessed judges an access to memory that the view does not have, or has for reading only.
func (i *Isolation) accessed(v *view, x kvm.MMIO) (done bool, err error) {
	n := uint64(len(x.Data))
	b, err := i.cfg.Memory.Slice(x.Address, n)
	if err != nil {
		e := Event{Kind: Device, Address: x.Address, Symbol: fmt.Sprintf("%#x", x.Address)}
		if x.Address >= layout.Physical && x.Address < layout.ROPhysical+layout.ROSize {
			e.Kind, e.Symbol = Control, "the view's own tables"
		}
		i.told(v, e)
		for k := range x.Data {
			x.Data[k] = 0xff
		}
		return false, nil
	}
	at, seen := i.seen(v, page(x.Address))
	at += x.Address & (pageSize - 1)
	if !x.Write {
		if !i.mayRead(v, at, seen) {
			clear(x.Data)
			return false, nil
		}
		copy(x.Data, b)
		return false, nil
	}
	object, off, why := i.judgeWrite(v, at, n, seen)
	e := Event{Kind: WriteData, Address: at, Symbol: object, Detail: fmt.Sprintf("%d bytes at %#x: %s", n, off, why), Allowed: true}
	switch {
	case why == "":
	case i.cfg.Modules.Mode == policy.Monitor && seen:
		i.told(v, e)
	case i.cfg.Modules.Mode == policy.Learn && object != "" && why == notAllowed:
		i.learn(func() { v.profile.LearnWrite(object, off, n) })
	default:
		e.Allowed = false
		i.told(v, e)
		return false, nil // dropped
	}
	before, err := i.store(v, b, at, x)
	if err != nil {
		return false, err
	}
	if before != nil {
		if err := v.drain(); err != nil {
			return false, err
		}
		return false, i.resume(v, *before)
	}
	i.account(v.name, func(a *Account) { count(a.Writes, object, 1) })
	return false, nil
}

// seen is where a view's page is mapped. What was taken away while the processor remembered it counts as long as the kernel
// has it there: it drops more addresses than it frees.
func (i *Isolation) seen(v *view, gpa uint64) (at uint64, ok bool) {
	if at, ok = v.seen[gpa]; ok {
		return at, true
	}
	if at, ok = v.past[gpa]; ok {
		m, mapped := i.mapped(at)
		return at, mapped && page(m.Physical+at-m.Virtual) == gpa
	}
	return 0, false
}

// mayRead judges a read of a page that the view does not have: of another isolated module's, or by tables that are not the
// view's.
func (i *Isolation) mayRead(v *view, at uint64, seen bool) bool {
	if seen {
		at = i.home(at)
	}
	e := Event{Kind: ReadData, Address: at, Symbol: i.describe(at), Detail: notAllowed}
	o := i.foreign(v, at)
	switch {
	case !seen:
		e.Detail = "by tables that are not the view's"
	case o == nil || v.profile.Readable(o.name):
		return true
	case i.cfg.Modules.Mode == policy.Learn:
		i.learn(func() { v.profile.LearnRead(o.name) })
		return true
	case i.cfg.Modules.Mode == policy.Monitor:
		e.Allowed = true
	}
	i.told(v, e)
	return e.Allowed
}

// told tells of an access: the instruction is where the processor stands.
func (i *Isolation) told(v *view, e Event) {
	if r, err := v.vcpu.Regs(); err == nil {
		e.At = v.describe(r.RIP)
	}
	i.refused(v, e)
}
