package isolate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/kvm"
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
	before := len(i.text)
	if err := i.isolate(m, name); err != nil { // fail closed: what cannot be fenced does not run
		return i.refuseLoad(m, name, err.Error())
	}
	pages := len(i.text) - before
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

// isolate fences a module: it takes its code out of the kernel's view, and makes the view of the vCPU that loads it.
func (i *Isolation) isolate(at uint64, name string) (err error) {
	if len(i.modules) >= maxModules {
		return fmt.Errorf("%d modules are isolated already", maxModules)
	}
	m := &module{name: name, begins: map[uint64]string{}, views: make([]*view, len(i.cpus)), profile: i.profile(name)}
	if m.regions, err = i.regions(at); err != nil {
		return err
	}
	m.self = span{at, at + i.kernel.module.size}
	if err := i.functions(at, m); err != nil {
		return err
	}
	if i.cfg.Modules.Mode == policy.Learn { // all of them, also those that it calls seldom
		i.learn(func() {
			for _, n := range m.imports {
				m.profile.LearnCall(n)
			}
		})
	}
	pages := len(i.text)
	for _, r := range m.regions {
		pages += int(pagesOf(r.code) / pageSize)
	}
	if pages > maxPages {
		return fmt.Errorf("more than %d pages of code", maxPages)
	}
	if _, err := i.view(m); err != nil {
		return err
	}
	for _, r := range m.regions {
		for at := page(r.code.from); at < r.code.to; at += pageSize {
			i.text[at] = m
		}
	}
	i.modules = append(i.modules, m)
	for _, r := range m.regions {
		if err := i.settle(r, true); err != nil {
			return err
		}
	}
	return i.punch()
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
func (i *Isolation) trust(at uint64, name string) (err error) {
	m := &module{name: name, begins: map[uint64]string{}}
	if m.regions, err = i.regions(at); err != nil {
		return err
	}
	if err := i.functions(at, m); err != nil {
		return err
	}
	if len(i.others) >= maxTrusted {
		return fmt.Errorf("%d modules are trusted already", maxTrusted)
	}
	i.others = append(i.others, m)
	for _, r := range m.regions {
		if err := i.settle(r, true); err != nil {
			return err
		}
	}
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
func (i *Isolation) functions(at uint64, m *module) error {
	f := i.kernel.module
	b, err := i.bytes(at+f.kallsyms.Offset, 8)
	if err != nil {
		return err
	}
	at = word(b)
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
		if imported && len(i.called(value)) == 0 || !imported && (sym[4]&0xf != function || !m.hasCode(value)) {
			continue
		}
		name, err := i.text256(where[2] + uint64(binary.LittleEndian.Uint32(sym[:])))
		if err != nil {
			return fmt.Errorf("symbol %d: %w", s, err)
		}
		if imported {
			m.imports = append(m.imports, name)
			continue
		}
		m.begins[value] = name
	}
	return nil
}

// freed is called where the kernel is about to free memory of modules: module_memfree(region).
func (i *Isolation) freed(r *kvm.Regs) error {
	for n, m := range i.others {
		g, ok := m.drop(r.RDI)
		if !ok {
			continue
		}
		if len(m.regions) == 0 {
			i.others = slices.Delete(i.others, n, n+1)
			i.account(m.name, func(a *Account) { a.Unloaded = true })
		}
		return i.settle(g, false)
	}
	for n, m := range i.modules {
		g, ok := m.drop(r.RDI)
		if !ok {
			continue
		}
		i.tell(m)
		m.entered = recent{} // functions may be gone
		for at := page(g.from); at < g.to; at += pageSize {
			delete(i.text, at)
		}
		if err := i.settle(g, false); err != nil {
			return err
		}
		if err := lose(i.viewsOf(m), span{page(g.from), g.to}, nil); err != nil {
			return err
		}
		if err := i.punch(); err != nil || len(m.regions) > 0 {
			return err
		}
		i.modules = slices.Delete(i.modules, n, n+1)
		i.account(m.name, func(a *Account) { a.Unloaded = true })
		i.event(Event{Kind: Unloaded, Module: m.name, Allowed: true})
		return m.close()
	}
	return nil
}

// flushed is called where the kernel is about to drop translations of its own, flush_tlb_kernel_range(from, to): what the
// views have of them goes, too.
//
// A view whose vCPU is in it just now keeps what its processor remembers until that next comes from the kernel. It will,
// before the flush is over: the kernel waits until all processors have taken its interrupt.
func (i *Isolation) flushed(r *kvm.Regs) error {
	gone := span{page(r.RDI), r.RSI}
	for base, s := range i.stacks {
		if s.from < gone.to && gone.from < s.to {
			delete(i.stacks, base)
		}
	}
	for stack := range i.threads {
		if stack < gone.to && gone.from < stack+threadStack {
			delete(i.threads, stack)
		}
	}
	for _, m := range i.modules {
		if err := lose(i.viewsOf(m), gone, func(at uint64) bool { return i.text[at] == m }); err != nil {
			return err
		}
	}
	return nil
}
