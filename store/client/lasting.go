package client

import (
	"errors"
	"net"
	"sync"

	"redoubt.dev/redoubt/store/tree"
)

// Lasting is a client that outlives its connections: when one ends, because the store died,
// operations wait for the next, which [Lasting.Renew] brings, and are made again there. Watches
// are set anew on it, and fire for that, so that no change is missed. It has only operations
// that may be carried out twice.
//
// Its methods may be called by several goroutines.
type Lasting struct {
	events chan Event
	ended  chan struct{}  // closed by Close
	run    sync.WaitGroup // forward

	renew sync.Mutex // one Renew at a time

	mu      sync.Mutex
	c       *Client       // nil while there is none
	changed chan struct{} // closed when c or last changes, or by Close
	watches map[Event]bool
	last    bool // no further connection will come
	closed  bool
}

// NewLasting takes over the first connection and owns goroutines, which Close ends.
func NewLasting(c net.Conn) *Lasting {
	l := &Lasting{
		c: New(c), events: make(chan Event), ended: make(chan struct{}),
		changed: make(chan struct{}), watches: map[Event]bool{},
	}
	l.run.Go(l.forward)
	return l
}

// forward hands on the events of one connection after another.
func (l *Lasting) forward() {
	defer close(l.events)
	var old *Client
	for {
		c, err := l.current(old)
		if err != nil {
			return
		}
		for e := range c.Events() {
			select {
			case l.events <- e:
			case <-l.ended:
				return
			}
		}
		old = c
	}
}

// current waits for a connection that is not the lost one.
func (l *Lasting) current(lost *Client) (*Client, error) {
	for {
		l.mu.Lock()
		c, last, closed, changed := l.c, l.last, l.closed, l.changed
		l.mu.Unlock()
		switch {
		case closed:
			return nil, ErrClosed
		case c != nil && c != lost:
			return c, nil
		case last:
			return nil, ErrClosed
		}
		<-changed
	}
}

// signal tells those who wait; l.mu is held.
func (l *Lasting) signal() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// attempts is how often an operation is tried that is answered EIO: a worker of the store that dies
// costs the request it had, which was not carried out.
const attempts = 3

// Renew ends the connection there is and takes over another one, on which every watch is set
// before anything else is done. Its error says that this connection was no good, too, and
// another is needed.
func (l *Lasting) Renew(nc net.Conn) error {
	l.renew.Lock()
	defer l.renew.Unlock()
	l.mu.Lock()
	old := l.c
	l.c = nil
	closed := l.closed
	l.mu.Unlock()
	if old != nil {
		_ = old.Close()
	}
	if closed {
		nc.Close()
		return ErrClosed
	}
	// From here on, what is asked for waits for the new connection: so the list is complete.
	c := New(nc)
	stop := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() { // Close does not wait for a store that does not answer
		select {
		case <-l.ended:
			_ = c.Close()
		case <-stop:
		}
	})
	err := l.again(c)
	close(stop)
	watcher.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && l.closed {
		err = ErrClosed
	}
	if err != nil {
		_ = c.Close()
		return err
	}
	l.c = c
	l.signal()
	return nil
}

func (l *Lasting) again(c *Client) error {
	l.mu.Lock()
	watches := make([]Event, 0, len(l.watches))
	for w := range l.watches {
		watches = append(watches, w)
	}
	l.mu.Unlock()
	for _, w := range watches {
		for attempt := 1; ; attempt++ {
			err := c.Watch(w.Path, w.Token)
			if err == nil {
				break
			}
			if attempt == attempts || !errors.Is(err, tree.EIO) {
				return err
			}
		}
	}
	return nil
}

// Last says that no further connection will come: once the present one has ended, operations
// fail with [ErrClosed] and Events is closed.
func (l *Lasting) Last() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = true
	l.signal()
}

// Close ends the connection and all that waits.
func (l *Lasting) Close() {
	l.mu.Lock()
	c := l.c
	if !l.closed {
		l.closed = true
		close(l.ended)
		l.signal()
	}
	l.mu.Unlock()
	if c != nil {
		_ = c.Close()
	}
	l.run.Wait()
}

// Events is where watches arrive; closed by Close, and when the last connection has ended.
func (l *Lasting) Events() <-chan Event { return l.events }

// on performs an operation on the connection there is, and on the next if that one ends. lost
// says that it may have been carried out before. A worker's death is not the caller's matter.
func (l *Lasting) on(op func(c *Client, lost bool) error) error {
	var old *Client
	lost := false
	for failed := 0; ; {
		c, err := l.current(old)
		if err != nil {
			return err
		}
		err = op(c, lost)
		switch {
		case errors.Is(err, ErrClosed):
			old, lost = c, true
		case errors.Is(err, tree.EIO) && failed < attempts-1:
			failed++
			old = nil
		default:
			return err
		}
	}
}

// Watch is as Client's. A watch that is there already is EEXIST.
func (l *Lasting) Watch(path, token string) error {
	w := Event{path, token}
	l.mu.Lock()
	if l.watches[w] {
		l.mu.Unlock()
		return describe("watch", path, tree.EEXIST)
	}
	l.watches[w] = true
	l.mu.Unlock()
	err := l.on(func(c *Client, _ bool) error {
		err := c.Watch(path, token)
		if errors.Is(err, tree.EEXIST) {
			return nil // Renew has set it
		}
		return err
	})
	if err != nil {
		l.mu.Lock()
		delete(l.watches, w)
		l.mu.Unlock()
	}
	return err
}

// Unwatch is as Client's.
func (l *Lasting) Unwatch(path, token string) error {
	w := Event{path, token}
	l.mu.Lock()
	known := l.watches[w]
	delete(l.watches, w)
	l.mu.Unlock()
	return l.on(func(c *Client, _ bool) error {
		err := c.Unwatch(path, token)
		if known && errors.Is(err, tree.ENOENT) {
			return nil // a new connection never had it
		}
		return err
	})
}

// Read is as Client's.
func (l *Lasting) Read(path string) (v string, err error) {
	err = l.on(func(c *Client, _ bool) error {
		v, err = c.Read(path)
		return err
	})
	return v, err
}

// Write is as Client's.
func (l *Lasting) Write(path, value string) error {
	return l.on(func(c *Client, _ bool) error { return c.Write(path, value) })
}

// Remove is as Client's.
func (l *Lasting) Remove(path string) error {
	return l.on(func(c *Client, lost bool) error {
		err := c.Remove(path)
		if lost && errors.Is(err, tree.ENOENT) {
			return nil
		}
		return err
	})
}
