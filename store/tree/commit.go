package tree

import (
	"fmt"
	"slices"
	"strings"
)

// Fired is a change that watches are told of.
type Fired struct {
	Path    string
	Removed bool // and everything beneath it went too
}

// A Change is what a commit did to one node: what must be kept so that [Load] makes the same
// contents. The path of a domain's attributes or a special event's permissions begins with @.
type Change struct {
	Path    string
	Removed bool
	Value   []byte
	Perms   []Perm
}

// Persist keeps the changes of one commit, all or none. Where it fails the commit did not
// happen. A nil Persist keeps nothing.
type Persist func([]Change) error

func (p Persist) keep(c []Change) error {
	if p == nil {
		return nil
	}
	return p(c)
}

// Effects are what a commit did, for those who watch.
type Effects struct {
	Fired    []Fired
	t        *Tree
	old, now *node
}

// Visible reports whether d may be told that path changed: it can read the node as it is or as
// it was, so a removal is told though only an unreadable parent is left ("Watches"). Where
// there is and was no such node, its nearest ancestor's permissions before the change decide.
func (e *Effects) Visible(d Domain, path string) bool {
	now, old := e.now.find(path), e.old.find(path)
	if now == nil && old == nil {
		n, _, _ := e.old.nearest(path)
		return e.t.allows(n.perms, d, Read)
	}
	return (now != nil && e.t.allows(now.perms, d, Read)) || (old != nil && e.t.allows(old.perms, d, Read))
}

// Commit makes the view's changes the tree's, once persist has kept them, or fails and changes
// nothing: EAGAIN where something the transaction used has changed, an Errno where the changes
// are not allowed any more, or persist's own error. The view must not be used again.
func (x *Tx) Commit(persist Persist) (*Effects, error) {
	if x.doomed || x.conflicts() {
		return nil, EAGAIN
	}
	if x.base != x.t.root {
		y := x.t.Direct(x.d)
		for _, c := range x.log {
			if err := y.apply(c); err != nil {
				return nil, err
			}
		}
		x = y
	}
	t := x.t
	e := &Effects{t: t, old: t.root, now: x.root, Fired: x.once()}
	if len(x.touched) > 0 {
		if err := persist.keep(x.changes()); err != nil {
			return nil, err
		}
	}
	t.root = x.root
	for d, n := range x.owned {
		if t.owned[d] += n; t.owned[d] == 0 {
			delete(t.owned, d)
		}
	}
	return e, nil
}

// CommitDomain commits x and makes a the attributes of d, as one change: both are kept or neither.
func (x *Tx) CommitDomain(d Domain, a Attributes, persist Persist) (*Effects, error) {
	kept := false
	e, err := x.Commit(func(c []Change) error {
		kept = true
		return persist.keep(append(c, a.change(d)))
	})
	if err == nil && !kept { // x changes nothing
		err = persist.keep([]Change{a.change(d)})
	}
	if err != nil {
		return nil, err
	}
	x.t.setDomain(d, a)
	return e, nil
}

func (x *Tx) conflicts() bool {
	if x.base == x.t.root {
		return false
	}
	for path, what := range x.seen {
		was, is := x.base.find(path), x.t.root.find(path)
		switch {
		case was == is:
		case was == nil, is == nil, what&usedAll != 0,
			what&usedPerms != 0 && was.permsGen != is.permsGen,
			what&usedValue != 0 && was.valueGen != is.valueGen,
			what&usedKids != 0 && was.kidsGen != is.kidsGen:
			return true
		}
	}
	return false
}

// Renew gives a transaction the contents of now as its view and decides that it will end in
// EAGAIN. Its owner does so with transactions that stay open for so long that what they alone
// still see costs too much.
func (x *Tx) Renew() {
	log := x.log
	*x = *x.t.Begin(x.d)
	x.doomed = true
	for _, c := range log {
		_ = x.do(c)
	}
}

