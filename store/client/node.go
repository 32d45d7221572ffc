package client

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// nodes are the operations on nodes, in a transaction or outside any (0).
type nodes struct {
	c  *Client
	tx uint32
}

func (n nodes) do(op, path string, t wire.Type, payload []byte) ([]byte, error) {
	b, err := n.c.do(t, n.tx, payload)
	return b, describe(op, path, err)
}

func (n nodes) read(path string) (string, error) {
	b, err := n.do("read", path, wire.Read, wire.Join(path))
	return string(b), err
}

func (n nodes) write(path, value string) error {
	_, err := n.do("write", path, wire.Write, append(wire.Join(path), value...))
	return err
}

func (n nodes) mkdir(path string) error {
	_, err := n.do("mkdir", path, wire.Mkdir, wire.Join(path))
	return err
}

func (n nodes) remove(path string) error {
	_, err := n.do("remove", path, wire.Remove, wire.Join(path))
	return err
}

// list asks for the whole list and, where it is too long for one reply, for its parts, from the
// start again when the list changed between them (DIRECTORY_PART).
func (n nodes) list(path string) ([]string, error) {
	b, err := n.c.do(wire.Directory, n.tx, wire.Join(path))
	if errors.Is(err, tree.E2BIG) {
		b, err = n.parts(path)
	}
	if err != nil {
		return nil, describe("list", path, err)
	}
	if len(b) == 0 {
		return nil, nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

func (n nodes) parts(path string) ([]byte, error) {
	var all []byte
	was := ""
	for {
		b, err := n.c.do(wire.DirectoryPart, n.tx, wire.Join(path, strconv.Itoa(len(all))))
		if err != nil {
			return nil, err
		}
		gen, names, ok := strings.Cut(string(b), "\x00")
		if !ok || names == "" {
			return nil, fmt.Errorf("%w: part of a list of %d bytes", wire.ErrMessage, len(b))
		}
		if was != gen && was != "" {
			all, was = nil, ""
			continue
		}
		was = gen
		if names == "\x00" || strings.HasSuffix(names, "\x00\x00") { // the last part
			return append(all, names[:len(names)-1]...), nil
		}
		all = append(all, names...)
	}
}

func (n nodes) perms(path string) ([]tree.Perm, error) {
	b, err := n.do("get permissions of", path, wire.GetPerms, wire.Join(path))
	if err != nil {
		return nil, err
	}
	words, err := wire.SplitAll(b, 1)
	if err != nil {
		return nil, err
	}
	perms := make([]tree.Perm, len(words))
	for i, w := range words {
		if perms[i], err = tree.ParsePerm(w); err != nil {
			return nil, fmt.Errorf("%w: permission %q", wire.ErrMessage, w)
		}
	}
	return perms, nil
}

func (n nodes) setPerms(path string, perms []tree.Perm) error {
	args := []string{path}
	for _, p := range perms {
		args = append(args, p.String())
	}
	_, err := n.do("set permissions of", path, wire.SetPerms, wire.Join(args...))
	return err
}

// Read returns the value of a node.
func (c *Client) Read(path string) (string, error) { return nodes{c, 0}.read(path) }

// Write sets the value of a node, creating it and its parents.
func (c *Client) Write(path, value string) error { return nodes{c, 0}.write(path, value) }

// Mkdir creates a node and its parents.
func (c *Client) Mkdir(path string) error { return nodes{c, 0}.mkdir(path) }

// Remove deletes a node and all below it.
func (c *Client) Remove(path string) error { return nodes{c, 0}.remove(path) }

// List returns the names of a node's children.
func (c *Client) List(path string) ([]string, error) { return nodes{c, 0}.list(path) }

// Perms returns a node's permissions; the first names its owner.
func (c *Client) Perms(path string) ([]tree.Perm, error) { return nodes{c, 0}.perms(path) }

// SetPerms replaces a node's permissions; the first names its owner.
func (c *Client) SetPerms(path string, perms ...tree.Perm) error {
	return nodes{c, 0}.setPerms(path, perms)
}
