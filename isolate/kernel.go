package isolate

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"redoubt.dev/redoubt/introspect/paging"
	"redoubt.dev/redoubt/introspect/symbols"
	"redoubt.dev/redoubt/introspect/types"
	"redoubt.dev/redoubt/isolate/probe"
	"redoubt.dev/redoubt/kvm"
)

// kernel is what is known of the guest's, by the addresses at which it runs.
type kernel struct {
	memory  Memory
	space   paging.Space // the kernel's own
	symbols *symbols.Table
	sorted  []symbols.Symbol // the same, by address
	loaded  span             // where it lies, physically, and
	begin   uint64           // where it sees that
	text    span             // code
	fixed   span             // code and read-only data
	thunks  []span
	refusal uint64 // a function that does nothing but fail, without arguments

	module  moduleFields
	end     uint64 // of its variables
	perCPU  span   // of its per-CPU variables, as they are linked
	offsets uint64 // of a word for each processor: how far its copies lie from those
	counter string // the per-CPU variable that counts why the process may not be switched, or that this is a part of
	counts  types.Field
	heap    heap
	threads threads
	lists   lists
}

// moduleFields are the members of struct module, mod_kallsyms and what they hold.
type moduleFields struct {
	name, state, init, signed, kallsyms types.Field
	symtab, symbols, strtab             types.Field
	regions                             []regionFields
	size                                uint64 // of all of it
}

type regionFields struct {
	base, size, text types.Field
	code             bool // all of it, where there is no text
}

// span is addresses from one to below another.
type span struct{ from, to uint64 }

func (s span) has(a uint64) bool { return a >= s.from && a < s.to }

// meets says whether a page has a part of it.
func (s span) meets(page uint64) bool { return s.from < page+pageSize && page < s.to }

// Of a kernel of x86-64 (Documentation/arch/x86/x86_64/mm.rst).
const (
	firstText  = 0xffffffff80000000
	lastText   = 0xffffffffbfffffff
	mostTables = 512 + 8
	maxKernel  = 256 << 20
)

func readKernel(memory Memory, s *kvm.Sregs) (*kernel, error) {
	if s.CR4&(1<<12) != 0 {
		return nil, errors.New("its page tables have five levels")
	}
	k := &kernel{memory: memory, space: paging.Space{Memory: reader{memory}, Root: s.CR3, Levels: 4}}
	image, begin, err := k.image()
	if err != nil {
		return nil, err
	}
	k.begin = begin
	if k.symbols, err = symbols.Find(image); err != nil {
		return nil, err
	}
	k.sorted = slices.Collect(k.symbols.All())
	at := func(name string) uint64 {
		s, ok := k.symbols.Lookup(name)
		if !ok {
			err = errors.Join(err, fmt.Errorf("it has no symbol %s", name))
		}
		return s.Address
	}
	k.text = span{at("_text"), at("_etext")}
	k.fixed = span{at("_text"), at("__end_rodata")}
	k.findThunks()
	btf := span{at("__start_BTF"), at("__stop_BTF")}
	tables := at("init_top_pgt")
	k.refusal = at("sys_ni_syscall")
	k.end = at("_end")
	k.perCPU = span{at("__per_cpu_start"), at("__per_cpu_end")}
	k.offsets = at("__per_cpu_offset")
	k.counter, k.counts = "__preempt_count", types.Field{Size: 4}
	if err != nil {
		return nil, err
	}
	end := begin + uint64(len(image))
	if k.text.from != begin || btf.from < begin || btf.to < btf.from || btf.to > end || k.fixed.to > end {
		return nil, fmt.Errorf("it lies from %#x to %#x, its symbols say %#x", begin, end, k.text.from)
	}
	all, err := types.Find(image[btf.from-begin : btf.to-begin])
	if err != nil {
		return nil, err
	}
	if err := errors.Join(k.fields(all), k.heap.find(all, at), k.threads.find(all, at), k.lists.find(all), err); err != nil {
		return nil, err
	}
	m, err := k.space.Walk(tables)
	if err != nil {
		return nil, err
	}
	k.space.Root = m.Physical + tables - m.Virtual
	return k, nil
}

// findThunks finds the code that a compiler puts in the place of indirect calls and returns, by the kernel's mitigations.
func (k *kernel) findThunks() {
	lookup := func(name string) uint64 {
		s, _ := k.symbols.Lookup(name)
		return s.Address
	}
	all := span{lookup("__indirect_thunk_start"), lookup("__indirect_thunk_end")}
	if all.from == 0 { // from 6.9 the section has no symbols of its own
		all = span{from: lookup("__x86_indirect_thunk_array")}
		all.to, _ = k.symbols.After(lookup("__x86_return_thunk"))
	}
	if all.from != 0 && all.to > all.from {
		k.thunks = append(k.thunks, all)
	}
	// Of AMD's Zen 3 and 4, where its address matters: the two functions, of a few bytes, lie together.
	const few = 32
	if at := lookup("srso_alias_safe_ret"); at != 0 && !all.has(at) {
		k.thunks = append(k.thunks, span{at, at + few})
	}
}

