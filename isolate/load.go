package isolate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"redoubt.dev/redoubt/isolate/frames"
	"redoubt.dev/redoubt/isolate/policy"
	layout "redoubt.dev/redoubt/isolate/view"
	"redoubt.dev/redoubt/kvm"
)

// view is one isolated module and the machine that it runs in.
type view struct {
	name    string
	profile *policy.Profile
	regions []region
	self    span              // its struct module, which is the kernel's
	begins  map[uint64]string // functions, by address
	imports []string          // functions of the kernel, and of other modules, that it was linked with

	vm     *kvm.VM
	vcpu   *kvm.VCPU
	layout *layout.View
	memory [2][]byte // the layout's
	sane   kvm.Sregs // the registers that nothing may change

	slots  map[uint64]uint32 // pages of the guest's that the view has, by guest-physical address
	seen   map[uint64]uint64 // where they were mapped last
	next   uint32
	frames frames.Frames
	stack  *stack // that is mapped
	timer  *time.Timer
	kicks  sync.Mutex // over dead
	dead   bool       // the processor is gone
	aside  int        // slices in which it was found outside its code
	user   []uint64   // pages of the process that runs, which the view has
	stale  bool       // what the processor has kept of its tables is to be dropped

	objects objects
}

// region is a part of a module's memory.
type region struct {
	span
	code span   // within it
	kind string // what tells it from the module's others: "" for the first
}

// Slots of a view's machine.
const (
	slotRW = iota
	slotRO
	firstGrant

	maxSlots = 32_000 // of KVM's
)

// loaded is called where the kernel is about to run a module's first function: do_init_module(mod).
func (i *Isolation) loaded(r *kvm.Regs) error {
	m := r.RDI
	name, err := i.text256(m + i.kernel.module.name.Offset)
	if err != nil {
		return i.refuseLoad(m, "?", err.Error())
	}
	verdict := i.cfg.Modules.Default
	if f := i.kernel.module.signed; f.Size == 1 && slices.Contains(i.cfg.Modules.Trusted, name) {
		if b, err := i.bytes(m+f.Offset, 1); err == nil && b[0] == 1 {
			verdict = Trust
		}
	}
	switch verdict {
	case Trust:
		if err := i.trust(m, name); err != nil {
			return i.refuseLoad(m, name, err.Error())
		}
		i.account(name, func(a *Account) { *a = *fresh(Trust, 0) })
		i.event(Event{Kind: Loaded, Module: name, Detail: "trusted", Allowed: true})
		return nil
	case Refuse:
		return i.refuseLoad(m, name, "the policy refuses it")
	}
	v, err := i.isolate(m, name)
	if err != nil { // fail closed: what cannot be fenced does not run
		return i.refuseLoad(m, name, err.Error())
	}
	pages := 0
	for _, r := range v.regions {
		pages += int(pagesOf(r.code) / pageSize)
	}
	i.account(name, func(a *Account) { *a = *fresh(Isolate, pages) })
	i.event(Event{Kind: Loaded, Module: name, Detail: fmt.Sprintf("isolated: %d pages of code", pages), Allowed: true})
	return nil
}

func fresh(v Verdict, pages int) *Account {
	return &Account{Verdict: v, Pages: pages, Entries: map[string]uint64{}, Calls: map[string]uint64{}, Writes: map[string]uint64{}}
}

// refuseLoad makes the kernel give a module up: its first function becomes one that only fails.
func (i *Isolation) refuseLoad(m uint64, name, why string) error {
	b, err := i.bytes(m+i.kernel.module.init.Offset, 8)
	if err != nil {
		return fmt.Errorf("module %s: cannot be refused (%s): %w", name, why, err)
	}
	binary.LittleEndian.PutUint64(b, i.kernel.refusal)
	i.account(name, func(a *Account) { *a = *fresh(Refuse, 0) })
	i.event(Event{Kind: Loaded, Module: name, Detail: "refused: " + why})
	return nil
}

// text256 reads a text that ends with a zero within 256 bytes.
func (i *Isolation) text256(at uint64) (string, error) {
	var out []byte
	for len(out) < 256 {
		b, err := i.bytes(at+uint64(len(out)), min(16, pageSize-(at+uint64(len(out)))&(pageSize-1)))
		if err != nil {
			return "", err
		}
		if n := bytes.IndexByte(b, 0); n >= 0 {
			return string(append(out, b[:n]...)), nil
		}
		out = append(out, b...)
	}
	return "", fmt.Errorf("a text at %#x has no end", at)
}

func pagesOf(s span) uint64 {
	if s.to <= s.from {
		return 0
	}
	return page(s.to+pageSize-1) - page(s.from)
}

