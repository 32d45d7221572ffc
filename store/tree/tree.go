// Package tree is the contents of the store: a tree of named values with owners, permissions
// and quotas, and the transactions on it, as XenStore's (docs/misc/xenstore.txt, "Database
// read, write and permissions operations" and "Transactions"). It is pure: no I/O, no clock,
// no locks; package state gives it one owner.
//
// Nodes that were committed never change: a change copies the nodes from the root down to what
// it concerns. So a transaction's view is one pointer, taken when it begins, and everything it
// reads is of that moment. Each node carries three generations: of its value, of its permissions
// and of its set of children. A transaction remembers which of them it used; it commits if none
// of these has changed since, and answers EAGAIN otherwise. Hence two transactions that make
// different children of one directory do not conflict, and one that lists the directory does.
// A commit onto contents that have moved on repeats the transaction's writes there, with every
// permission and quota checked again.
//
// Quotas bind guests only (domains from [FirstGuest] on); permissions bind everybody but
// [Privileged].
package tree

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"redoubt.dev/redoubt/store/wire"
)

// A Domain identifies who asks. Connections carry it; nothing a client sends changes it.
type Domain uint32

const (
	// Privileged is the domain that every permission check passes: the Builder.
	Privileged Domain = 0
	// FirstGuest is the first domain that is a guest; those below are services.
	FirstGuest Domain = 16
)

// Home is a domain's directory, beneath which its relative paths are resolved
// (GET_DOMAIN_PATH).
func Home(d Domain) string { return "/local/domain/" + strconv.FormatUint(uint64(d), 10) }

// Errno is an error as clients see it, by name (xs_wire.h, xsd_errors).
type Errno string

const (
	EPERM  Errno = "EPERM"
	ENOENT Errno = "ENOENT"
	EIO    Errno = "EIO"
	EAGAIN Errno = "EAGAIN"
	EACCES Errno = "EACCES"
	EBUSY  Errno = "EBUSY"
	EINVAL Errno = "EINVAL"
	ENOSPC Errno = "ENOSPC"
	EEXIST Errno = "EEXIST"
	ENOSYS Errno = "ENOSYS"
	E2BIG  Errno = "E2BIG"
)

func (e Errno) Error() string { return string(e) }

// Access is a set of rights to one node.
type Access byte

const (
	None  Access = 0
	Read  Access = 1
	Write Access = 2
	Both  Access = 3
)

// A Perm gives one domain rights. The first of a node's list names its owner, who may do all,
// and what domains not listed may do.
type Perm struct {
	Domain Domain
	Access Access
}

// Limits of one guest: those of the C daemon where it has one.
const (
	MaxNodes    = 1000 // nodes it owns
	MaxNodeSize = 2048 // bytes of a value
	MaxPerms    = 5    // permissions of a node
	// MaxTouched bounds the nodes one transaction may use, and its changes.
	MaxTouched = 1024
)

// Special events, which are watched like paths but are no nodes ("Watches").
const (
	IntroduceDomain = "@introduceDomain"
	ReleaseDomain   = "@releaseDomain"
)

// A Reserved name can be created, written or removed only by its domain: not even a
// privileged one may.
type Reserved struct {
	// Match reports whether an absolute path falls under the rule.
	Match func(path string) bool
	// Only is the domain that may.
	Only Domain
}

// Tree is the whole store. The zero value is not usable; see New.
type Tree struct {
	root     *node
	owned    map[Domain]int // nodes by owner
	gen      uint64         // the last generation given
	reserved []Reserved
	domains  map[Domain]Attributes
	special  map[string][]Perm
}

// Attributes are what the privileged domain said of another one ("Domain management").
type Attributes struct {
	Introduced bool
	Target     Domain // this domain has also the rights of Target, unless 0 (SET_TARGET)
}

// New makes an empty tree whose root everybody may read and only [Privileged] may write.
// Special events are told to [Privileged] and, as a service must know of guests, to services.
func New(reserved ...Reserved) *Tree {
	return &Tree{
		root:     &node{perms: []Perm{{Privileged, Read}}},
		owned:    map[Domain]int{},
		reserved: reserved,
		domains:  map[Domain]Attributes{},
		special:  map[string][]Perm{},
	}
}

// Check says whether path is a well-formed absolute path: XenStore's characters
// (alphanumeric and -/_@), no empty component, no trailing slash.
func Check(path string) error {
	if path == "/" {
		return nil
	}
	if len(path) > wire.MaxAbsPath || !strings.HasPrefix(path, "/") || strings.HasSuffix(path, "/") {
		return EINVAL
	}
	last := byte(0)
	for i := range len(path) {
		c := path[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '@':
		case c == '/' && last != '/':
		default:
			return EINVAL
		}
		last = c
	}
	return nil
}

