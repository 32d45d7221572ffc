// Package isolate fences the untrusted modules of a guest's kernel, from outside and on an unmodified host (the second half
// of system D): the module's code leaves the kernel's view of memory and runs in a view of its own, a second virtual machine
// over the same memory, in which there is nothing but what it was granted. Every crossing between the two is judged.
//
// The flow:
//
//	the kernel loads a module ── probe (do_init_module) ──▶ load: symbols of the module, a view, its code leaves the kernel's view
//	the kernel calls it ──────── no code there: exit ─────▶ enter: is this where a function begins? its stack is shown to the view
//	the module runs in its view ─ touches data ───────────▶ access: its own pages are there; the kernel's can be read; else judged
//	                            ─ calls, returns ─────────▶ leave: may it call that? did it leave the stack alone?
//	                            ─ raises an exception ────▶ trap: the kernel's own handler gets it
//	                            ─ a millisecond passes ───▶ the kernel's view goes on, so that its interrupts are taken
//	the kernel frees its code ── probe (module_memfree) ──▶ unload: the pages come back
//
// Each vCPU has a view of each module, of its own: its own stack pages, so that no vCPU reaches what another has on the
// kernel's stacks, and its own tables. What the module is and what it may do, and the calls that lie on the stacks, are one
// for all: a thread may go on in another vCPU's view.
//
// Rule one: a view's memory slots are its only boundary. What runs there has the kernel's privilege, loads control
// registers as it likes and no exit tells: so whatever it can write is its word, its page tables and the stack of
// exceptions included, and each judgement is by guest-physical address, or by registers at an exit.
//
// Trusted is the guest's kernel as it was measured: what is read of its memory (symbols, types, where a module lies) is read
// before any module has run, or is written by the kernel's own code in pages that no module was granted.
//
// Limits: What lies in an operations table that a module passed once is not judged again. A sub-page object that a
// module allocated and somebody else freed stays writable to it. Extended registers (AVX) do not cross: a module that uses
// them between kernel_fpu_begin and kernel_fpu_end calls nothing meanwhile that would miss them.
//
// Concurrency: a vCPU's goroutine calls Plant, Probed, Fetched and Touched, between two runs of that. One at a time has its turn
// and judges; a turn ends while a module runs. Modules run side by side.
//
// What another vCPU does while a module runs: what it takes away (an object that is freed, addresses that are unmapped) leaves the
// slots of all views at once, and what their processors remember of addresses is dropped when they next come from the
// kernel, for whose interrupt that processor waits.
package isolate

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"redoubt.dev/redoubt/introspect/paging"
	"redoubt.dev/redoubt/isolate/locked"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/isolate/probe"
	"redoubt.dev/redoubt/kvm"
)

// A module runs for a slice without an exit, and for a spell with them, before the kernel's view goes on: interrupts wait there.
const (
	slice = time.Millisecond
	spell = 4 * time.Millisecond // a tick of a kernel with 250 a second
)

// Bounds of what a guest can make an Isolation hold.
const (
	maxModules = 64
	maxTrusted = 512
	maxPages   = 1 << 13 // of code, of all isolated modules
	maxObjects = 1 << 16 // that a module has allocated
	maxGrants  = 1 << 14 // pages of the kernel's that a view has
	maxEvents  = 256     // kept for Report
)

// Memory is the guest's RAM by guest-physical address.
type Memory interface {
	// Slice is n bytes at gpa, or an error where not all of it is RAM.
	Slice(gpa, n uint64) ([]byte, error)
}

// Config is what an Isolation is made of. All of it stays the caller's.
type Config struct {
	System *kvm.System
	CPUs   []CPU // the guest's, by number
	Memory Memory
	// Punch takes pages out of the guest's own view, by guest-physical address; all others are there. The vCPU that asks for it
	// is out of that view.
	Punch func(cpu int, pages []uint64) error
	// Hold runs f while none of the other vCPUs is in the guest's own view. Those that wait for their turn here, or run a
	// module, are not.
	Hold func(cpu int, f func() error) error
	// Modules is what is done about modules.
	Modules Modules
	// OnEvent is told what was refused or noted; it must return at once.
	OnEvent func(Event)
}

