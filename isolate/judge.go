package isolate

import (
	"fmt"
	"slices"
	"strings"

	"redoubt.dev/redoubt/introspect/symbols"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/kvm"
)

// pages is what memory is called that is in no cache and is no variable.
const pages = "pages"

// notAllowed is why a write is refused that a profile could allow.
const notAllowed = "its profile does not allow it"

// judgeWrite says of which object of the kernel's n bytes at an address are, and why a module may not write them: "" where it
// may.
func (i *Isolation) judgeWrite(v *view, at, n uint64, seen bool) (object string, off uint64, why string) {
	if seen {
		at = i.home(at)
	}
	switch {
	case !seen:
		return "", 0, "by tables that are not the view's"
	case i.kernel.fixed.has(at) || i.kernel.fixed.has(at+n-1):
		return i.describe(at), 0, "the kernel's code and constants"
	case v.self.has(at) || v.self.has(at+n-1):
		return "struct module", at - v.self.from, "what the kernel keeps of the module"
	case v.has(at) && v.has(at+n-1):
		return v.name, 0, ""
	case i.foreign(v, at) != nil || i.foreign(v, at+n-1) != nil:
		if object, off, ok := i.foreignData(v, at); ok && i.foreign(v, at) == i.foreign(v, at+n-1) {
			if v.profile.Writable(object, off, n) {
				return object, off, ""
			}
			return object, off, notAllowed
		}
		return i.describe(at), 0, "another isolated module's code"
	case v.objects.has(at, n):
		return "its own objects", 0, ""
	}
	object, off = i.object(at)
	switch {
	case policy.NeverWritten(object):
		return object, off, "no module may write it"
	case object == i.kernel.counter && off >= i.kernel.counts.Offset && off+n <= i.kernel.counts.Offset+i.kernel.counts.Size:
		return object, off, "" // preempt_disable and preempt_enable, which compilers put into modules
	case object == pages && i.table(at):
		return "page table", off, "no module may write it"
	case object == pages && i.onThreadStack(at):
		return "stack of a thread", off, "no module may write it"
	case v.profile.Writable(object, off, n):
		return object, off, ""
	}
	return object, off, notAllowed
}

// home is the address by which memory of the kernel's image, or of a module's, is known, where at is another of it: the kernel
// sees all memory once more (page_offset_base).
func (i *Isolation) home(at uint64) uint64 {
	m, ok := i.mapped(at)
	if !ok {
		return at
	}
	gpa := m.Physical + at - m.Virtual
	if i.kernel.loaded.has(gpa) {
		return i.kernel.begin + gpa - i.kernel.loaded.from
	}
	if home, ok := i.homes[page(gpa)]; ok {
		return home + gpa%pageSize
	}
	return at
}

// settle notes where the memory of a module lies, or no longer does.
func (i *Isolation) settle(g region, there bool) error {
	for at := page(g.from); at < g.to; at += pageSize {
		m, err := i.place(at)
		switch {
		case err != nil:
			return err
		case there:
			i.homes[page(m.Physical+at-m.Virtual)] = at
		default:
			delete(i.homes, page(m.Physical+at-m.Virtual))
		}
	}
	return nil
}

// table says whether an address is of a page table.
func (i *Isolation) table(at uint64) bool {
	m, err := i.place(at)
	if err != nil {
		return true
	}
	gpa := page(m.Physical + at - m.Virtual)
	return i.userTable(gpa) || i.isTable(gpa)
}

func (i *Isolation) onThreadStack(at uint64) bool {
	m, err := i.place(at)
	return err != nil || i.ofThread(page(m.Physical+at-m.Virtual))
}

// foreign is the other isolated module that an address is of.
func (i *Isolation) foreign(v *view, at uint64) *module {
	for _, o := range i.modules {
		if o != v.module && o.has(at) {
			return o
		}
	}
	return nil
}

// foreignData names what an address is of another isolated module's data.
func (i *Isolation) foreignData(v *view, at uint64) (object string, off uint64, ok bool) {
	o := i.foreign(v, at)
	if o == nil {
		return "", 0, false
	}
	return o.data(at)
}

// object names what lies at an address: a variable of the kernel's, or of its per-CPU ones, else the page.
func (i *Isolation) object(at uint64) (string, uint64) {
	if s, ok := i.kernel.variable(at); ok {
		return s.Name, at - s.Address
	}
	for _, offset := range i.perCPU() {
		if linked := at - offset; i.kernel.perCPU.has(linked) {
			if s, ok := i.kernel.symbols.At(linked); ok {
				return s.Name, linked - s.Address
			}
		}
	}
	for _, o := range i.others {
		if name, off, ok := o.data(at); ok {
			return name, off
		}
	}
	if m, err := i.place(at); err == nil {
		if name, off, ok := i.slab(m.Physical + at - m.Virtual); ok {
			return name, off
		}
	}
	return pages, at & (pageSize - 1)
}

