// Package fdstore keeps one process's descriptors, and what it has to say of them, in another one that
// outlives it, as systemd's file descriptor store does (sd_notify(3), FDSTORE): a process that is
// killed at any moment is followed by one that gets all of it back.
//
// What is kept is entries: a name, a text in JSON, and descriptors. The keeper ([Held]) knows nothing
// of their meaning. A change is one message, so it is made whole or not at all, and once [Store.Put]
// has returned it survives its sender. Both ends trust each other: the keeper gives the
// descriptors to whoever follows, and to nobody else.
package fdstore

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"redoubt.dev/redoubt/ipc"
)

// An Entry is what is kept under one name. Its files belong to who has the Entry.
type Entry struct {
	Name  string
	body  json.RawMessage
	Files []*os.File
}

// Decode reads the entry's text, for which so many files are right.
func (e Entry) Decode(v any, files int) error {
	if err := json.Unmarshal(e.body, v); err != nil {
		return fmt.Errorf("kept %s: %w", e.Name, err)
	}
	if len(e.Files) != files {
		return fmt.Errorf("kept %s: %d descriptors, not %d", e.Name, len(e.Files), files)
	}
	return nil
}

// Close closes the files.
func (e Entry) Close() { ipc.CloseAll(e.Files) }

// operation is what a message is about.
type operation string

const (
	put   operation = "put"   // name, body, files: in place of what was there
	note  operation = "note"  // name, body: the files stay
	drop  operation = "drop"  // name
	entry operation = "entry" // name, body, files: to who follows
	whole operation = "whole" // generation: that were all
	ask   operation = "ask"   // say done when all that was sent before is
	done  operation = "done"
)

type message struct {
	Op         operation       `json:"op"`
	Name       string          `json:"name,omitempty"`
	Body       json.RawMessage `json:"body,omitempty"`
	Generation uint64          `json:"generation,omitempty"`
}

// A Store is the end of who has things kept. A nil Store keeps nothing. Its methods may be called
// concurrently; what one caller does is done in its order.
type Store struct {
	c    *ipc.Conn
	gone chan struct{}

	asking sync.Mutex
	done   chan struct{} // one for each ask
}

// Open takes back what was kept. generation counts who has had the store, from 1 on.
func Open(c *ipc.Conn) (s *Store, left *Left, generation uint64, err error) {
	left = &Left{entries: map[string]Entry{}}
	for {
		m, files, err := receive(c)
		switch {
		case err != nil:
			left.Close()
			return nil, nil, 0, err
		case m.Op == whole && len(files) == 0:
			s = &Store{c: c, gone: make(chan struct{}), done: make(chan struct{}, 1)}
			go s.hear() // ends with the connection
			return s, left, m.Generation, nil
		case m.Op != entry:
			ipc.CloseAll(files)
			left.Close()
			return nil, nil, 0, fmt.Errorf("fdstore: unexpected %q", m.Op)
		}
		left.entries[m.Name] = Entry{m.Name, m.Body, files}
	}
}

// hear takes what the keeper says: done, as often as it is asked.
func (s *Store) hear() {
	defer close(s.gone)
	for {
		m, files, err := receive(s.c)
		ipc.CloseAll(files)
		if err != nil || m.Op != done {
			return
		}
		select {
		case s.done <- struct{}{}:
		default:
		}
	}
}

// Sync returns when all that was sent before is done: the keeper's copies of what was dropped are closed.
func (s *Store) Sync() {
	if s == nil {
		return
	}
	s.asking.Lock()
	defer s.asking.Unlock()
	if s.send(ask, "", nil, nil) != nil {
		return // without a keeper there are no copies
	}
	select {
	case <-s.done:
	case <-s.gone:
	}
}

// Put keeps an entry in place of the one of that name. The files stay the caller's, too.
func (s *Store) Put(name string, body any, files ...*os.File) error {
	return s.send(put, name, body, files)
}

// Note changes an entry's text.
func (s *Store) Note(name string, body any) error { return s.send(note, name, body, nil) }

// Drop forgets an entry, if there is one.
func (s *Store) Drop(name string) { _ = s.send(drop, name, nil, nil) } // without a keeper it is gone

func (s *Store) send(op operation, name string, body any, files []*os.File) error {
	if s == nil {
		return nil
	}
	text, err := json.Marshal(body)
	if err == nil {
		text, err = json.Marshal(message{Op: op, Name: name, Body: text})
	}
	if err == nil {
		err = s.c.Send(text, files...)
	}
	if err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	return nil
}

// Gone is closed when the keeper has ended, or the Store is closed; never for a nil Store.
func (s *Store) Gone() <-chan struct{} {
	if s == nil {
		return nil
	}
	return s.gone
}

// Close ends the connection. What is kept stays so.
func (s *Store) Close() {
	if s != nil {
		s.c.Close()
		<-s.gone
	}
}

// Left is what the last one had kept. A nil Left is empty.
type Left struct {
	mu      sync.Mutex
	entries map[string]Entry
}

// Take takes an entry out.
func (l *Left) Take(name string) (Entry, bool) {
	if l == nil {
		return Entry{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	e, ok := l.entries[name]
	delete(l.entries, name)
	return e, ok
}

// Names are the names that are left and begin so, in order.
func (l *Left) Names(prefix string) []string {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Sorted(maps.Keys(l.entries)), func(n string) bool { return !strings.HasPrefix(n, prefix) })
}

// Close closes the files of what was not taken.
func (l *Left) Close() {
	for _, n := range l.Names("") {
		e, _ := l.Take(n)
		e.Close()
	}
}

// Discard has forgotten what nobody took, and returns when that is done.
func (s *Store) Discard(l *Left) {
	for _, n := range l.Names("") {
		s.Drop(n)
	}
	l.Close()
	s.Sync()
}

// receive takes a message. Its files are the caller's.
func receive(c *ipc.Conn) (m message, files []*os.File, err error) {
	text, files, err := c.Receive()
	if err != nil {
		return m, nil, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		ipc.CloseAll(files)
		return m, nil, fmt.Errorf("fdstore: %w", err)
	}
	return m, files, nil
}

// Listen is a listening socket that is kept under a name: the one that is left, or a new one. Who comes
// while there is nobody to serve it waits in its queue.
func (s *Store) Listen(left *Left, name string, listen func() (*os.File, error)) (*os.File, error) {
	if e, ok := left.Take(name); ok {
		if err := e.Decode(new(string), 1); err != nil {
			e.Close()
			return nil, err
		}
		return e.Files[0], nil
	}
	f, err := listen()
	if err != nil {
		return nil, err
	}
	if err := s.Put(name, "", f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