// A CPU is one of the guest's vCPUs.
type CPU struct {
	VCPU  *kvm.VCPU
	CPUID []kvm.CPUIDEntry
}

// cpu is one of the guest's vCPUs.
type cpu struct {
	CPU
	id    int
	again uint64 // where it came to code that was gone
	last  *view  // that it was in
}

// Modules is the policy of a guest's modules.
type Modules struct {
	Default  Verdict
	Trusted  []string // names of modules that are not isolated, if the kernel found their signature valid
	Mode     policy.Mode
	Profiles []policy.Profile
	Weakened Weakness
}

// A Weakness turns off what it takes that several vCPUs are in modules at once. For tests, which show what each is for.
type Weakness struct {
	Atomic       bool // atomic instructions are taken for plain writes
	Stack        bool // a stack is written back whole
	Translations bool // what is unmapped leaves one vCPU's view alone
}

// ProbePort is the port to which the probes write.
const ProbePort = probe.Port

// Verdict is what becomes of a module.
type Verdict string

// Verdicts.
const (
	Isolate Verdict = "isolate"
	Trust   Verdict = "trust"
	Refuse  Verdict = "refuse"
)

// An Isolation is the fence around one guest's modules.
type Isolation struct {
	cfg     Config
	planted atomic.Bool

	turns   sync.Mutex // over all to mu; before it
	turn    *cpu       // whose turn it is
	cpus    []*cpu
	kernel  *kernel // nil before Plant
	probes  map[uint64]func(*Isolation, *kvm.Regs) error
	modules []*module
	others  []*module          // that are not isolated
	text    map[uint64]*module // by page of code, virtual
	homes   map[uint64]uint64  // by page of a module's memory, physical: where the kernel has it for that
	stacks  map[uint64]*stack
	threads map[uint64][]uint64 // by where a thread's stack lies: its pages

	mu       sync.Mutex // over the rest, which Report reads
	report   Report
	profiles map[string]*policy.Profile // by module: of all that were isolated, with what they have learnt
}

// ErrConfig says that an Isolation cannot be made of a Config.
var ErrConfig = errors.New("isolation of modules")

// Supported says what a host's KVM lacks for isolating modules, if anything.
func Supported(s *kvm.System) error {
	return s.Require(kvm.EmulationFailure, kvm.MSRFilter, kvm.ReadOnlyMemory, kvm.ImmediateExit, kvm.SyncRegs)
}

// New makes an Isolation. Nothing is isolated before Plant.
func New(cfg Config) (*Isolation, error) {
	if err := Supported(cfg.System); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	i := &Isolation{
		cfg: cfg, text: map[uint64]*module{}, stacks: map[uint64]*stack{}, threads: map[uint64][]uint64{}, homes: map[uint64]uint64{},
		probes: map[uint64]func(*Isolation, *kvm.Regs) error{},
	}
	for n, c := range cfg.CPUs {
		c.VCPU.ShareRegs(false)
		i.cpus = append(i.cpus, &cpu{CPU: c, id: n})
	}
	i.report.Modules, i.profiles = map[string]*Account{}, map[string]*policy.Profile{}
	return i, nil
}

// Close gives all views up. No vCPU runs any more.
func (i *Isolation) Close() error {
	var errs []error
	for _, m := range i.modules {
		errs = append(errs, m.close())
	}
	i.modules = nil
	return errors.Join(errs...)
}

// take begins a vCPU's turn, which ends with turns.
func (i *Isolation) take(cpu int) {
	i.turns.Lock()
	i.turn = i.cpus[cpu]
}

// Plant reads the guest's kernel from its memory and puts the probes into it, once. It is to be called when the kernel runs and no
// module is in: before the guest's first access to its TPM, by the vCPU that makes it.
func (i *Isolation) Plant(cpu int) error {
	if i.planted.Load() {
		return nil
	}
	i.take(cpu)
	defer i.turns.Unlock()
	if i.kernel != nil {
		return nil
	}
	// No other processor is in a function while its first instruction changes.
	if err := i.cfg.Hold(cpu, i.plant); err != nil {
		return err
	}
	i.planted.Store(true)
	return nil
}

