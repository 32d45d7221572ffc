// Package fdstoretest has things kept for tests as the Supervisor does.
package fdstoretest

import (
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
)

// A Keeper keeps for one after the other.
type Keeper struct {
	t          testing.TB
	held       *fdstore.Held
	generation uint64
	last       *fdstore.Store
	served     chan error
}

// New keeps nothing yet. It ends with the test.
func New(t testing.TB) *Keeper {
	k := &Keeper{t: t, held: fdstore.NewHeld()}
	t.Cleanup(func() {
		k.end()
		k.held.Close()
	})
	return k
}

func (k *Keeper) end() {
	if k.last == nil {
		return
	}
	k.last.Close()
	if err := <-k.served; err != nil {
		k.t.Error(err)
	}
}

// Next ends who has the store, and is the next one.
func (k *Keeper) Next() (*fdstore.Store, *fdstore.Left) {
	k.t.Helper()
	k.end()
	ours, theirs, err := ipc.Pipe()
	if err != nil {
		k.t.Fatal(err)
	}
	k.generation++
	k.served = make(chan error, 1)
	go func() { k.served <- k.held.Serve(theirs, k.generation) }()
	s, left, _, err := fdstore.Open(ours)
	if err != nil {
		k.t.Fatal(err)
	}
	k.last = s
	k.t.Cleanup(left.Close)
	return s, left
}

// Len is how many entries are kept, once the last one is gone.
func (k *Keeper) Len() int {
	k.end()
	k.last = nil
	return k.held.Len()
}