// allows reports whether d has the rights want by the permissions perms.
func (t *Tree) allows(perms []Perm, d Domain, want Access) bool {
	if d == Privileged || granted(perms, d)&want == want {
		return true
	}
	target := t.domains[d].Target
	return target != Privileged && granted(perms, target)&want == want
}

func granted(perms []Perm, d Domain) Access {
	if perms[0].Domain == d {
		return Both
	}
	for _, p := range perms[1:] {
		if p.Domain == d {
			return p.Access
		}
	}
	return perms[0].Access
}

func (t *Tree) owns(perms []Perm, d Domain) bool {
	return perms[0].Domain == d || (t.domains[d].Target != Privileged && perms[0].Domain == t.domains[d].Target)
}

func (t *Tree) denied(d Domain, path string) bool {
	for _, r := range t.reserved {
		if r.Only != d && r.Match(path) {
			return true
		}
	}
	return false
}

// ownsByRule: a reserved name is its domain's by rule; the parent's permissions do not matter.
func (t *Tree) ownsByRule(d Domain, path string) bool {
	for _, r := range t.reserved {
		if r.Only == d && r.Match(path) {
			return true
		}
	}
	return false
}

// Owned is how many nodes d owns.
func (t *Tree) Owned(d Domain) int { return t.owned[d] }

// Domain is what is known of d.
func (t *Tree) Domain(d Domain) Attributes { return t.domains[d] }

// SetDomain changes it, once persist has kept the change.
func (t *Tree) SetDomain(d Domain, a Attributes, persist Persist) error {
	if err := persist.keep([]Change{a.change(d)}); err != nil {
		return err
	}
	t.setDomain(d, a)
	return nil
}

func (t *Tree) setDomain(d Domain, a Attributes) {
	if a == (Attributes{}) {
		delete(t.domains, d)
	} else {
		t.domains[d] = a
	}
}

// SpecialPerms are the permissions of a special event: who may read is told.
func (t *Tree) SpecialPerms(name string) ([]Perm, error) {
	if name != IntroduceDomain && name != ReleaseDomain {
		return nil, ENOENT
	}
	if p := t.special[name]; p != nil {
		return slices.Clone(p), nil
	}
	return []Perm{{Privileged, None}}, nil
}

// SetSpecialPerms replaces them; only [Privileged] may.
func (t *Tree) SetSpecialPerms(d Domain, name string, perms []Perm, persist Persist) error {
	if _, err := t.SpecialPerms(name); err != nil {
		return err
	}
	if d != Privileged {
		return EACCES
	}
	if len(perms) == 0 {
		return EINVAL
	}
	if err := persist.keep([]Change{{Path: name, Perms: perms}}); err != nil {
		return err
	}
	t.special[name] = slices.Clone(perms)
	return nil
}

// MayHear reports whether d is told of a special event.
func (t *Tree) MayHear(d Domain, name string) bool {
	perms, err := t.SpecialPerms(name)
	return err == nil && (d < FirstGuest || t.allows(perms, d, Read))
}

// ParsePerm reads one permission as clients write it: n, r, w or b and a domain.
func ParsePerm(s string) (Perm, error) {
	if s == "" {
		return Perm{}, EINVAL
	}
	a := strings.IndexByte("nrwb", s[0])
	d, err := strconv.ParseUint(s[1:], 10, 32)
	if a < 0 || err != nil || strconv.FormatUint(d, 10) != s[1:] {
		return Perm{}, EINVAL
	}
	return Perm{Domain(d), Access(a)}, nil
}

// String is the form ParsePerm reads.
func (p Perm) String() string { return string("nrwb"[p.Access&Both]) + fmt.Sprint(uint32(p.Domain)) }

// Verify counts everything anew and reports the first thing that does not fit; it is for tests
// and for CONTROL's "check".
func (t *Tree) Verify() error {
	owned := map[Domain]int{}
	var walk func(path string, n *node) error
	walk = func(path string, n *node) error {
		if len(n.perms) == 0 {
			return fmt.Errorf("%s has no owner", path)
		}
		if path != "" {
			owned[n.perms[0].Domain]++
		}
		if !slices.IsSortedFunc(n.kids, func(a, b *node) int { return cmp.Compare(a.name, b.name) }) {
			return fmt.Errorf("%s: children out of order", path)
		}
		for _, k := range n.kids {
			if max(k.valueGen, k.permsGen, k.kidsGen) > t.gen {
				return fmt.Errorf("%s/%s is of a generation to come", path, k.name)
			}
			if err := walk(path+"/"+k.name, k); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk("", t.root); err != nil {
		return err
	}
	if !maps.Equal(owned, t.owned) {
		return fmt.Errorf("nodes by owner are %v, counted as %v", owned, t.owned)
	}
	return nil
}
