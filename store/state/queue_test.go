package state

import (
	"bytes"
	"slices"
	"testing"

	"redoubt.dev/redoubt/store/wire"
)

// TestPush: what a client takes without waiting is written by whoever queued it, in order; the rest stays, and what waits in part
// is not taken for a whole event that waits.
func TestPush(t *testing.T) {
	event := func(path string) wire.Message {
		return wire.Message{Type: wire.WatchEvent, Payload: wire.Join(path, "token")}
	}
	q := newQueue(2)
	var sent []byte
	takes := func(most int) func([]byte) int {
		return func(b []byte) int {
			n := min(most, len(b))
			sent = append(sent, b[:n]...)
			return n
		}
	}
	var want []byte
	put := func(m wire.Message, queued bool) {
		t.Helper()
		if !q.put(m) {
			t.Fatalf("no room for %q", m.Payload)
		}
		if queued {
			want = m.Append(want)
		}
	}
	put(wire.Message{Type: wire.Write, Payload: []byte("OK\x00")}, true)
	put(event("/a"), true)
	put(event("/a"), false) // waits already
	q.push(takes(0))
	put(event("/a"), false) // still
	q.push(takes(25))       // the reply, and some of the event
	put(event("/a"), true)  // one that is not quite sent says nothing of a change from now on
	put(event("/b"), true)
	if q.put(event("/c")) {
		t.Error("more events than the limit wait")
	}
	q.push(takes(1 << 20))
	if !bytes.Equal(sent, want) {
		t.Errorf("sent %q, want %q", sent, want)
	}
	if len(q.buf) != 0 || len(q.waiting) != 0 || q.replies != 0 {
		t.Errorf("left: %d bytes, %d events, %d replies", len(q.buf), len(q.waiting), q.replies)
	}
	// While somebody writes, nobody else does, and what is queued comes after.
	put(event("/d"), false)
	sent = nil
	var written writes
	written.during = func() {
		if len(written.all) == 1 {
			put(event("/e"), false)
		}
		q.push(takes(1 << 20))
	}
	if err := q.flush(&written); err != nil {
		t.Fatal(err)
	}
	if got, want := written.all, [][]byte{event("/d").Append(nil), event("/e").Append(nil)}; !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("written %q, want %q", got, want)
	}
	if len(sent) > 0 {
		t.Errorf("%q pushed beside a write", sent)
	}
}

// writes are what was written, and what happens while it is.
type writes struct {
	all    [][]byte
	during func()
}

func (w *writes) Write(b []byte) (int, error) {
	w.all = append(w.all, bytes.Clone(b))
	w.during()
	return len(b), nil
}
