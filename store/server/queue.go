package server

import (
	"sync"

	"redoubt.dev/redoubt/store/wire"
)

// queue is what waits for one client. An event equal to one that waits is dropped.
type queue struct {
	mu      sync.Mutex
	changed *sync.Cond
	msgs    []wire.Message
	events  map[string]bool // payloads of the events in msgs
	limit   int
	closed  bool
}

func newQueue(limit int) *queue {
	q := &queue{events: map[string]bool{}, limit: limit}
	q.changed = sync.NewCond(&q.mu)
	return q
}

// put reports false when the queue is full.
func (q *queue) put(m wire.Message) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if m.Type == wire.WatchEvent {
		if q.events[string(m.Payload)] {
			return true
		}
		q.events[string(m.Payload)] = true
	}
	if len(q.msgs) >= q.limit {
		return false
	}
	q.msgs = append(q.msgs, m)
	q.changed.Signal()
	return true
}

// take waits for the next message; false when the queue was closed.
func (q *queue) take() (wire.Message, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.msgs) == 0 && !q.closed {
		q.changed.Wait()
	}
	if q.closed {
		return wire.Message{}, false
	}
	m := q.msgs[0]
	q.msgs = q.msgs[1:]
	if m.Type == wire.WatchEvent {
		delete(q.events, string(m.Payload))
	}
	return m, true
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.msgs = nil
	q.changed.Broadcast()
}
