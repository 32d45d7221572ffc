// Package tree is the contents of the store: a tree of named values with owners and
// permissions, as XenStore's. It is pure: no I/O, no clock, no locks; package server gives it
// one owner.
package tree

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"redoubt.dev/redoubt/store/wire"
)

// A Domain identifies who asks. Connections carry it; nothing a client sends changes it.
type Domain uint32

// Errno is an error as clients see it, by name.
type Errno string

const (
	ENOENT Errno = "ENOENT"
	EACCES Errno = "EACCES"
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

// Limits of one unprivileged domain, those of the C daemon.
const (
	MaxNodes    = 1000
	MaxNodeSize = 2048
)

type node struct {
	name     string
	value    []byte
	perms    []Perm
	children map[string]*node
}

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
	owned    map[Domain]int
	reserved []Reserved
}

// Privileged is the domain that every permission check passes: the Builder.
const Privileged Domain = 0

// New makes an empty tree whose root everybody may read and only [Privileged] may write.
func New(reserved ...Reserved) *Tree {
	return &Tree{
		root:     &node{name: "", perms: []Perm{{Privileged, Read}}, children: map[string]*node{}},
		owned:    map[Domain]int{},
		reserved: reserved,
	}
}

// Check says whether path is a well-formed absolute path: XenStore's characters
// (alphanumeric and -/_@), no empty component, no trailing slash.
func Check(path string) error {
	if path == "/" {
		return nil
	}
	if len(path) > wire.MaxAbsPath || !strings.HasPrefix(path, "/") || strings.HasSuffix(path, "/") || strings.Contains(path, "//") {
		return EINVAL
	}
	for _, c := range []byte(path) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-/_@", c) >= 0:
		default:
			return EINVAL
		}
	}
	return nil
}

func split(path string) []string {
	if path == "/" {
		return nil
	}
	return strings.Split(path[1:], "/")
}

func parentOf(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

func (t *Tree) find(path string) *node {
	n := t.root
	for _, c := range split(path) {
		if n = n.children[c]; n == nil {
			return nil
		}
	}
	return n
}

func (n *node) allows(d Domain, want Access) bool {
	if d == Privileged || n.perms[0].Domain == d {
		return true
	}
	have := n.perms[0].Access
	for _, p := range n.perms[1:] {
		if p.Domain == d {
			have = p.Access
			break
		}
	}
	return have&want == want
}

func (t *Tree) denied(d Domain, path string) bool {
	for _, r := range t.reserved {
		if r.Match(path) && r.Only != d {
			return true
		}
	}
	return false
}

// existing finds a node that d may use as want says. Where the node is missing, ENOENT is
// told only to who may read its nearest ancestor, as XenStore does.
func (t *Tree) existing(d Domain, path string, want Access) (*node, error) {
	if err := Check(path); err != nil {
		return nil, err
	}
	n := t.find(path)
	if n == nil {
		p := path
		for n == nil {
			p = parentOf(p)
			n = t.find(p)
		}
		if !n.allows(d, Read) {
			return nil, EACCES
		}
		return nil, ENOENT
	}
	if !n.allows(d, want) {
		return nil, EACCES
	}
	return n, nil
}

// Read returns a node's value.
func (t *Tree) Read(d Domain, path string) ([]byte, error) {
	n, err := t.existing(d, path, Read)
	if err != nil {
		return nil, err
	}
	return slices.Clone(n.value), nil
}

// Readable reports whether d may learn of path: the node, or where it is missing its
// nearest ancestor.
func (t *Tree) Readable(d Domain, path string) bool {
	_, err := t.existing(d, path, Read)
	return err == nil || errors.Is(err, ENOENT)
}

// List returns the names of a node's children, sorted.
func (t *Tree) List(d Domain, path string) ([]string, error) {
	n, err := t.existing(d, path, Read)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(n.children))
	for c := range n.children {
		names = append(names, c)
	}
	slices.Sort(names)
	return names, nil
}

// Write sets a value, creating the node and missing parents.
func (t *Tree) Write(d Domain, path string, value []byte) error {
	if len(value) > MaxNodeSize && d != Privileged {
		return E2BIG
	}
	n, err := t.reach(d, path)
	if err != nil {
		return err
	}
	n.value = slices.Clone(value)
	return nil
}

