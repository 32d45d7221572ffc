package state

import (
	"io"
	"sync"

	"redoubt.dev/redoubt/store/wire"
)

const (
	// maxOutstanding is how many replies may wait for a client that does not read; then no more
	// of its requests are taken.
	maxOutstanding = 20
	maxEvents      = 256     // events waiting for one connection of a guest
	maxEventsOwn   = 1 << 16 // for a service, which watches what many guests write
)

// queue is what waits for one client. Messages may be put in by anybody, who never waits; they
// are written by the client's own goroutines, one at a time. An event equal to one that waits
// is dropped.
type queue struct {
	mu      sync.Mutex
	changed *sync.Cond
	buf     []byte          // messages, encoded
	spare   []byte          // the buffer that was written last, to be used again
	waiting map[string]bool // payloads of the events in buf
	replies int             // in buf
	limit   int             // of events
	busy    bool            // somebody writes
	closed  bool
}

func newQueue(limit int) *queue {
	q := &queue{waiting: map[string]bool{}, limit: limit}
	q.changed = sync.NewCond(&q.mu)
	return q
}

// put reports false when there is no room for an event.
func (q *queue) put(m wire.Message) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return true
	}
	if m.Type == wire.WatchEvent {
		if q.waiting[string(m.Payload)] {
			return true
		}
		if len(q.waiting) >= q.limit {
			return false
		}
		q.waiting[string(m.Payload)] = true
	} else {
		q.replies++
	}
	q.buf = m.Append(q.buf)
	return true
}

// push writes what others put in, as far as that is possible without waiting; the rest is the client's own goroutine's. With a client
// that reads, an event so needs no goroutine to be woken for it.
func (q *queue) push(try func([]byte) int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.busy || q.closed || len(q.buf) == 0 {
		return // who is busy writes this, too
	}
	if n := try(q.buf); n > 0 {
		q.buf = append(q.buf[:0], q.buf[n:]...)
		q.replies = 0
		clear(q.waiting)
	}
	if len(q.buf) > 0 {
		q.changed.Broadcast()
	}
}

// flush writes all there is, unless somebody does so already.
func (q *queue) flush(w io.Writer) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.drain(w)
}

func (q *queue) drain(w io.Writer) (err error) {
	if q.busy {
		return nil
	}
	q.busy = true
	for err == nil && len(q.buf) > 0 && !q.closed {
		b := q.buf
		q.buf, q.spare = q.spare[:0], nil
		q.replies = 0
		clear(q.waiting)
		q.mu.Unlock()
		_, err = w.Write(b)
		q.mu.Lock()
		q.spare = b
		if cap(b) > 64<<10 {
			q.spare = nil
		}
	}
	q.busy = false
	q.changed.Broadcast()
	return err
}

// write writes what comes until the queue is closed or the client is gone.
func (q *queue) write(w io.Writer) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed {
		if len(q.buf) == 0 || q.busy {
			q.changed.Wait()
			continue
		}
		if q.drain(w) != nil {
			return
		}
	}
}

// room waits until another request may be taken; false when the queue was closed.
func (q *queue) room() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.replies >= maxOutstanding && !q.closed {
		q.changed.Wait()
	}
	return !q.closed
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.changed.Broadcast()
}