// thunk says whether an address is of one.
func (k *kernel) thunk(at uint64) bool {
	return slices.ContainsFunc(k.thunks, func(s span) bool { return s.has(at) })
}

// image finds the kernel as it lies in memory, in one piece, and where it is seen.
func (k *kernel) image() ([]byte, uint64, error) {
	var begin, physical, size uint64
	for m, err := range k.space.Mappings(firstText, lastText, mostTables) {
		if err != nil {
			return nil, 0, err
		}
		switch {
		case size == 0 && !m.Executable:
			continue
		case size == 0:
			begin, physical = m.Virtual, m.Physical
		case m.Virtual != begin+size || m.Physical != physical+size:
			k.loaded = span{physical, physical + size}
			b, err := k.memory.Slice(physical, size)
			return b, begin, err
		}
		if size += m.Size; size > maxKernel {
			break
		}
	}
	if size == 0 {
		return nil, 0, errors.New("its tables map no code")
	}
	k.loaded = span{physical, physical + size}
	b, err := k.memory.Slice(physical, size)
	return b, begin, err
}

func (k *kernel) fields(t *types.Types) error {
	var err error
	field := func(structure, member string) types.Field {
		f, ferr := t.Field(structure, member)
		if ferr != nil {
			err = errors.Join(err, fmt.Errorf("struct %s: %s: %w", structure, member, ferr))
		}
		return f
	}
	m := &k.module
	m.name, m.state, m.init = field("module", "name"), field("module", "state"), field("module", "init")
	size, serr := t.Size("module")
	m.size, err = size, errors.Join(err, serr)
	m.kallsyms = field("module", "kallsyms")
	m.symtab, m.symbols, m.strtab = field("mod_kallsyms", "symtab"), field("mod_kallsyms", "num_symtab"), field("mod_kallsyms", "strtab")
	if f, ferr := t.Field("pcpu_hot", "preempt_count"); ferr == nil { // from 6.2
		k.counter, k.counts = "pcpu_hot", f
	}
	m.signed, _ = t.Field("module", "sig_ok")               // a kernel without signatures has none
	if all, ferr := t.Field("module", "mem"); ferr == nil { // from 6.4
		base, size := field("module_memory", "base"), field("module_memory", "size")
		one, serr := t.Size("module_memory")
		if serr != nil || one == 0 {
			return errors.Join(err, fmt.Errorf("struct module_memory: %w", serr))
		}
		const text, initText = 0, 4 // enum mod_mem_type
		for n := range all.Size / one {
			r := regionFields{base: base, size: size, code: n == text || n == initText}
			r.base.Offset += all.Offset + n*one
			r.size.Offset += all.Offset + n*one
			m.regions = append(m.regions, r)
		}
	} else {
		for _, l := range []string{"core_layout.", "init_layout."} {
			m.regions = append(m.regions, regionFields{field("module", l+"base"), field("module", l+"size"), field("module", l+"text_size"), false})
		}
	}
	return err
}

// plant puts a trap into the first of some functions that the kernel has, and says where.
func (k *kernel) plant(names []string) (uint64, error) {
	for _, n := range names {
		s, ok := k.symbols.Lookup(n)
		if !ok {
			continue
		}
		m, err := k.space.Walk(s.Address)
		if err != nil {
			return 0, err
		}
		code, err := k.memory.Slice(m.Physical+s.Address-m.Virtual, probe.Size)
		if err != nil {
			return 0, err
		}
		at, err := probe.Plant(code)
		if err != nil {
			return 0, fmt.Errorf("%s: %w: it begins with % x", n, err, code)
		}
		return s.Address + uint64(at), nil
	}
	return 0, fmt.Errorf("the kernel has none of %v", names)
}

// functions are the names of the function that begins at an address: none where none does.
func (k *kernel) functions(at uint64) []string {
	if !k.text.has(at) {
		return nil
	}
	var names []string
	i, _ := slices.BinarySearchFunc(k.sorted, at, func(s symbols.Symbol, at uint64) int { return cmp.Compare(s.Address, at) })
	for ; i < len(k.sorted) && k.sorted[i].Address == at; i++ {
		names = append(names, k.sorted[i].Name)
	}
	return names
}

// describe names an address as oopses do.
func (k *kernel) describe(at uint64) string {
	if s, ok := k.symbols.At(at); ok && k.text.from <= at && at < k.text.from+maxKernel {
		if s.Address == at {
			return s.Name
		}
		return fmt.Sprintf("%s+%#x", s.Name, at-s.Address)
	}
	return fmt.Sprintf("%#x", at)
}

func word(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
