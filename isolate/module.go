package isolate

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"redoubt.dev/redoubt/isolate/frames"
	"redoubt.dev/redoubt/isolate/policy"
)

// module is one of the guest's: of a trusted one only where it lies and what it is called.
type module struct {
	name    string
	profile *policy.Profile
	regions []region
	self    span              // its struct module, which is the kernel's
	begins  map[uint64]string // functions, by address
	imports []string          // functions of the kernel, and of other modules, that it was linked with
	entered recent            // those that the kernel came to
	allowed recent            // functions of the kernel's that it called and may call
	views   []*view           // by vCPU; nil where that has not been in it
	frames  frames.Frames
	objects objects
	gone    bool // all of its memory was given back
}

// region is a part of a module's memory.
type region struct {
	span
	code span   // within it
	kind string // what tells it from the module's others: "" for the first
}

func (m *module) hasCode(a uint64) bool {
	for _, r := range m.regions {
		if r.code.has(a) {
			return true
		}
	}
	return false
}

func (m *module) has(a uint64) bool {
	for _, r := range m.regions {
		if a >= page(r.from) && a < page(r.to+pageSize-1) {
			return true
		}
	}
	return false
}

// describe names an address of the module's.
func (m *module) describe(at uint64) string {
	var from uint64
	var name string
	for a, n := range m.begins {
		if a <= at && a > from {
			from, name = a, n
		}
	}
	switch {
	case name == "" || !m.hasCode(at):
		return fmt.Sprintf("%#x [%s]", at, m.name)
	case from == at:
		return fmt.Sprintf("%s [%s]", name, m.name)
	}
	return fmt.Sprintf("%s+%#x [%s]", name, at-from, m.name)
}

// drop forgets the region that begins at an address, and the functions in it: the kernel will have other code there.
func (m *module) drop(from uint64) (region, bool) {
	k := slices.IndexFunc(m.regions, func(g region) bool { return g.from == from })
	if k < 0 {
		return region{}, false
	}
	g := m.regions[k]
	m.regions = slices.Delete(m.regions, k, k+1)
	maps.DeleteFunc(m.begins, func(at uint64, _ string) bool { return g.has(at) })
	return g, true
}

// lose takes addresses from views of a module, but those to keep.
func lose(views []*view, gone span, keep func(uint64) bool) error {
	for _, v := range views {
		if s := v.stack; s != nil && s.from < gone.to && gone.from < s.to {
			if v.running { // on a stack that is in use, and so stays: but another may come to its place
				v.restack = true
			} else {
				v.unmapStack()
			}
		}
		for gpa, at := range v.seen {
			if !gone.has(at) || keep != nil && keep(at) {
				continue
			}
			if err := v.revoke(gpa); err != nil {
				return err
			}
		}
	}
	return nil
}

// viewsOf are those that a module has.
func (i *Isolation) viewsOf(m *module) []*view {
	var all []*view
	for n, v := range m.views {
		if v != nil && (n == i.turn.id || !i.cfg.Modules.Weakened.Translations) {
			all = append(all, v)
		}
	}
	return all
}

// close gives up the views of a module that is gone. One whose vCPU is in it is given up when that comes out.
func (m *module) close() error {
	m.gone = true
	var errs []error
	for _, v := range m.views {
		switch {
		case v == nil:
		case v.running:
			v.kick()
		default:
			errs = append(errs, v.close())
		}
	}
	return errors.Join(errs...)
}

func (m *module) named(e Event) Event {
	e.Module = m.name
	return e
}

// data names what an address is of a module's data.
func (m *module) data(at uint64) (object string, off uint64, ok bool) {
	for _, r := range m.regions {
		if at < page(r.from) || at >= page(r.to+pageSize-1) {
			continue
		}
		if at < page(r.code.to+pageSize-1) && r.code.to > 0 && at >= page(r.code.from) {
			return "", 0, false
		}
		return fmt.Sprintf("[%s]%s", m.name, r.kind), at - r.from, true
	}
	return "", 0, false
}