// Mkdir creates a node with an empty value, and missing parents; an existing one stays.
func (t *Tree) Mkdir(d Domain, path string) error {
	_, err := t.reach(d, path)
	return err
}

// reach finds or creates the node at path for writing. Nothing is changed when it fails.
func (t *Tree) reach(d Domain, path string) (*node, error) {
	if err := Check(path); err != nil {
		return nil, err
	}
	if t.denied(d, path) {
		return nil, EACCES
	}
	parts := split(path)
	n, i := t.root, 0
	for ; i < len(parts); i++ {
		c := n.children[parts[i]]
		if c == nil {
			break
		}
		n = c
	}
	// A reserved name is its domain's by rule: the parent's permissions do not matter then.
	if !n.allows(d, Write) && !t.ownsByRule(d, path) {
		return nil, EACCES
	}
	if d != Privileged && t.owned[d]+len(parts)-i > MaxNodes {
		return nil, ENOSPC
	}
	for ; i < len(parts); i++ {
		perms := slices.Clone(n.perms)
		if d != Privileged {
			perms[0].Domain = d // XenStore: a new node is its creator's, unless privileged
		}
		c := &node{name: parts[i], perms: perms, children: map[string]*node{}}
		n.children[parts[i]] = c
		t.owned[perms[0].Domain]++
		n = c
	}
	return n, nil
}

func (t *Tree) ownsByRule(d Domain, path string) bool {
	for _, r := range t.reserved {
		if r.Match(path) && r.Only == d {
			return true
		}
	}
	return false
}

// Remove deletes a node and all below it. A node that is missing is no error unless its
// parent is missing too.
func (t *Tree) Remove(d Domain, path string) error {
	if err := Check(path); err != nil {
		return err
	}
	if path == "/" {
		return EINVAL
	}
	parent := t.find(parentOf(path))
	if parent == nil {
		return ENOENT
	}
	name := path[strings.LastIndexByte(path, '/')+1:]
	n := parent.children[name]
	if n == nil {
		if !parent.allows(d, Write) && !t.ownsByRule(d, path) {
			return EACCES
		}
		return nil
	}
	if !n.allows(d, Write) || t.denied(d, path) {
		return EACCES
	}
	t.disown(n)
	delete(parent.children, name)
	return nil
}

func (t *Tree) disown(n *node) {
	owner := n.perms[0].Domain
	if t.owned[owner]--; t.owned[owner] <= 0 {
		delete(t.owned, owner)
	}
	for _, c := range n.children {
		t.disown(c)
	}
}

// Perms returns a node's permissions.
func (t *Tree) Perms(d Domain, path string) ([]Perm, error) {
	n, err := t.existing(d, path, Read)
	if err != nil {
		return nil, err
	}
	return slices.Clone(n.perms), nil
}

// SetPerms replaces a node's permissions. Only its owner may, and only the privileged domain
// may give it to another owner.
func (t *Tree) SetPerms(d Domain, path string, perms []Perm) error {
	n, err := t.existing(d, path, None)
	if err != nil {
		return err
	}
	if len(perms) == 0 || len(perms) > 5 {
		return EINVAL
	}
	if t.denied(d, path) || d != Privileged && (n.perms[0].Domain != d || perms[0].Domain != d) {
		return EACCES
	}
	t.owned[n.perms[0].Domain]--
	t.owned[perms[0].Domain]++
	n.perms = slices.Clone(perms)
	return nil
}

// ParsePerm reads one permission as clients write it: n, r, w or b and a domain.
func ParsePerm(s string) (Perm, error) {
	if s == "" {
		return Perm{}, EINVAL
	}
	var a Access
	switch s[0] {
	case 'n':
		a = None
	case 'r':
		a = Read
	case 'w':
		a = Write
	case 'b':
		a = Both
	default:
		return Perm{}, EINVAL
	}
	var d uint32
	if n, err := fmt.Sscanf(s[1:], "%d", &d); n != 1 || err != nil || fmt.Sprint(d) != s[1:] {
		return Perm{}, EINVAL
	}
	return Perm{Domain(d), a}, nil
}

// String is the form ParsePerm reads.
func (p Perm) String() string { return string("nrwb"[p.Access&Both]) + fmt.Sprint(uint32(p.Domain)) }
