package state

import (
	"errors"
	"fmt"

	"redoubt.dev/redoubt/store/tree"
)

// A Node is a node to be set: written with Value, or made where Value is empty, and given Perms
// unless they are nil.
type Node struct {
	Path  string      `json:"path"`
	Value string      `json:"value,omitempty"`
	Perms []tree.Perm `json:"perms,omitempty"`
}

// errEnded says that the store is ending.
var errEnded = errors.New("the store is ending")

// What follows is for whoever runs the store, who is not a client: it is trusted as
// [tree.Privileged], no worker parses what it asks, and one call is one commit, all or nothing.
// Reserved names are refused to it, too. Each call may be repeated when its answer was lost.

// Introduce sets a new domain's nodes and makes it known: watches on the nodes fire, and
// @introduceDomain, as after a transaction and INTRODUCE.
func (s *State) Introduce(d tree.Domain, nodes []Node) error {
	return s.control(func() error { return s.core.introduce(d, nodes) })
}

// Set sets nodes.
func (s *State) Set(nodes []Node) error {
	return s.control(func() error { return s.core.set(nodes) })
}

// Release removes a domain's nodes, those of paths that are there and all beneath them, forgets
// the domain, and ends its connections: watches on what was removed fire, and @releaseDomain.
func (s *State) Release(d tree.Domain, paths []string) error {
	return s.control(func() error { return s.core.release(d, paths) })
}

func (s *State) control(f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return errEnded
	}
	return f()
}

func (c *core) apply(x *tree.Tx, nodes []Node) error {
	for _, n := range nodes {
		var err error
		if n.Value == "" {
			err = x.Mkdir(n.Path)
		} else {
			err = x.Write(n.Path, []byte(n.Value))
		}
		if err == nil && n.Perms != nil {
			err = x.SetPerms(n.Path, n.Perms)
		}
		if err != nil {
			return fmt.Errorf("set %q: %w", n.Path, err)
		}
	}
	return nil
}

func (c *core) set(nodes []Node) error {
	x := c.tree.Direct(tree.Privileged)
	if err := c.apply(x, nodes); err != nil {
		return err
	}
	e, err := c.commit(x)
	if err != nil {
		return err
	}
	c.fire(e)
	return nil
}

func (c *core) introduce(d tree.Domain, nodes []Node) error {
	if d < tree.FirstGuest {
		return fmt.Errorf("introduce domain %d: %w", d, tree.EINVAL)
	}
	x := c.tree.Direct(tree.Privileged)
	if err := c.apply(x, nodes); err != nil {
		return err
	}
	attr := c.tree.Domain(d)
	attr.Introduced = true
	e, err := x.CommitDomain(d, attr, c.persist)
	if err != nil {
		return err
	}
	c.committed()
	c.fire(e)
	c.fireSpecial(tree.IntroduceDomain)
	return nil
}

func (c *core) release(d tree.Domain, paths []string) error {
	if d < tree.FirstGuest {
		return fmt.Errorf("release domain %d: %w", d, tree.EINVAL)
	}
	x := c.tree.Direct(tree.Privileged)
	for _, p := range paths {
		if err := x.Remove(p); err != nil && !errors.Is(err, tree.ENOENT) {
			return fmt.Errorf("remove %q: %w", p, err)
		}
	}
	known := c.tree.Domain(d).Introduced
	e, err := x.CommitDomain(d, tree.Attributes{}, c.persist)
	if err != nil {
		return err
	}
	c.committed()
	c.fire(e)
	if known && c.domains[d] == nil { // else the last connection's end tells it
		c.fireSpecial(tree.ReleaseDomain)
	}
	for s := range c.sessions {
		if s.domain == d {
			c.hangUp(s)
		}
	}
	return nil
}
