package isolate

import (
	"encoding/binary"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/isolate/frames"
	"redoubt.dev/redoubt/isolate/policy"
	layout "redoubt.dev/redoubt/isolate/view"
	"redoubt.dev/redoubt/kvm"
)

// flags that a module may leave changed: arithmetic, direction, interrupts, alignment check (which SMAP uses).
const (
	flagsOfModule = 0x40ed5
	flagsFixed    = 1 << 1
	flagIF        = 1 << 9
	flagDF        = 1 << 10
	flagAC        = 1 << 18
	flagTF        = 1 << 8
	flagNT        = 1 << 14
	flagRF        = 1 << 16
)

// enter runs a module from where the kernel came to its code, until the kernel is to go on.
func (i *Isolation) enter(v *view, r *kvm.Regs) error {
	s, err := i.stackOf(v, r.RSP)
	if err != nil {
		return i.kill(v, r, r.RIP, Event{Kind: Stack, Detail: err.Error()})
	}
	if !s.has(r.RSP) { // the word above an empty stack
		return i.kill(v, r, r.RIP, Event{Kind: Stack, Detail: fmt.Sprintf("the stack pointer is %#x", r.RSP)})
	}
	begins := v.function(r.RIP)
	kind, err := v.frames.Enter(s.from, r.RIP, r.RSP, word(s.word(r.RSP)), begins != nil)
	if err != nil {
		return i.kill(v, r, r.RIP, Event{Kind: Entry, Address: r.RIP, Detail: err.Error()})
	}
	switch kind {
	case frames.Call:
		begins.times++
	case frames.Resume:
		i.account(v.name, func(a *Account) { a.Resumed++ })
	case frames.Return:
		v.objects.made(s.from, r.RSP-8, r.RAX, i.pageAddress)
	}
	for _, gpa := range v.user { // of the process that ran then
		if err := v.revoke(gpa); err != nil {
			return err
		}
	}
	v.user = v.user[:0]
	if err := i.showStack(v, s, r.RSP); err != nil {
		return err
	}
	if err := i.resume(v, *r); err != nil {
		return err
	}
	return i.run(v)
}

// maxAside is how many slices a module may be found outside its code, one after another: each twice as long as the last one, up to 2^longer
// of them.
const (
	maxAside = 16
	longer   = 6
)

// resume makes the view go on with registers.
func (i *Isolation) resume(v *view, r kvm.Regs) error {
	if v.stale {
		v.layout.SetEntry(r.RIP, r.RAX)
		r.RIP, v.stale = layout.Entry, false
		clear(v.past)
	}
	return v.vcpu.SetRegs(r)
}

