package isolate

import (
	"fmt"
	"maps"
	"slices"

	"redoubt.dev/redoubt/isolate/policy"
)

// Kind is what an Event is about.
type Kind string

// Kinds of event.
const (
	Loaded    Kind = "loaded"    // a module was isolated, trusted or refused: Detail says which
	Unloaded  Kind = "unloaded"  // its code was given back
	Call      Kind = "call"      // of a function that its profile does not allow
	Entry     Kind = "entry"     // of the module where nothing begins
	Stack     Kind = "stack"     // a return to where it was not called from, a moved stack, a changed frame of the kernel
	WriteData Kind = "write"     // of the kernel's data, or another module's
	ReadData  Kind = "read"      // of another module's data
	Device    Kind = "device"    // access to a device's registers, or to a port
	Control   Kind = "control"   // a control register, a descriptor table or a model-specific register
	Opaque    Kind = "opaque"    // an access by an instruction that cannot be judged
	Fault     Kind = "exception" // raised in the module, and handed to the kernel
)

// An Event is what a module did that was refused, or noted and allowed.
type Event struct {
	Kind    Kind     `json:"kind"`
	Module  string   `json:"module"`
	Symbol  string   `json:"symbol,omitempty"`  // what was called or touched
	Address uint64   `json:"address,omitempty"` // of it
	At      string   `json:"at,omitempty"`      // the instruction, or where the call returns to
	Via     []string `json:"via,omitempty"`     // the crossings that lie on the stack, innermost first: where the module was called from, and what it called
	Detail  string   `json:"detail,omitempty"`
	Allowed bool     `json:"allowed"`
}

func (e Event) String() string {
	s := fmt.Sprintf("module %s: %s", e.Module, e.Kind)
	if e.Symbol != "" {
		s += " " + e.Symbol
	}
	if e.At != "" {
		s += " from " + e.At
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// An Account is what one module has done.
type Account struct {
	Verdict  Verdict           `json:"verdict"`
	Pages    int               `json:"pages"`    // of code, in no other view
	Entries  map[string]uint64 `json:"entries"`  // functions of it that the kernel called
	Calls    map[string]uint64 `json:"calls"`    // functions that it called
	Resumed  uint64            `json:"resumed"`  // after a turn of the kernel
	Reads    uint64            `json:"reads"`    // pages of the kernel's that it may read
	Writes   map[string]uint64 `json:"writes"`   // of data of the kernel's, judged one by one
	Refused  uint64            `json:"refused"`  // of all that
	Unloaded bool              `json:"unloaded"` // it is gone
	// Permissions are those of the two views now, while the module is isolated.
	Permissions []Permission `json:"permissions,omitempty"`
}

// Report is what has happened so far.
type Report struct {
	Modules  map[string]*Account `json:"modules"`
	Events   []Event             `json:"events"`             // the last ones
	Profiles []policy.Profile    `json:"profiles,omitempty"` // of the isolated modules, with what was learnt
}

// Report tells what has happened so far. Any goroutine may call it.
func (i *Isolation) Report() Report {
	i.turns.Lock()
	defer i.turns.Unlock()
	permissions := map[string][]Permission{}
	for _, m := range i.modules {
		permissions[m.name] = i.permissions(m)
		i.tell(m)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	r := Report{Modules: map[string]*Account{}, Events: slices.Clone(i.report.Events)}
	for n, a := range i.report.Modules {
		c := *a
		c.Permissions = permissions[n]
		c.Entries, c.Calls, c.Writes = maps.Clone(a.Entries), maps.Clone(a.Calls), maps.Clone(a.Writes)
		r.Modules[n] = &c
	}
	for _, n := range slices.Sorted(maps.Keys(i.profiles)) {
		p := *i.profiles[n]
		p.Calls, p.Writes, p.Reads = slices.Clone(p.Calls), slices.Clone(p.Writes), slices.Clone(p.Reads)
		r.Profiles = append(r.Profiles, p)
	}
	return r
}

// maxCounted bounds the names that an account counts.
const maxCounted = 1 << 9

func count(m map[string]uint64, name string, times uint64) {
	if _, ok := m[name]; ok || len(m) < maxCounted {
		m[name] += times
	}
}

// tell brings a module's account up to what has been counted beside it.
func (i *Isolation) tell(m *module) {
	i.account(m.name, func(a *Account) {
		m.entered.told(a.Entries)
		m.allowed.told(a.Calls)
	})
}

func (i *Isolation) account(name string, f func(*Account)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	a := i.report.Modules[name]
	if a == nil {
		if len(i.report.Modules) >= maxModules*2 {
			return
		}
		a = &Account{Entries: map[string]uint64{}, Calls: map[string]uint64{}, Writes: map[string]uint64{}}
		i.report.Modules[name] = a
	}
	f(a)
}

func (i *Isolation) event(e Event) {
	i.mu.Lock()
	if len(i.report.Events) == maxEvents {
		i.report.Events = slices.Delete(i.report.Events, 0, 1)
	}
	i.report.Events = append(i.report.Events, e)
	if a := i.report.Modules[e.Module]; a != nil && !e.Allowed {
		a.Refused++
	}
	i.mu.Unlock()
	if i.cfg.OnEvent != nil {
		i.cfg.OnEvent(e)
	}
}

// learn changes a profile, which Report reads.
func (i *Isolation) learn(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f()
}