func (i *Isolation) plant() error {
	s, err := i.turn.VCPU.Sregs()
	if err != nil {
		return err
	}
	k, err := readKernel(i.cfg.Memory, &s)
	if err != nil {
		return fmt.Errorf("%w: the guest's kernel: %w", ErrConfig, err)
	}
	for _, p := range []struct {
		names []string // one of them
		do    func(*Isolation, *kvm.Regs) error
	}{
		{[]string{"do_init_module"}, (*Isolation).loaded},
		{[]string{"execmem_free", "module_memfree"}, (*Isolation).freed},
		{[]string{"flush_tlb_kernel_range"}, (*Isolation).flushed},
	} {
		at, err := k.plant(p.names)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrConfig, err)
		}
		i.probes[at] = p.do
	}
	i.kernel = k
	return nil
}

// Probed serves a write of a vCPU to a port, if it was one of the probes.
func (i *Isolation) Probed(cpu int, port uint16) (bool, error) {
	if port != probe.Port || !i.planted.Load() {
		return false, nil
	}
	i.take(cpu)
	defer i.turns.Unlock()
	r, err := i.turn.VCPU.Regs()
	if err != nil {
		return false, err
	}
	do := i.probes[r.RIP]
	if do == nil {
		return false, nil
	}
	return true, do(i, &r)
}

// Fetched serves an exit of a vCPU that KVM could not carry out an instruction of, if that was a module's.
func (i *Isolation) Fetched(cpu int) (bool, error) {
	if !i.planted.Load() {
		return false, nil
	}
	i.take(cpu)
	defer i.turns.Unlock()
	c := i.turn
	r, err := c.VCPU.Regs()
	if err != nil {
		return false, err
	}
	if v := c.last; v != nil && !v.gone && v.hasCode(r.RIP) {
		c.again = 0
		return true, i.enter(v, &r)
	}
	m := i.text[page(r.RIP)]
	if m == nil {
		// Another vCPU may have given the module's code back meanwhile: then it is there now.
		gone := len(i.cpus) > 1 && r.RIP >= firstMade && c.again != r.RIP
		c.again = r.RIP
		return gone, nil
	}
	c.again = 0
	v, err := i.view(m)
	if err != nil { // fail closed: the call ends in an oops
		i.event(m.named(Event{Kind: Entry, Address: r.RIP, Symbol: m.describe(r.RIP), Detail: err.Error()}))
		return true, i.raise(r, invalidOpcode, 0)
	}
	c.last = v
	return true, i.enter(v, &r)
}

// Touched serves an access of the kernel's to a module's code as data: a read in p, or a write of it.
func (i *Isolation) Touched(gpa uint64, p []byte, write bool) bool {
	b, err := i.cfg.Memory.Slice(gpa, uint64(len(p)))
	if err != nil {
		return false
	}
	// RAM that has no slot: a module's code, or what another vCPU has just given back.
	if write {
		locked.Store(b, p)
	} else {
		copy(p, b)
	}
	return true
}

func page(a uint64) uint64 { return a &^ (pageSize - 1) }

const pageSize = 4096

// reader is the guest's memory as an io.ReaderAt.
type reader struct{ m Memory }

func (r reader) ReadAt(p []byte, off int64) (int, error) {
	b, err := r.m.Slice(uint64(off), uint64(len(p)))
	if err != nil {
		return 0, err
	}
	return copy(p, b), nil
}

var _ io.ReaderAt = reader{}

// place is where an address of the kernel's half lies, or of the process that runs.
func (i *Isolation) place(virtual uint64) (paging.Mapping, error) {
	if virtual>>63 != 0 {
		return i.kernel.space.Walk(virtual)
	}
	s, err := i.turn.VCPU.Sregs()
	if err != nil {
		return paging.Mapping{}, err
	}
	user := paging.Space{Memory: reader{i.cfg.Memory}, Root: s.CR3, Levels: 4}
	return user.Walk(virtual)
}

// bytes are n bytes of the kernel's memory, at an address and up to its page's end at most.
func (i *Isolation) bytes(virtual, n uint64) ([]byte, error) {
	m, err := i.place(virtual)
	if err != nil {
		return nil, err
	}
	if left := pageSize - virtual&(pageSize-1); n > left {
		return nil, fmt.Errorf("%d bytes at %#x cross a page", n, virtual)
	}
	return i.cfg.Memory.Slice(m.Physical+virtual-m.Virtual, n)
}
