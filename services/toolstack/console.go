package toolstack

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"redoubt.dev/redoubt/services/protocol"
)

// scrollback is how much of a console is kept in memory; the log file has more.
const scrollback = 256 << 10

// console is a guest's serial console: a scrollback, a log file, and any number of watchers,
// each at a place of its own. It outlives the emulator processes it is connected to.
type console struct {
	mu      sync.Mutex
	back    []byte // the last of all that was printed
	end     int64  // how much was printed in all
	changed chan struct{}
	conn    net.Conn
	done    chan struct{} // closed when the reader of conn has ended
	partial []byte        // the current line, for recognising the first program's start; the reader's
}

func newConsole() *console { return &console{changed: make(chan struct{})} }

// attach connects a new emulator's console and owns one goroutine until detach. What it prints goes into
// the log of s, where a toolstack that takes the guest over goes on. s and moment may be nil.
func (c *console) attach(conn *net.UnixConn, s *spool, moment func(kind string)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next, back := conn.Read, []byte(nil)
	if s != nil {
		next, back = s.next, s.tail()
	}
	c.back, c.end, c.partial = bytes.Clone(back), int64(len(back)), nil
	done := make(chan struct{})
	c.conn, c.done = conn, done
	go func() {
		defer close(done)
		c.read(next, back, moment)
		if s != nil {
			_ = s.Close() // what was printed is in the log
		}
	}()
}

func (c *console) read(next func([]byte) (int, error), back []byte, moment func(kind string)) {
	look := func(out []byte) {
		if moment != nil && c.scan(out) {
			moment(protocol.EventInit)
			moment = nil // once
		}
	}
	look(back) // the last toolstack may have logged it, and not lived to tell
	buf := make([]byte, 8<<10)
	for {
		n, err := next(buf)
		if err != nil {
			return
		}
		c.mu.Lock()
		if c.back = append(c.back, buf[:n]...); len(c.back) > 2*scrollback {
			c.back = bytes.Clone(c.back[len(c.back)-scrollback:])
		}
		c.end += int64(n)
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		look(buf[:n])
	}
}

// scan looks for the line by which a Linux kernel says that it starts the first program
// (init/main.c, run_init_process).
func (c *console) scan(out []byte) bool {
	c.partial = append(c.partial, out...)
	for {
		line, rest, ok := bytes.Cut(c.partial, []byte("\n"))
		if !ok {
			break
		}
		if bytes.Contains(line, []byte("Run ")) && bytes.Contains(line, []byte(" as init process")) {
			c.partial = nil
			return true
		}
		c.partial = rest
	}
	if len(c.partial) > 4096 {
		c.partial = nil
	}
	return false
}

// detach disconnects from an emulator that is gone, after all it printed was read.
func (c *console) detach() {
	c.mu.Lock()
	conn, done := c.conn, c.done
	c.mu.Unlock()
	if conn == nil {
		return
	}
	// Normally its end is closed by now; the bound is for a descendant that still holds it.
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	<-done
	conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == conn {
		c.conn = nil
	}
}

// from returns what was printed from place on, the place after it, and a channel that is
// closed when there is more. A watcher that fell behind the scrollback goes on at its start.
func (c *console) from(place int64) ([]byte, int64, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	start := c.end - int64(len(c.back))
	if place < start || place > c.end { // too slow, or another start of the guest
		place = start
	}
	return bytes.Clone(c.back[place-start:]), c.end, c.changed
}

// write types into the guest.
func (c *console) write(b []byte) error {
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn == nil {
		return net.ErrClosed
	}
	if err := conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	_, err := conn.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil // the guest does not read its console: what is typed is lost, as on a wire
	}
	return err
}

// errSlow says that a subscriber was too slow.
var errSlow = errors.New("too slow: some output was lost")

// broadcast gives every subscriber what is sent. A subscriber that does not keep up loses its
// subscription; the sender never waits.
type broadcast[T any] struct {
	mu   sync.Mutex
	subs map[*subscription[T]]bool
}

type subscription[T any] struct {
	b  *broadcast[T]
	ch chan T // closed when the subscription is lost
}

func newBroadcast[T any]() *broadcast[T] { return &broadcast[T]{subs: map[*subscription[T]]bool{}} }

func (b *broadcast[T]) subscribe() *subscription[T] {
	s := &subscription[T]{b: b, ch: make(chan T, 1024)}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.subs[s] = true
	return s
}

func (b *broadcast[T]) send(v T) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for s := range b.subs {
		select {
		case s.ch <- v:
		default:
			delete(b.subs, s)
			close(s.ch)
		}
	}
}

func (s *subscription[T]) close() {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if s.b.subs[s] {
		delete(s.b.subs, s)
		close(s.ch)
	}
}

// each calls f with everything sent until f fails, ctx ends, or the subscription is lost.
func (s *subscription[T]) each(ctx context.Context, f func(T) error) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case v, ok := <-s.ch:
			if !ok {
				return errSlow
			}
			if err := f(v); err != nil {
				return err
			}
		}
	}
}