// isolate makes a view of a module and takes its code out of the kernel's.
func (i *Isolation) isolate(m uint64, name string) (v *view, err error) {
	if len(i.views) >= maxModules {
		return nil, fmt.Errorf("%d modules are isolated already", maxModules)
	}
	v = &view{name: name, slots: map[uint64]uint32{}, seen: map[uint64]uint64{}, next: firstGrant, begins: map[uint64]string{}}
	v.profile = i.profile(name)
	defer func() {
		if err != nil {
			err = errors.Join(err, v.close())
		}
	}()
	if v.regions, err = i.regions(m); err != nil {
		return nil, err
	}
	v.self = span{m, m + i.kernel.module.size}
	if err := i.functions(m, v); err != nil {
		return nil, err
	}
	if i.cfg.Modules.Mode == policy.Learn { // all of them, also those that it calls seldom
		i.learn(func() {
			for _, n := range v.imports {
				v.profile.LearnCall(n)
			}
		})
	}
	if err := i.machine(v); err != nil {
		return nil, err
	}
	total := len(i.text)
	for _, r := range v.regions {
		for at := page(r.code.from); at < r.code.to; at += pageSize {
			if total++; total > maxPages {
				return nil, fmt.Errorf("more than %d pages of code", maxPages)
			}
			p, err := i.place(at)
			if err != nil {
				return nil, err
			}
			gpa := p.Physical + at - p.Virtual
			if err := i.grant(v, gpa, kvm.ReadOnly); err != nil {
				return nil, err
			}
			if err := v.layout.Map(at, gpa, layout.Execute); err != nil {
				return nil, err
			}
			v.seen[gpa] = at
			i.text[at] = v
		}
	}
	i.views = append(i.views, v)
	return v, i.punch()
}

// profile is what a module may do: a copy of its own profile, or what it has learnt when it was loaded before.
func (i *Isolation) profile(name string) *policy.Profile {
	i.mu.Lock()
	defer i.mu.Unlock()
	if p := i.profiles[name]; p != nil {
		return p
	}
	own := &policy.Profile{Module: name}
	for _, p := range i.cfg.Modules.Profiles {
		if p.Module == name {
			own.Calls, own.Writes, own.Reads = slices.Clone(p.Calls), slices.Clone(p.Writes), slices.Clone(p.Reads)
		}
	}
	if len(i.profiles) < maxModules*2 {
		i.profiles[name] = own
	}
	return own
}

// trust notes where a module lies that is not isolated: the others may be allowed to call it.
func (i *Isolation) trust(m uint64, name string) (err error) {
	v := &view{name: name, begins: map[uint64]string{}}
	if v.regions, err = i.regions(m); err != nil {
		return err
	}
	if err := i.functions(m, v); err != nil {
		return err
	}
	if len(i.others) >= maxTrusted {
		return fmt.Errorf("%d modules are trusted already", maxTrusted)
	}
	i.others = append(i.others, v)
	return nil
}

// regions reads where a module's memory lies.
func (i *Isolation) regions(m uint64) ([]region, error) {
	var all []region
	var err error
	read := func(at, n uint64) uint64 {
		b, berr := i.bytes(at, n)
		if berr != nil {
			err = errors.Join(err, berr)
			return 0
		}
		if n == 4 {
			return uint64(binary.LittleEndian.Uint32(b))
		}
		return word(b)
	}
	for n, f := range i.kernel.module.regions {
		base, size := read(m+f.base.Offset, 8), read(m+f.size.Offset, 4)
		if err != nil {
			return nil, err
		}
		if base == 0 || size == 0 {
			continue
		}
		r := region{span: span{base, base + size}}
		if n > 0 {
			r.kind = fmt.Sprintf(".%d", n)
		}
		switch {
		case f.code:
			r.code = r.span
		case f.text.Size > 0:
			r.code = span{base, base + read(m+f.text.Offset, 4)}
		}
		if base < firstText || r.to < r.from || r.to-r.from > maxPages*pageSize || r.code.to > page(r.to+pageSize-1) {
			return nil, fmt.Errorf("its memory is said to lie from %#x to %#x", r.from, r.to)
		}
		all = append(all, r)
	}
	return all, err
}

// maxSymbols bounds a module's.
const maxSymbols = 1 << 16