// run runs the view until the kernel is to go on.
func (i *Isolation) run(v *view) error {
	cpu := i.turn.id
	v.running = true
	defer func() { v.running = false }()
	now := since()
	for v.begun, v.trap = now, false; ; now = since() {
		if now-v.begun > int64(spell) && !v.trap { // in a stub it could not be left: there it is when the exception comes
			v.begun = now
			v.vcpu.Kick()
		}
		v.trap = false
		i.turns.Unlock()
		v.slicer.begin(now, slice<<min(v.aside, longer)) // of a busy host a slice may pass before it has begun
		reason, err := v.vcpu.Run()
		v.slicer.end()
		i.take(cpu)
		if v.gone { // unloaded under its own feet
			return i.orphaned(v)
		}
		if errors.Is(err, kvm.ErrInterrupted) {
			v.vcpu.ClearKick()
			done, err := i.yield(v)
			if done || err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		done, err := i.exit(v, reason)
		if done || err != nil {
			return err
		}
	}
}

// orphaned ends what a module was doing whose memory the kernel has freed meanwhile: there is nothing to go back to.
func (i *Isolation) orphaned(v *view) error {
	r, err := v.vcpu.Regs()
	if err != nil {
		return err
	}
	i.refused(v, Event{Kind: Control, Detail: "it was unloaded while it ran"})
	if base, ok := v.frames.Base(v.stack.from); ok {
		r.RSP = base
	}
	r.RFLAGS = r.RFLAGS&flagsOfModule | flagsFixed
	return errors.Join(i.raise(r, invalidOpcode, 0), v.close())
}

// exit serves one exit of a view; done: the kernel is to go on.
func (i *Isolation) exit(v *view, reason kvm.Reason) (done bool, err error) {
	switch reason {
	case kvm.ExitIO:
		x, err := v.vcpu.IO()
		if err != nil {
			return false, err
		}
		if x.Out && x.Port == layout.TrapPort && x.Size == 1 && x.Count == 1 {
			if r, err := v.vcpu.Regs(); err != nil || inStubs(r.RIP) {
				if err != nil {
					return false, err
				}
				return i.trapped(v, r)
			}
		}
		i.told(v, Event{Kind: Device, Symbol: fmt.Sprintf("port %#x", x.Port)})
		if !x.Out {
			for n := range x.Data {
				x.Data[n] = 0xff
			}
		}
		return false, nil
	case kvm.ExitMMIO:
		return i.accessed(v, v.vcpu.MMIO())
	case kvm.ExitInternalError, kvm.ExitHalt:
		r, err := v.vcpu.Regs()
		if err != nil {
			return false, err
		}
		if reason == kvm.ExitHalt { // of a page of thunks, behind which the processor stands; or of the module's own
			r.RIP--
		}
		if v.hasCode(r.RIP) {
			what := Event{Kind: Opaque, Detail: "an instruction that cannot be judged"}
			if reason == kvm.ExitHalt {
				what.Detail = "the processor was halted"
			}
			return true, i.kill(v, &r, r.RIP, what)
		}
		return i.left(v, r)
	case kvm.ExitShutdown, kvm.ExitFailEntry:
		r, err := v.vcpu.Regs()
		if err != nil {
			return false, err
		}
		return true, i.kill(v, &r, 0, Event{Kind: Control, Detail: "the view's processor shut down"})
	}
	return false, fmt.Errorf("module %s: unexpected exit %v", v.name, reason)
}

func inStubs(rip uint64) bool {
	return rip >= layout.Virtual && rip < layout.Virtual+layout.RWSize+layout.ROSize
}

// drain finishes the access that the last exit was for, so that the registers are what they are after it.
func (v *view) drain() error {
	v.vcpu.Kick()
	_, err := v.vcpu.Run()
	v.vcpu.ClearKick()
	if err == nil || errors.Is(err, kvm.ErrInterrupted) {
		return nil
	}
	return err
}

// yield lets the kernel go on where the module was interrupted.
func (i *Isolation) yield(v *view) (done bool, err error) {
	r, err := v.vcpu.Regs()
	if err != nil {
		return false, err
	}
	if !v.hasCode(r.RIP) {
		// In a stub, in a thunk (the kernel has that, too, but nobody would bring it back), or about to leave: a few
		// instructions. What stays there for long is no module that does its work.
		if v.aside++; v.aside > maxAside {
			return true, i.kill(v, &r, 0, Event{Kind: Control, Detail: fmt.Sprintf("it runs at %#x and does not come back", r.RIP)})
		}
		return false, nil
	}
	return true, i.interrupt(v, r)
}

// late says that the module had its time.
func (v *view) late() bool { return since()-v.begun > int64(spell) }

// interrupt lets the kernel go on in the middle of the module's code.
func (i *Isolation) interrupt(v *view, r kvm.Regs) error {
	v.aside = 0
	s := v.stack
	base, _ := v.frames.Base(s.from)
	if !s.leaves(r.RSP) { // the kernel would take its interrupts there
		return i.kill(v, &r, r.RIP, Event{Kind: Stack, Detail: fmt.Sprintf("the stack pointer is %#x", r.RSP)})
	}
	if err := v.frames.Interrupt(s.from, r.RIP, r.RSP); err != nil {
		return i.kill(v, &r, r.RIP, Event{Kind: Stack, Detail: err.Error()})
	}
	return i.toKernel(v, r, base)
}

// left judges a module's going on at an address that is not its own.
func (i *Isolation) left(v *view, r kvm.Regs) (done bool, err error) {
	s := v.stack
	base, ok := v.frames.Base(s.from)
	if !ok || !s.leaves(r.RSP) {
		return true, i.kill(v, &r, 0, Event{Kind: Stack, Detail: fmt.Sprintf("the stack pointer is %#x", r.RSP)})
	}
	if e := i.insane(v); e != nil {
		return true, i.kill(v, &r, 0, *e)
	}
	back, err := v.frames.Returns(s.from, r.RIP, r.RSP)
	if err != nil {
		return true, i.kill(v, &r, 0, Event{Kind: Stack, Address: r.RIP, Symbol: i.describe(r.RIP), Detail: err.Error()})
	}
	r.RFLAGS &^= flagAC | flagDF // a function is called, and returns, with both clear: with the first, SMAP would be off
	if back {
		return true, i.toKernel(v, r, base)
	}
	ret := word(v.mine(r.RSP))
	f, e := i.judgeCall(v, ret, r.RIP)
	if e != nil {
		return true, i.kill(v, &r, ret, *e)
	}
	if !f.plain {
		if e := i.judgeArguments(v, f.name, &r); e != nil {
			if e.At = v.describe(ret); !e.Allowed {
				return true, i.kill(v, &r, ret, *e)
			}
			i.event(v.named(*e))
		}
	}
	if err := v.frames.Calls(s.from, r.RSP, ret, v.hasCode(ret)); err != nil {
		return true, i.kill(v, &r, ret, Event{Kind: Stack, Symbol: f.name, At: v.describe(ret), Detail: err.Error()})
	}
	if f.once {
		i.account(v.name, func(a *Account) { count(a.Calls, f.name, 1) })
	} else {
		f.times++
	}
	if !f.plain {
		for _, o := range v.objects.asked(s.from, f.name, &r, i.perCPU, i.pageAddress) {
			if err := i.freedObject(v.module, o); err != nil {
				return false, err
			}
		}
	}
	return true, i.toKernel(v, r, base)
}

// function is the module's own that begins at an address, nil: none does.
func (m *module) function(at uint64) *counted {
	if f := m.entered.get(at); f != nil {
		return f
	}
	name, ok := m.begins[at]
	if !ok {
		return nil
	}
	f := &counted{name: name}
	m.entered.put(at, f)
	return f
}

// judgeCall finds the function that a module calls, from before ret, and says why it may not, if so.
func (i *Isolation) judgeCall(v *view, ret, to uint64) (*counted, *Event) {
	if f := v.allowed.get(to); f != nil {
		return f, nil
	}
	names := i.called(to)
	if names == nil && i.patched(v, ret, to) {
		names = []string{policy.Trampoline}
	}
	if len(names) == 0 {
		return nil, &Event{Kind: Call, Symbol: i.describe(to), Address: to, At: v.describe(ret), Detail: "no function begins there"}
	}
	name, allowed := i.mayCall(v, names)
	f := &counted{name: name, plain: plain(name)}
	switch {
	case allowed && i.kernel.text.has(to): // where nothing moves; what a profile allows it allows for good
		v.allowed.put(to, f)
		return f, nil
	case allowed:
	case i.cfg.Modules.Mode == policy.Monitor:
		i.event(v.named(Event{Kind: Call, Symbol: name, Address: to, At: v.describe(ret), Allowed: true}))
	case i.cfg.Modules.Mode == policy.Learn && !policy.Never(name):
		i.learn(func() { v.profile.LearnCall(name) })
	default:
		return nil, &Event{Kind: Call, Symbol: name, Address: to, At: v.describe(ret)}
	}
	f.once = true
	return f, nil
}

// patched says whether a call, which returns to ret, is one that the kernel has put into the module's code, to code that it has made
// for that (a trampoline of ftrace's): the module cannot write its own code, and what it was linked with are functions.
func (i *Isolation) patched(v *view, ret, to uint64) bool {
	const length = 5 // call rel32
	if to < firstMade || !v.hasCode(ret-length) || !v.hasCode(ret-1) {
		return false
	}
	var code [length]byte
	for k := range code {
		b, err := i.bytes(ret-length+uint64(k), 1)
		if err != nil {
			return false
		}
		code[k] = b[0]
	}
	if code[0] != 0xe8 || ret+uint64(int64(int32(binary.LittleEndian.Uint32(code[1:])))) != to {
		return false
	}
	for _, all := range [][]*module{i.modules, i.others} {
		for _, o := range all {
			if o.has(to) {
				return false
			}
		}
	}
	m, ok := i.mapped(to)
	return ok && m.Executable && !m.User
}

// firstMade is where the kernel has what code it makes, and modules.
const firstMade = 0xffffffffc0000000

// freedObject takes an object that a module frees from its views.
func (i *Isolation) freedObject(m *module, o object) error {
	for at := page(o.at); at < o.at+o.size; at += pageSize {
		p, ok := i.mapped(at)
		if !ok || m.objects.whole(at) {
			continue
		}
		for _, v := range i.viewsOf(m) {
			if err := v.revoke(page(p.Physical + at - p.Virtual)); err != nil {
				return err
			}
		}
	}
	return nil
}

// called is what the function that begins at an address is called: one of the kernel's, or of another module.
func (i *Isolation) called(at uint64) []string {
	if names := i.kernel.functions(at); names != nil {
		return names
	}
	for _, all := range [][]*module{i.modules, i.others} {
		for _, m := range all {
			if n, ok := m.begins[at]; ok {
				return []string{n}
			}
		}
	}
	return nil
}

func (i *Isolation) mayCall(v *view, names []string) (string, bool) {
	for _, n := range names {
		if policy.Never(n) {
			return n, false
		}
	}
	for _, n := range names {
		if v.profile.Allows(n) {
			return n, true
		}
	}
	return names[0], false
}

func (i *Isolation) describe(at uint64) string {
	for _, all := range [][]*module{i.modules, i.others} {
		for _, m := range all {
			if m.has(at) {
				return m.describe(at)
			}
		}
	}
	return i.kernel.describe(at)
}

// refused tells of what a module did, with the calls that led to it.
func (i *Isolation) refused(v *view, e Event) {
	if v.stack != nil {
		for _, a := range v.frames.Trace(v.stack.from) {
			e.Via = append(e.Via, i.describe(a))
		}
	}
	i.event(v.named(e))
}

// Registers that nothing may change.
var fixedRegisters = [...]string{"CR0", "CR3", "CR4", "EFER", "IDTR", "IDTR's limit", "GDTR", "TR", "CS", "GS"}

func fixedOf(s *kvm.Sregs) [len(fixedRegisters)]uint64 {
	return [...]uint64{
		s.CR0, s.CR3, s.CR4, s.EFER, s.IDT.Base, uint64(s.IDT.Limit), s.GDT.Base, s.TR.Base, uint64(s.CS.Selector), s.GS.Base,
	}
}

// insane says which register that nothing may change was changed.
func (i *Isolation) insane(v *view) *Event {
	s, err := v.vcpu.SpecialRegs()
	if err != nil {
		return &Event{Kind: Control, Detail: err.Error()}
	}
	got := fixedOf(s)
	if got == v.fixed {
		return nil
	}
	for n, name := range fixedRegisters {
		if got[n] != v.fixed[n] {
			return &Event{Kind: Control, Symbol: name, Detail: fmt.Sprintf("%#x in the place of %#x", got[n], v.fixed[n])}
		}
	}
	return nil
}

// toKernel makes the kernel go on with the module's registers.
func (i *Isolation) toKernel(v *view, r kvm.Regs, base uint64) error {
	i.writeBack(v, r.RSP, base)
	r.RFLAGS = r.RFLAGS&flagsOfModule | flagsFixed
	return i.turn.VCPU.SetRegs(r)
}

// kill ends what the module was doing: the kernel finds an invalid instruction where it was, and makes an oops of that, which
// ends the process. at is where: 0 is the function that was entered.
func (i *Isolation) kill(v *view, r *kvm.Regs, at uint64, e Event) error {
	if e.At == "" && at != 0 {
		e.At = v.describe(at)
	}
	i.refused(v, e)
	dead := *r
	if v.stack != nil {
		if base, ok := v.frames.Base(v.stack.from); ok {
			dead.RSP = base
			if at == 0 || !v.hasCode(at) {
				at = 0
				if b, err := i.bytes(base, 8); err == nil {
					at = word(b) // its caller
				}
			}
		}
		v.frames.Drop(v.stack.from)
	}
	if err := v.reset(); err != nil {
		return err
	}
	dead.RIP = at
	dead.RFLAGS = dead.RFLAGS&flagsOfModule | flagsFixed
	return i.raise(dead, invalidOpcode, 0)
}

// reset gives the view's processor its registers again.
func (v *view) reset() error {
	v.stale = true
	if err := v.drain(); err != nil {
		return err
	}
	return v.vcpu.SetSregs(v.sane)
}
