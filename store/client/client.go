// Package client speaks to the store.
package client

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// ErrClosed says that the connection to the store is gone.
var ErrClosed = errors.New("store connection closed")

// An Event says that the node at Path, on or beneath a watched path, may have changed.
type Event struct{ Path, Token string }

// Client is one connection. Its methods may be called by several goroutines; requests are
// answered in order.
type Client struct {
	c      net.Conn
	events chan Event
	done   chan struct{} // closed when receive has ended

	queueMu sync.Mutex
	queue   []Event
	queued  map[Event]bool
	more    chan struct{} // has one element while the queue may hold something

	mu   sync.Mutex // one request at a time
	next uint32

	reply chan wire.Message
	err   error // set before done is closed
}

// New takes over a connection and owns two goroutines, which Close ends. An event that waits
// already is not queued again: watches say that something changed, not how often, so a peer
// that writes in a loop costs this client one event.
func New(c net.Conn) *Client {
	cl := &Client{
		c: c, events: make(chan Event), done: make(chan struct{}), reply: make(chan wire.Message, 1),
		queued: map[Event]bool{}, more: make(chan struct{}, 1),
	}
	go cl.receive()
	go cl.deliver()
	return cl
}

func (c *Client) receive() {
	defer close(c.done)
	r := bufio.NewReaderSize(c.c, wire.HeaderSize+wire.MaxPayload)
	for {
		m, err := wire.ReadMessage(r)
		if err != nil {
			c.err = fmt.Errorf("%w: %w", ErrClosed, err)
			return
		}
		if m.Type == wire.WatchEvent {
			a, err := wire.Split(m.Payload, 2, false)
			if err != nil {
				c.err = err
				return
			}
			c.enqueue(Event{Path: a[0], Token: a[1]})
			continue
		}
		select {
		case c.reply <- m:
		default:
			c.err = fmt.Errorf("%w: reply without a request", wire.ErrMessage)
			c.c.Close()
			return
		}
	}
}

func (c *Client) enqueue(e Event) {
	c.queueMu.Lock()
	defer c.queueMu.Unlock()
	if c.queued[e] {
		return
	}
	c.queued[e] = true
	c.queue = append(c.queue, e)
	select {
	case c.more <- struct{}{}:
	default:
	}
}

// deliver hands events on until the connection has ended.
func (c *Client) deliver() {
	defer close(c.events)
	for {
		c.queueMu.Lock()
		var e Event
		have := len(c.queue) > 0
		if have {
			e = c.queue[0]
			c.queue = c.queue[1:]
			delete(c.queued, e)
		}
		c.queueMu.Unlock()
		if !have {
			select {
			case <-c.more:
				continue
			case <-c.done:
				return
			}
		}
		select {
		case c.events <- e:
		case <-c.done:
			return
		}
	}
}

// Events is where watches arrive; closed with the connection.
func (c *Client) Events() <-chan Event { return c.events }

// Close ends the connection.
func (c *Client) Close() error {
	err := c.c.Close()
	<-c.done
	return err
}

func (c *Client) do(t wire.Type, tx uint32, payload []byte) ([]byte, error) {
	if len(payload) > wire.MaxPayload {
		return nil, tree.E2BIG
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	m := wire.Message{Type: t, Request: c.next, Tx: tx, Payload: payload}
	if _, err := c.c.Write(m.Append(nil)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClosed, err)
	}
	select {
	case r := <-c.reply:
		if r.Request != m.Request {
			return nil, fmt.Errorf("%w: reply %d to request %d", wire.ErrMessage, r.Request, m.Request)
		}
		if r.Type == wire.Error {
			return nil, tree.Errno(strings.TrimRight(string(r.Payload), "\x00"))
		}
		return r.Payload, nil
	case <-c.done:
		return nil, c.err
	}
}

func describe(op, path string, err error) error {
	if err != nil {
		return fmt.Errorf("store: %s %s: %w", op, path, err)
	}
	return nil
}

// Watch asks for an event at every change on or beneath path; one comes at once.
func (c *Client) Watch(path, token string) error {
	_, err := c.do(wire.Watch, 0, wire.Join(path, token))
	return describe("watch", path, err)
}

// Unwatch ends a watch; events already on their way still arrive.
func (c *Client) Unwatch(path, token string) error {
	_, err := c.do(wire.Unwatch, 0, wire.Join(path, token))
	return describe("unwatch", path, err)
}
