package tree

import (
	"slices"
	"strings"
)

// A Tx is one domain's view of the contents: a transaction's (Begin), or of one request
// outside any (Direct). Its errors are Errnos.
type Tx struct {
	t     *Tree
	d     Domain
	base  *node // the contents when the view was taken
	root  *node // base with the changes made through this view
	own   *edit
	owned map[Domain]int // nodes by owner: the difference to the tree's

	record  bool // a transaction: what it uses is remembered
	doomed  bool // it can only end in EAGAIN
	seen    map[string]used
	log     []change // for repeating
	touched []string // nodes that came, changed or went, in order
	fired   []Fired
}

// used says what of a node a transaction relied upon.
type used byte

const (
	usedPerms used = 1 << iota // permissions; like all: being there or not
	usedValue
	usedKids // the set of children
	usedAll  // the node and everything beneath
)

// change is one successful write.
type change struct {
	kind  kind
	path  string
	value []byte
	perms []Perm
}

type kind byte

const (
	write kind = iota
	mkdir
	remove
	setPerms
)

// Begin opens a transaction for d.
func (t *Tree) Begin(d Domain) *Tx {
	x := t.Direct(d)
	x.record = true
	x.seen = map[string]used{}
	return x
}

// Direct is d's view for one request, to be committed before anything else happens to the tree.
func (t *Tree) Direct(d Domain) *Tx {
	return &Tx{t: t, d: d, base: t.root, root: t.root, own: &edit{}}
}

// Changed reports whether a commit would change anything or tell anybody.
func (x *Tx) Changed() bool { return len(x.fired) > 0 }

// use remembers that the transaction relies upon a part of a node.
func (x *Tx) use(path string, what used) error {
	if !x.record {
		return nil
	}
	if _, ok := x.seen[path]; !ok && x.d >= FirstGuest && len(x.seen) >= MaxTouched {
		return ENOSPC
	}
	x.seen[path] |= what
	return nil
}

// existing finds a node that d may use as want says. Where the node is missing, ENOENT is
// told only to who may read its nearest ancestor, as XenStore does.
func (x *Tx) existing(path string, want Access) (*node, error) {
	if err := Check(path); err != nil {
		return nil, err
	}
	n, have, missing := x.root.nearest(path)
	if err := x.use(have, usedPerms); err != nil {
		return nil, err
	}
	if missing != "" {
		if err := x.use(missing, usedPerms); err != nil {
			return nil, err
		}
		if !x.t.allows(n.perms, x.d, Read) {
			return nil, EACCES
		}
		return nil, ENOENT
	}
	if !x.t.allows(n.perms, x.d, want) {
		return nil, EACCES
	}
	return n, nil
}

// Read returns a node's value, which the caller must not change.
func (x *Tx) Read(path string) ([]byte, error) {
	n, err := x.existing(path, Read)
	if err != nil {
		return nil, err
	}
	return n.value, x.use(path, usedValue)
}

// List returns the names of a node's children, sorted, and the generation of that set: the
// same number means the same children (DIRECTORY_PART's gencnt).
func (x *Tx) List(path string) ([]string, uint64, error) {
	n, err := x.existing(path, Read)
	if err != nil {
		return nil, 0, err
	}
	if err := x.use(path, usedKids); err != nil {
		return nil, 0, err
	}
	names := make([]string, len(n.kids))
	for i, k := range n.kids {
		names[i] = k.name
	}
	return names, n.kidsGen, nil
}

// Perms returns a node's permissions.
func (x *Tx) Perms(path string) ([]Perm, error) {
	n, err := x.existing(path, Read)
	if err != nil {
		return nil, err
	}
	return slices.Clone(n.perms), nil
}

// Write sets a value, creating the node and missing parents. The value becomes the tree's.
func (x *Tx) Write(path string, value []byte) error {
	if len(value) > MaxNodeSize && x.d >= FirstGuest {
		return E2BIG
	}
	return x.do(change{kind: write, path: path, value: value})
}

// Mkdir creates a node with an empty value, and missing parents; an existing one stays, and
// nobody is told.
func (x *Tx) Mkdir(path string) error { return x.do(change{kind: mkdir, path: path}) }

// Remove deletes a node and all below it. A node that is missing is no error unless its
// parent is missing too.
func (x *Tx) Remove(path string) error { return x.do(change{kind: remove, path: path}) }

// SetPerms replaces a node's permissions. Only its owner may, and only the privileged domain
// may give it to another owner.
func (x *Tx) SetPerms(path string, perms []Perm) error {
	return x.do(change{kind: setPerms, path: path, perms: slices.Clone(perms)})
}

func (x *Tx) do(c change) error {
	if x.record && x.d >= FirstGuest && len(x.log) >= MaxTouched {
		return ENOSPC
	}
	if err := x.apply(c); err != nil {
		return err
	}
	if x.record {
		x.log = append(x.log, c)
	}
	return nil
}

// apply makes one change. Nothing is changed when it fails.
func (x *Tx) apply(c change) error {
	if err := Check(c.path); err != nil {
		return err
	}
	switch c.kind {
	case write, mkdir:
		return x.reach(c)
	case remove:
		return x.remove(c.path)
	default:
		return x.setPerms(c.path, c.perms)
	}
}

