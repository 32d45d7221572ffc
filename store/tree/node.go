package tree

import (
	"cmp"
	"slices"
	"strings"
)

// node is never changed once committed. Until then the holder of its edit token may.
type node struct {
	name  string
	value []byte
	perms []Perm
	kids  []*node // by name
	edit  *edit

	// When each part last changed, or the node came to be; of kids: when one came or went.
	valueGen, permsGen, kidsGen uint64
}

// edit is the right to change nodes in place that were made under it. It has a size, so that
// two of them are never one.
type edit struct{ _ byte }

func (n *node) index(name string) (int, bool) {
	return slices.BinarySearchFunc(n.kids, name, func(k *node, name string) int { return cmp.Compare(k.name, name) })
}

func (n *node) child(name string) *node {
	if i, ok := n.index(name); ok {
		return n.kids[i]
	}
	return nil
}

// clone makes a copy that e may change; values and permissions are replaced, never changed, so
// they are shared.
func (n *node) clone(e *edit) *node {
	c := *n
	c.kids = slices.Clone(n.kids)
	c.edit = e
	return &c
}

// next cuts the first component off a path without its leading slash.
func next(rest string) (name, after string) {
	name, after, _ = strings.Cut(rest, "/")
	return name, after
}

// find returns the node at an absolute path, nil where there is none.
func (n *node) find(path string) *node {
	for rest := path[1:]; rest != "" && n != nil; {
		var name string
		name, rest = next(rest)
		n = n.child(name)
	}
	return n
}

// nearest returns the deepest node on the way to path, its path, and the path of the first
// component that is missing ("" when the node itself is there).
func (n *node) nearest(path string) (at *node, have, missing string) {
	end := 0
	for rest := path[1:]; rest != ""; {
		var name string
		name, rest = next(rest)
		k := n.child(name)
		if k == nil {
			missing = path[:end+1+len(name)]
			break
		}
		n, end = k, end+1+len(name)
	}
	if end == 0 {
		return n, "/", missing
	}
	return n, path[:end], missing
}

func parentOf(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

func join(path, name string) string {
	if path == "/" {
		return "/" + name
	}
	return path + "/" + name
}