// functions reads a module's symbols, of which the kernel has all while it is loaded.
func (i *Isolation) functions(m uint64, v *view) error {
	f := i.kernel.module
	b, err := i.bytes(m+f.kallsyms.Offset, 8)
	if err != nil {
		return err
	}
	at := word(b)
	var where [3]uint64
	for n, member := range []uint64{f.symtab.Offset, f.symbols.Offset, f.strtab.Offset} {
		b, err := i.bytes(at+member, 8)
		if err != nil {
			return fmt.Errorf("its symbols: %w", err)
		}
		where[n] = word(b)
	}
	n := where[1] & 0xffffffff
	if n > maxSymbols {
		return fmt.Errorf("%d symbols, at most %d", n, maxSymbols)
	}
	const size = 24 // Elf64_Sym
	for s := range n {
		var sym [size]byte
		for off := uint64(0); off < size; off += 8 { // an entry may cross a page, a word of it may not
			b, err := i.bytes(where[0]+s*size+off, 8)
			if err != nil {
				return fmt.Errorf("symbol %d: %w", s, err)
			}
			copy(sym[off:], b)
		}
		value := word(sym[8:])
		const function = 2
		imported := sym[6] == 0 && sym[7] == 0 // SHN_UNDEF: the kernel has filled in where it is
		if imported && len(i.called(value)) == 0 || !imported && (sym[4]&0xf != function || !v.hasCode(value)) {
			continue
		}
		name, err := i.text256(where[2] + uint64(binary.LittleEndian.Uint32(sym[:])))
		if err != nil {
			return fmt.Errorf("symbol %d: %w", s, err)
		}
		if imported {
			v.imports = append(v.imports, name)
			continue
		}
		v.begins[value] = name
	}
	return nil
}

func (v *view) hasCode(a uint64) bool {
	for _, r := range v.regions {
		if r.code.has(a) {
			return true
		}
	}
	return false
}

func (v *view) has(a uint64) bool {
	for _, r := range v.regions {
		if a >= page(r.from) && a < page(r.to+pageSize-1) {
			return true
		}
	}
	return false
}

// describe names an address of the module's.
func (v *view) describe(at uint64) string {
	var from uint64
	var name string
	for a, n := range v.begins {
		if a <= at && a > from {
			from, name = a, n
		}
	}
	switch {
	case name == "" || !v.hasCode(at):
		return fmt.Sprintf("%#x [%s]", at, v.name)
	case from == at:
		return fmt.Sprintf("%s [%s]", name, v.name)
	}
	return fmt.Sprintf("%s+%#x [%s]", name, at-from, v.name)
}

// drop forgets the region that begins at an address, and the functions in it: the kernel will have other code there.
func (v *view) drop(from uint64) (region, bool) {
	k := slices.IndexFunc(v.regions, func(g region) bool { return g.from == from })
	if k < 0 {
		return region{}, false
	}
	g := v.regions[k]
	v.regions = slices.Delete(v.regions, k, k+1)
	maps.DeleteFunc(v.begins, func(at uint64, _ string) bool { return g.has(at) })
	return g, true
}

// freed is called where the kernel is about to free memory of modules: module_memfree(region).
func (i *Isolation) freed(r *kvm.Regs) error {
	for n, v := range i.others {
		if _, ok := v.drop(r.RDI); ok && len(v.regions) == 0 {
			i.others = slices.Delete(i.others, n, n+1)
			i.account(v.name, func(a *Account) { a.Unloaded = true })
			return nil
		}
	}
	for n, v := range i.views {
		g, ok := v.drop(r.RDI)
		if !ok {
			continue
		}
		for at := page(g.from); at < g.to; at += pageSize {
			delete(i.text, at)
			v.layout.Unmap(at)
		}
		if err := i.punch(); err != nil {
			return err
		}
		if len(v.regions) == 0 {
			i.views = slices.Delete(i.views, n, n+1)
			i.account(v.name, func(a *Account) { a.Unloaded = true })
			i.event(Event{Kind: Unloaded, Module: v.name, Allowed: true})
			return v.close()
		}
		return i.forget(v)
	}
	return nil
}

// flushed is called where the kernel is about to drop translations of its own, flush_tlb_kernel_range(from, to): what the
// views have of them goes, too.
func (i *Isolation) flushed(r *kvm.Regs) error {
	gone := span{page(r.RDI), r.RSI}
	for base, s := range i.stacks {
		if s.from < gone.to && gone.from < s.to {
			delete(i.stacks, base)
		}
	}
	for _, v := range i.views {
		if v.stack != nil && v.stack.from < gone.to && gone.from < v.stack.to {
			v.unmapStack()
		}
		for gpa, at := range v.seen {
			if !gone.has(at) || i.text[at] == v {
				continue
			}
			if err := v.revoke(gpa); err != nil {
				return err
			}
		}
	}
	return nil
}