// reach writes or creates the node of a change.
func (x *Tx) reach(c change) error {
	n, have, missing := x.root.nearest(c.path)
	if x.t.denied(x.d, c.path) {
		return EACCES
	}
	if err := x.use(have, usedPerms); err != nil {
		return err
	}
	if !x.t.allows(n.perms, x.d, Write) && !x.t.ownsByRule(x.d, c.path) {
		return EACCES
	}
	if missing == "" {
		if c.kind == mkdir {
			return nil
		}
		if err := x.use(c.path, usedValue); err != nil {
			return err
		}
		n = x.mine(c.path)
		n.value, n.valueGen = c.value, x.t.nextGen()
		x.changed(c.path, false)
		return nil
	}
	if err := x.use(missing, usedPerms); err != nil {
		return err
	}
	rest := c.path[len(missing):] // what is missing below the first missing component
	if x.d >= FirstGuest && x.count(x.d)+1+strings.Count(rest, "/") > MaxNodes {
		return ENOSPC
	}
	n = x.mine(have)
	for path := missing; ; {
		gen := x.t.nextGen()
		k := &node{name: path[strings.LastIndexByte(path, '/')+1:], perms: n.perms, edit: x.own, valueGen: gen, permsGen: gen, kidsGen: gen}
		if x.d != Privileged && k.perms[0].Domain != x.d {
			// XenStore: a new node is its creator's, unless privileged.
			k.perms = slices.Clone(k.perms)
			k.perms[0].Domain = x.d
		}
		x.add(k.perms[0].Domain, 1)
		i, _ := n.index(k.name)
		n.kids = slices.Insert(n.kids, i, k)
		n.kidsGen = gen
		x.touched = append(x.touched, path)
		n = k
		if path == c.path {
			break
		}
		name, _ := next(c.path[len(path)+1:])
		path = c.path[:len(path)+1+len(name)]
	}
	n.value = c.value
	x.fired = append(x.fired, Fired{Path: c.path})
	return nil
}

func (x *Tx) remove(path string) error {
	if path == "/" {
		return EINVAL
	}
	parent, have, missing := x.root.nearest(parentOf(path))
	if err := x.use(have, usedPerms); err != nil {
		return err
	}
	if missing != "" {
		if err := x.use(missing, usedPerms); err != nil {
			return err
		}
		return ENOENT
	}
	i, ok := parent.index(path[strings.LastIndexByte(path, '/')+1:])
	if !ok {
		if !x.t.allows(parent.perms, x.d, Write) && !x.t.ownsByRule(x.d, path) {
			return EACCES
		}
		return x.use(path, usedPerms)
	}
	n := parent.kids[i]
	if err := x.use(path, usedAll); err != nil {
		return err
	}
	if !x.t.allows(n.perms, x.d, Write) || x.reservedBeneath(path, n) {
		return EACCES
	}
	x.gone(path, n)
	parent = x.mine(have)
	parent.kids = slices.Delete(parent.kids, i, i+1)
	parent.kidsGen = x.t.nextGen()
	x.fired = append(x.fired, Fired{Path: path, Removed: true})
	return nil
}

func (x *Tx) reservedBeneath(path string, n *node) bool {
	if len(x.t.reserved) == 0 {
		return false
	}
	return x.t.denied(x.d, path) || slices.ContainsFunc(n.kids, func(k *node) bool { return x.reservedBeneath(join(path, k.name), k) })
}

func (x *Tx) gone(path string, n *node) {
	x.add(n.perms[0].Domain, -1)
	x.touched = append(x.touched, path)
	for _, k := range n.kids {
		x.gone(join(path, k.name), k)
	}
}

func (x *Tx) setPerms(path string, perms []Perm) error {
	n, err := x.existing(path, None)
	if err != nil {
		return err
	}
	switch {
	case len(perms) == 0:
		return EINVAL
	case x.d >= FirstGuest && len(perms) > MaxPerms:
		return ENOSPC
	case x.t.denied(x.d, path), x.d != Privileged && (!x.t.owns(n.perms, x.d) || perms[0].Domain != n.perms[0].Domain):
		return EACCES
	}
	if path != "/" {
		x.add(n.perms[0].Domain, -1)
		x.add(perms[0].Domain, 1)
	}
	n = x.mine(path)
	n.perms, n.permsGen = perms, x.t.nextGen()
	x.changed(path, false)
	return nil
}

func (x *Tx) changed(path string, removed bool) {
	x.touched = append(x.touched, path)
	x.fired = append(x.fired, Fired{Path: path, Removed: removed})
}

func (x *Tx) count(d Domain) int { return x.t.owned[d] + x.owned[d] }

func (x *Tx) add(d Domain, n int) {
	if x.owned == nil {
		x.owned = map[Domain]int{}
	}
	x.owned[d] += n
}

// mine returns the node at path, which must exist, ready to be changed.
func (x *Tx) mine(path string) *node {
	if x.root.edit != x.own {
		x.root = x.root.clone(x.own)
	}
	n := x.root
	for rest := path[1:]; rest != ""; {
		var name string
		name, rest = next(rest)
		i, _ := n.index(name)
		k := n.kids[i]
		if k.edit != x.own {
			k = k.clone(x.own)
			n.kids[i] = k
		}
		n = k
	}
	return n
}

func (t *Tree) nextGen() uint64 {
	t.gen++
	return t.gen
}
