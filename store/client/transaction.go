package client

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// MaxAttempts is how often Transaction tries before it gives up with EAGAIN.
const MaxAttempts = 100

// Tx is a transaction. Its view of the store is of the moment it began; nobody else sees its
// changes before it is committed.
type Tx struct{ n nodes }

// Read is as Client's.
func (t *Tx) Read(path string) (string, error) { return t.n.read(path) }

// Write is as Client's.
func (t *Tx) Write(path, value string) error { return t.n.write(path, value) }

// Mkdir is as Client's.
func (t *Tx) Mkdir(path string) error { return t.n.mkdir(path) }

// Remove is as Client's.
func (t *Tx) Remove(path string) error { return t.n.remove(path) }

// List is as Client's.
func (t *Tx) List(path string) ([]string, error) { return t.n.list(path) }

// Perms is as Client's.
func (t *Tx) Perms(path string) ([]tree.Perm, error) { return t.n.perms(path) }

// SetPerms is as Client's.
func (t *Tx) SetPerms(path string, perms ...tree.Perm) error { return t.n.setPerms(path, perms) }

// Transaction calls f in a transaction and commits what it did, all or nothing. Where something
// that f used was changed by others meanwhile, f is called again with a new transaction, up to
// [MaxAttempts] times in all; so it must not do what cannot be repeated. An error of f discards
// the transaction and is returned.
func (c *Client) Transaction(f func(t *Tx) error) error {
	for attempt := 1; ; attempt++ {
		err := c.attempt(f)
		if err == nil || attempt == MaxAttempts || !errors.Is(err, errConflict) {
			return err
		}
	}
}

// errConflict tells a commit's EAGAIN from any other.
var errConflict = fmt.Errorf("store: commit: %w", tree.EAGAIN)

func (c *Client) attempt(f func(t *Tx) error) error {
	b, err := c.do(wire.TransactionStart, 0, wire.Join(""))
	if err != nil {
		return fmt.Errorf("store: begin a transaction: %w", err)
	}
	id, err := strconv.ParseUint(strings.TrimSuffix(string(b), "\x00"), 10, 32)
	if err != nil || id == 0 {
		return fmt.Errorf("%w: transaction %q", wire.ErrMessage, b)
	}
	end := func(how string) error {
		_, err := c.do(wire.TransactionEnd, uint32(id), wire.Join(how))
		return err
	}
	committed := false
	defer func() {
		if !committed { // f failed or panicked
			_ = end("F")
		}
	}()
	if err := f(&Tx{nodes{c, uint32(id)}}); err != nil {
		return err
	}
	committed = true
	switch err := end("T"); {
	case errors.Is(err, tree.EAGAIN):
		return errConflict
	case err != nil:
		return fmt.Errorf("store: commit: %w", err)
	}
	return nil
}