// perCPU is how far each processor's copies of the per-CPU variables lie from where those are linked.
func (i *Isolation) perCPU() []uint64 {
	offsets := make([]uint64, 0, len(i.cpus))
	for n := range i.cpus {
		if at := i.wordAt(i.kernel.offsets + uint64(n)*8); at != 0 {
			offsets = append(offsets, at)
		}
	}
	return offsets
}

func (k *kernel) variable(at uint64) (symbols.Symbol, bool) {
	if at < k.fixed.to || at >= k.end {
		return symbols.Symbol{}, false
	}
	return k.symbols.At(at)
}

// A writer is a function that writes memory for its caller: which argument says where, and which how much.
type writer struct{ to, size int }

// writers of the kernel's that modules may be allowed to call, with what they write judged at the call.
var writers = map[string]writer{
	"memcpy": {0, 2}, "__memcpy": {0, 2}, "memmove": {0, 2}, "__memmove": {0, 2}, "memset": {0, 2}, "__memset": {0, 2},
	"strncpy": {0, 2}, "strlcpy": {0, 2}, "strscpy": {0, 2}, "strscpy_pad": {0, 2}, "snprintf": {0, 1}, "scnprintf": {0, 1}, "vsnprintf": {0, 1},
	"strcpy": {0, -1}, "strcat": {0, -1}, "sprintf": {0, -1}, "_copy_from_user": {0, 2}, "__copy_user_nocache": {0, 2},
	"copy_user_generic_unrolled": {0, 2}, "copy_from_kernel_nofault": {0, 2}, "get_random_bytes": {0, 1}, "memcpy_fromio": {0, 2},
	"memzero_explicit": {0, 1}, "__copy_from_user_inatomic_nocache": {0, 2}, "copy_mc_to_kernel": {0, 2}, "hex2bin": {0, 2},
}

func argument(r *kvm.Regs, n int) uint64 {
	return [...]uint64{r.RDI, r.RSI, r.RDX, r.RCX, r.R8, r.R9}[n]
}

// plain says whether a call of a function of the kernel's writes nothing for a module, and neither gives nor takes memory.
func plain(name string) bool {
	_, writes := writers[name]
	return !writes && byDevice[name] == nil && !memoryOf(name)
}

// judgeArguments judges what a function of the kernel's would write for the module, itself or by a device.
func (i *Isolation) judgeArguments(v *view, name string, r *kvm.Regs) *Event {
	if device := byDevice[name]; device != nil {
		all, ok, err := device(i, r)
		if err != nil {
			return &Event{Kind: WriteData, Detail: "by a device, with " + name + ": " + err.Error()}
		}
		if ok {
			for _, p := range all {
				if e := i.judgeSpan(v, "a device, with "+name, p.at, p.size); e != nil {
					return e
				}
			}
			return nil
		}
	}
	w, ok := writers[name]
	if !ok {
		return nil
	}
	to, n := argument(r, w.to), uint64(1)
	if w.size >= 0 {
		n = argument(r, w.size)
	}
	if n > 0 && to+n > to {
		if base, ok := v.frames.Base(v.stack.from); ok && to >= v.stack.from && to+n <= base {
			return nil // its own frames
		}
		if v.stack.has(to) && to+n <= v.stack.to { // of its callers': what they gave it the address of
			for at := to &^ 7; at < to+n; at += 8 {
				if i.leadsToCode(word(v.stack.word(at))) {
					return &Event{Kind: Stack, Address: at, Detail: "a return address of the kernel's, by " + name, Allowed: i.cfg.Modules.Mode == policy.Monitor}
				}
			}
			return nil
		}
	}
	return i.judgeSpan(v, name, to, n)
}

// maxSpan bounds what one call may write.
const maxSpan = 1 << 28

// judgeSpan judges n bytes that are written for a module, page by page: what follows a page is nothing of its.
func (i *Isolation) judgeSpan(v *view, by string, to, n uint64) *Event {
	if to+n < to || n > maxSpan {
		return &Event{Kind: WriteData, Address: to, Symbol: i.describe(to), Detail: fmt.Sprintf("%d bytes by %s", n, by)}
	}
	if v.objects.has(to, n) {
		return nil
	}
	for end := to + n; to < end; to += n {
		n = min(end-to, pageSize-to%pageSize)
		object, off, why := i.judgeWrite(v, to, n, true)
		switch {
		case why == "":
		case i.cfg.Modules.Mode == policy.Learn && why == notAllowed:
			i.learn(func() { v.profile.LearnWrite(object, off, n) })
		default:
			return &Event{
				Kind: WriteData, Address: to, Symbol: object, Detail: fmt.Sprintf("%d bytes at %#x by %s: %s", n, off, by, why),
				Allowed: i.cfg.Modules.Mode == policy.Monitor,
			}
		}
	}
	return nil
}

// An object is memory that a module has allocated.
type object struct{ at, size uint64 }

// objects are a module's, by address.
type objects struct {
	all     []object
	pending map[[2]uint64]request // by stack and where the return address lies
}

// A request is a call that has not returned.
type request struct {
	size  uint64
	bases []uint64 // what is added to what it returns: an object for each; none: one object
	page  bool
}