// once is x.fired without repetitions.
func (x *Tx) once() []Fired {
	if len(x.fired) < 2 {
		return x.fired
	}
	seen := map[Fired]bool{}
	return slices.DeleteFunc(x.fired, func(f Fired) bool {
		dup := seen[f]
		seen[f] = true
		return dup
	})
}

func (x *Tx) changes() []Change {
	out := make([]Change, 0, len(x.touched))
	seen := map[string]bool{}
	for _, p := range x.touched {
		if len(x.touched) > 1 {
			if seen[p] {
				continue
			}
			seen[p] = true
		}
		if n := x.root.find(p); n != nil {
			out = append(out, Change{Path: p, Value: n.value, Perms: n.perms})
		} else {
			out = append(out, Change{Path: p, Removed: true})
		}
	}
	return out
}

// All calls yield with every node and attribute, as [Load] takes them, parents first.
func (t *Tree) All(yield func(Change) bool) {
	var walk func(path string, n *node) bool
	walk = func(path string, n *node) bool {
		if !yield(Change{Path: path, Value: n.value, Perms: n.perms}) {
			return false
		}
		for _, k := range n.kids {
			if !walk(join(path, k.name), k) {
				return false
			}
		}
		return true
	}
	if !walk("/", t.root) {
		return
	}
	for d, a := range t.domains {
		if !yield(Change{Path: domainKey(d), Value: a.encode()}) {
			return
		}
	}
	for name, perms := range t.special {
		if !yield(Change{Path: name, Perms: perms}) {
			return
		}
	}
}

// Load adds what was kept, one entry after another, parents first. An entry that cannot have
// come from a commit is an error.
func (t *Tree) Load(c Change) error {
	if rest, ok := strings.CutPrefix(c.Path, domainPrefix); ok {
		return t.loadDomain(rest, c.Value)
	}
	if len(c.Perms) == 0 {
		return fmt.Errorf("%q has no owner", c.Path)
	}
	if c.Path == IntroduceDomain || c.Path == ReleaseDomain {
		t.special[c.Path] = c.Perms
		return nil
	}
	if err := Check(c.Path); err != nil {
		return fmt.Errorf("%q is no path", c.Path)
	}
	if c.Path == "/" {
		t.root.value, t.root.perms = c.Value, c.Perms
		return nil
	}
	parent := t.root.find(parentOf(c.Path))
	if parent == nil {
		return fmt.Errorf("%q has no parent", c.Path)
	}
	name := c.Path[strings.LastIndexByte(c.Path, '/')+1:]
	i, ok := parent.index(name)
	if ok {
		return fmt.Errorf("%q is there twice", c.Path)
	}
	gen := t.nextGen()
	parent.kids = slices.Insert(parent.kids, i, &node{name: name, value: c.Value, perms: c.Perms, valueGen: gen, permsGen: gen, kidsGen: gen})
	parent.kidsGen = gen
	t.owned[c.Perms[0].Domain]++
	return nil
}

const domainPrefix = "@domain/"

func domainKey(d Domain) string { return domainPrefix + fmt.Sprint(uint32(d)) }

func (a Attributes) change(d Domain) Change {
	return Change{Path: domainKey(d), Removed: a == Attributes{}, Value: a.encode()}
}

func (a Attributes) encode() []byte { return fmt.Appendf(nil, "%t %d", a.Introduced, a.Target) }

func (t *Tree) loadDomain(id string, value []byte) error {
	var d Domain
	var a Attributes
	if _, err := fmt.Sscanf(id, "%d", &d); err != nil {
		return fmt.Errorf("domain %q: %w", id, err)
	}
	if _, err := fmt.Sscanf(string(value), "%t %d", &a.Introduced, &a.Target); err != nil {
		return fmt.Errorf("domain %s: %q: %w", id, value, err)
	}
	t.domains[d] = a
	return nil
}
