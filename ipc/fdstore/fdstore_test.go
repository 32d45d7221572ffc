package fdstore

import (
	"io"
	"os"
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc"
)

// having is one who has the store.
type having struct {
	*Store
	left       *Left
	generation uint64
	served     chan error
}

func have(t *testing.T, h *Held, generation uint64) *having {
	t.Helper()
	ours, theirs, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s := &having{served: make(chan error, 1)}
	go func() { s.served <- h.Serve(theirs, generation) }()
	if s.Store, s.left, s.generation, err = Open(ours); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// die ends one who has the store, as its death does.
func (s *having) die(t *testing.T) {
	t.Helper()
	s.c.Close()
	if err := <-s.served; err != nil {
		t.Error(err)
	}
	<-s.Gone()
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// TestStore: what one kept is the next one's: the last text, the files, nothing that was dropped.
func TestStore(t *testing.T) {
	h := NewHeld()
	defer h.Close()
	first := have(t, h, 1)
	if first.generation != 1 || len(first.left.Names("")) != 0 {
		t.Errorf("generation %d, left %v", first.generation, first.left.Names(""))
	}
	r, w := pipe(t)
	for _, err := range []error{
		first.Put("guest/a", "old", w), first.Note("guest/a", "new"), first.Put("guest/b", "whole", r), first.Put("guest/b", "other", w),
		first.Put("gone", 1, w), first.Put("process/1", 7),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	first.Drop("gone")
	first.Drop("never there")
	first.die(t)
	if h.Len() != 3 {
		t.Errorf("%d entries", h.Len())
	}

	next := have(t, h, 2)
	if got := strings.Join(next.left.Names("guest/"), " "); got != "guest/a guest/b" || next.generation != 2 {
		t.Errorf("left %s, generation %d", got, next.generation)
	}
	a, ok := next.left.Take("guest/a")
	var text string
	if err := a.Decode(&text, 1); !ok || err != nil || text != "new" {
		t.Errorf("%q, %v, %v", text, ok, err)
	}
	if err := a.Decode(&text, 2); err == nil {
		t.Error("a file too many is not missed")
	}
	if _, again := next.left.Take("guest/a"); again {
		t.Error("it is there twice")
	}
	w.Close()
	if _, err := a.Files[0].WriteString("through"); err != nil {
		t.Error(err)
	}
	a.Close()
	next.Drop("guest/a")
	next.Discard(next.left)                                                // b and the process
	if got, err := io.ReadAll(r); err != nil || string(got) != "through" { // nobody has the other end any more
		t.Errorf("%q, %v", got, err)
	}
	for range 100 {
		next.Sync()
	}
	next.die(t)
	next.Sync() // with nobody
	if h.Len() != 0 {
		t.Errorf("%d entries are left", h.Len())
	}
}

// TestNoStore: who has no keeper keeps nothing, and needs no other code for that.
func TestNoStore(t *testing.T) {
	var s *Store
	if err := s.Put("a", 1); err != nil {
		t.Error(err)
	}
	s.Drop("a")
	s.Close()
	var l *Left
	if _, ok := l.Take("a"); ok || l.Names("") != nil {
		t.Error("there is something")
	}
	l.Close()
	if s.Gone() != nil {
		t.Error("a keeper that is not there has ended")
	}
}

// TestKeeperGone: who has the store learns that its keeper has ended, and that it keeps nothing more.
func TestKeeperGone(t *testing.T) {
	ours, theirs, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = theirs.Send([]byte(`{"op":"whole","generation":1}`))
		theirs.Close()
	}()
	s, _, _, err := Open(ours)
	if err != nil {
		t.Fatal(err)
	}
	<-s.Gone()
	if err := s.Put("a", 1); err == nil {
		t.Error("something is kept by nobody")
	}
	s.Close()
}

// TestNonsense: neither end takes what the other does not say.
func TestNonsense(t *testing.T) {
	for _, text := range []string{"{", `{"op":"note","name":"unknown"}`, `{"op":"entry"}`, `{}`} {
		ours, theirs, err := ipc.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		h := NewHeld()
		served := make(chan error, 1)
		go func() { served <- h.Serve(theirs, 1) }()
		if _, _, err := ours.Receive(); err != nil {
			t.Fatal(err)
		}
		if err := ours.Send([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if err := <-served; err == nil {
			t.Errorf("%s is taken", text)
		}
		ours.Close()

		if ours, theirs, err = ipc.Pipe(); err != nil {
			t.Fatal(err)
		}
		if err := theirs.Send([]byte(strings.ReplaceAll(text, "entry", "put"))); err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := Open(ours); err == nil {
			t.Errorf("%s is taken for an entry", text)
		}
		ours.Close()
		theirs.Close()
	}
}