// An allocator is a function that gives its caller memory: which argument says how much.
type allocator struct {
	size   int
	pages  bool // the argument is an order
	perCPU bool // what it returns is added to where the processor's variables are
	page   bool // what it returns is the struct page
}

var allocators = map[string]allocator{
	"alloc_pages": {1, true, false, true}, "__alloc_pages": {1, true, false, true},
	"__alloc_percpu": {0, false, true, false}, "__alloc_percpu_gfp": {0, false, true, false}, "pcpu_alloc": {0, false, true, false},
	"__kmalloc": {0, false, false, false}, "__kmalloc_node": {0, false, false, false}, "kmalloc_trace": {2, false, false, false}, "kmalloc_node_trace": {3, false, false, false}, "kmem_cache_alloc_trace": {2, false, false, false},
	"kmalloc_large": {0, false, false, false}, "kmalloc_large_node": {0, false, false, false}, "__kmalloc_node_track_caller": {0, false, false, false}, "kvmalloc_node": {0, false, false, false},
	"vmalloc": {0, false, false, false}, "vzalloc": {0, false, false, false}, "vmalloc_node": {0, false, false, false}, "vzalloc_node": {0, false, false, false}, "__vmalloc": {0, false, false, false},
	"__get_free_pages": {1, true, false, false}, "get_zeroed_page": {-1, true, false, false}, "devm_kmalloc": {1, false, false, false},
	"__kmalloc_cache": {2, false, false, false}, "__kmalloc_cache_node": {3, false, false, false}, "__kmalloc_large": {0, false, false, false}, "__kvmalloc_node": {0, false, false, false},
}

var deallocators = map[string]int{"kfree": 0, "kvfree": 0, "vfree": 0, "kfree_sensitive": 0, "kmem_cache_free": 1, "free_pages": 0, "devm_kfree": 1, "free_percpu": 0, "__free_pages": 0}

// memoryOf says whether a function gives or takes memory.
func memoryOf(name string) bool {
	name = strings.TrimSuffix(name, "_noprof")
	_, takes := deallocators[name]
	_, gives := allocators[name]
	return takes || gives
}

// asked notes a call of the module's that allocates or frees, and says what it frees. perCPU is how far the processors' variables
// lie from what stands for them.
func (o *objects) asked(stack uint64, name string, r *kvm.Regs, perCPU func() []uint64, page func(uint64) uint64) (freed []object) {
	name = strings.TrimSuffix(name, "_noprof")
	if n, ok := deallocators[name]; ok {
		bases := []uint64{0}
		at := argument(r, n)
		switch name {
		case "free_percpu":
			bases = perCPU()
		case "__free_pages":
			at = page(at)
		}
		for _, base := range bases {
			if k, found := o.find(at + base); found {
				freed = append(freed, o.all[k])
				o.all = slices.Delete(o.all, k, k+1)
			}
		}
		return freed
	}
	a, ok := allocators[name]
	if !ok || len(o.pending) >= maxObjects {
		return freed
	}
	size := uint64(0)
	if a.size >= 0 {
		size = argument(r, a.size)
	}
	if a.pages {
		size = pageSize << min(size, 10)
	}
	if o.pending == nil {
		o.pending = map[[2]uint64]request{}
	}
	a0 := request{size: size, page: a.page, bases: []uint64{0}}
	if a.perCPU {
		a0.bases = perCPU()
	}
	o.pending[[2]uint64{stack, r.RSP}] = a0
	return freed
}

// made notes what a call returned.
func (o *objects) made(stack, slot, at uint64, page func(uint64) uint64) {
	if len(o.pending) == 0 {
		return
	}
	key := [2]uint64{stack, slot}
	a, ok := o.pending[key]
	if !ok {
		return
	}
	delete(o.pending, key)
	size := a.size
	const errors = ^uint64(4095)
	if at == 0 || at == 16 || at >= errors || size == 0 || at+size < at || len(o.all)+len(a.bases) > maxObjects { // ZERO_SIZE_PTR, ERR_PTR
		return
	}
	if a.page {
		at = page(at)
	}
	for _, base := range a.bases {
		if k, found := o.find(at + base); found {
			o.all[k].size = size
		} else {
			o.all = slices.Insert(o.all, k, object{at + base, size})
		}
	}
}

// find is where an object that begins at an address is, or would be.
func (o *objects) find(at uint64) (int, bool) {
	return slices.BinarySearchFunc(o.all, at, func(x object, at uint64) int {
		switch {
		case x.at < at:
			return -1
		case x.at > at:
			return 1
		}
		return 0
	})
}

// has says whether n bytes are of one object.
func (o *objects) has(at, n uint64) bool {
	k, found := o.find(at)
	if !found {
		if k == 0 {
			return false
		}
		k--
	}
	x := o.all[k]
	return at-x.at < x.size && n <= x.size-(at-x.at)
}

// whole says whether a page is.
func (o *objects) whole(at uint64) bool { return o.has(at, pageSize) }
