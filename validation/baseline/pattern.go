package baseline

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A set is one of rules, by their numbers.
type set uint64

func only(i int) set { return 1 << i }

// upTo is all rules before one.
func upTo(i int) set { return 1<<i - 1 }

func (s set) first() int { return bits.TrailingZeros64(uint64(s)) }

// A node is where a way through the patterns of all rules stands after some components of a path. Equal beginnings share
// their nodes, so that a name costs about as many steps as it has components, however many patterns there are.
type node struct {
	include, exclude set // whose patterns end here: they match this name and all beneath
	below            set // whose patterns of includes go on from here

	literal map[string]*node
	globs   []glob
	any     *node // behind "**": entered with this node, and stays whatever comes
	stays   bool  // it is such a one
}

type glob struct {
	pattern string
	next    *node
}

// checkPattern says what is wrong with a pattern, and how to mend it.
func checkPattern(p string) error {
	switch {
	case len(p) > maxPattern:
		return fmt.Errorf("%.40q…: %d bytes: the most is %d", p, len(p), maxPattern)
	case !strings.HasPrefix(p, "/"):
		return fmt.Errorf("%q: begin it with / for the volume's root, or with /**/ for anywhere", p)
	case !utf8.ValidString(p) || strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("%q: it has letters that cannot be printed: write ? for each byte", p)
	}
	parts := components(p)
	if len(parts) > maxComponents {
		return fmt.Errorf("%.40q…: %d components: the most is %d", p, len(parts), maxComponents)
	}
	for i, c := range parts {
		var err error
		switch {
		case c == "" || c == "." || c == "..":
			err = errors.New("write it without //, /./, /../ and a slash at its end")
		case c == "**" && i+1 < len(parts) && parts[i+1] == "**":
			err = errors.New("** twice: once says the same")
		case c != "**" && strings.Contains(strings.ReplaceAll(c, `\*`, ""), "**"):
			err = errors.New("** stands alone between slashes: use * within a name")
		case strings.HasSuffix(strings.ReplaceAll(c, `\\`, ""), `\`):
			err = errors.New(`\ needs the letter that it is before: write \\ for itself`)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
	}
	return nil
}

// components are the parts of a path between its slashes; the root has none.
func components(path string) []string {
	if path == "/" {
		return nil
	}
	return strings.Split(path[1:], "/")
}

// add puts a pattern that is right into the trie.
func (n *node) add(pattern string, rule int, exclude bool) {
	parts := components(pattern)
	if l := len(parts); l > 0 && parts[l-1] == "**" {
		parts[l-1] = "*" // all in it, and so all beneath
	}
	for _, c := range parts {
		if !exclude {
			n.below |= only(rule)
		}
		n = n.child(c)
	}
	if exclude {
		n.exclude |= only(rule)
	} else {
		n.include |= only(rule)
	}
}

func (n *node) child(c string) *node {
	switch {
	case c == "**":
		if n.any == nil {
			n.any = &node{stays: true}
		}
		return n.any
	case !strings.ContainsAny(c, `*?\`):
		if n.literal[c] == nil {
			if n.literal == nil {
				n.literal = map[string]*node{}
			}
			n.literal[c] = &node{}
		}
		return n.literal[c]
	}
	i := slices.IndexFunc(n.globs, func(g glob) bool { return g.pattern == c })
	if i < 0 {
		i = len(n.globs)
		n.globs = append(n.globs, glob{c, &node{}})
	}
	return n.globs[i].next
}

// A match is what the patterns say of a name.
type match struct {
	include, exclude set // that match it, or a directory that it is in
	below            set // that may match in it
}

// match follows a path. It allocates nothing for rules of the usual kind, and takes at most as many steps as there are
// nodes for each component.
func (n *node) match(path string) match {
	var m match
	var here, there [16]*node
	now, next := here[:0], there[:0]
	now = m.enter(now, n)
	for rest := path; len(rest) > 1 && len(now) > 0; {
		rest = rest[1:] // the slash
		c := rest
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			c, rest = rest[:i], rest[i:]
		} else {
			rest = ""
		}
		m.below = 0
		next = next[:0]
		for _, at := range now {
			if at.stays {
				next = m.enter(next, at)
			}
			if to := at.literal[c]; to != nil {
				next = m.enter(next, to)
			}
			for _, g := range at.globs {
				if globs(g.pattern, c) {
					next = m.enter(next, g.next)
				}
			}
		}
		now, next = next, now
	}
	if len(now) == 0 {
		m.below = 0
	}
	return m
}

// enter adds a node to those where the way stands.
func (m *match) enter(nodes []*node, n *node) []*node {
	if slices.Contains(nodes, n) {
		return nodes
	}
	m.include |= n.include
	m.exclude |= n.exclude
	m.below |= n.below
	nodes = append(nodes, n)
	if n.any != nil {
		nodes = m.enter(nodes, n.any)
	}
	return nodes
}

// globs reports whether a component is as a pattern says: * is any bytes, ? is one, \ takes its next as it is. It takes at
// most as many steps as the product of the lengths.
func globs(p, s string) bool {
	star, retry := -1, 0 // where the last * is, and where in s what is behind it was tried
	i, j := 0, 0
	for j < len(s) {
		if i < len(p) && p[i] == '*' {
			star, retry = i, j
			i++
			continue
		}
		if width := one(p[i:], s[j]); width > 0 {
			i, j = i+width, j+1
			continue
		}
		if star < 0 {
			return false
		}
		retry++
		i, j = star+1, retry
	}
	return strings.Trim(p[i:], "*") == ""
}

// one is how much of a pattern matches one byte, 0 if it does not.
func one(p string, c byte) int {
	switch {
	case p == "":
		return 0
	case p[0] == '\\' && len(p) > 1:
		if p[1] == c {
			return 2
		}
		return 0
	case p[0] == '?' || p[0] == c:
		return 1
	}
	return 0
}
