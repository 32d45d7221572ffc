// Package server keeps the store and serves its clients: XenStore's requests and watches over
// connections whose identity was fixed when they were made.
//
// One goroutine owns the tree and all watches; each connection has a reader and a writer. An
// event that waits for a client already is not queued again, so a writer in a loop costs a
// watcher one event. A client that does not read is cut off once its queue is full: it hurts
// only itself. Transactions and the socket of XenStore's own clients come later.
package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

const (
	maxQueued        = 256     // messages waiting for one guest
	maxQueuedService = 1 << 16 // for one service, which watches what many guests write
	maxWatches       = 128     // of one guest's connection
)

// Server is a store. Run owns it.
type Server struct {
	log      *slog.Logger
	tree     *tree.Tree
	requests chan request
	conns    map[*conn]bool
}

type conn struct {
	domain  tree.Domain
	c       net.Conn
	out     *queue // owner → writer; closed when the owner lets go
	watches []watch
}

type watch struct{ path, token, shown string } // shown: the path as the client wrote it

type request struct {
	conn *conn
	kind int
	msg  wire.Message
}

const (
	opened = iota
	message
	closed
)

// New makes a store with the reserved names.
func New(log *slog.Logger, reserved ...tree.Reserved) *Server {
	return &Server{log: log, tree: tree.New(reserved...), requests: make(chan request), conns: map[*conn]bool{}}
}

// Run serves until ctx ends and then closes every connection. accept yields new connections
// with their identity.
func (s *Server) Run(ctx context.Context, accept <-chan Client) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		for c := range s.conns {
			s.drop(c)
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return
		case cl, ok := <-accept:
			if !ok {
				accept = nil
				continue
			}
			limit := maxQueued
			if cl.Domain < FirstGuest {
				limit = maxQueuedService
			}
			c := &conn{domain: cl.Domain, c: cl.Conn, out: newQueue(limit)}
			s.conns[c] = true
			wg.Go(func() { s.read(ctx, c) })
			wg.Go(func() { write(c) })
		case r := <-s.requests:
			switch {
			case !s.conns[r.conn]: // dropped while the request was on its way
			case r.kind == closed:
				s.drop(r.conn)
			default:
				s.handle(r.conn, r.msg)
			}
		}
	}
}

// A Client is a new connection and who is at its other end.
type Client struct {
	Conn   net.Conn
	Domain tree.Domain
}

func (s *Server) drop(c *conn) {
	if s.conns[c] {
		delete(s.conns, c)
		c.out.close()
		c.c.Close()
	}
}

func (s *Server) read(ctx context.Context, c *conn) {
	for {
		m, err := wire.ReadMessage(c.c)
		r := request{conn: c, kind: message, msg: m}
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("store client cut off", "domain", c.domain, "err", err)
			}
			r.kind = closed
		}
		select {
		case s.requests <- r:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

func write(c *conn) {
	var buf []byte
	for {
		m, ok := c.out.take()
		if !ok {
			return
		}
		buf = m.Append(buf[:0])
		if _, err := c.c.Write(buf); err != nil {
			c.c.Close() // the reader tells the owner
			return
		}
	}
}

func (s *Server) send(c *conn, m wire.Message) {
	if s.conns[c] && !c.out.put(m) {
		s.log.Warn("store client does not read; cut off", "domain", c.domain)
		s.drop(c)
	}
}

func (s *Server) handle(c *conn, m wire.Message) {
	payload, err := s.perform(c, m)
	if err != nil {
		var e tree.Errno
		if !errors.As(err, &e) {
			e = tree.EINVAL
		}
		s.send(c, wire.Message{Type: wire.Error, Request: m.Request, Tx: m.Tx, Payload: wire.Join(string(e))})
		return
	}
	s.send(c, wire.Message{Type: m.Type, Request: m.Request, Tx: m.Tx, Payload: payload})
	// The answer goes out before the events it causes.
	switch m.Type {
	case wire.Write, wire.Mkdir, wire.Remove, wire.SetPerms:
		args, _ := wire.Split(m.Payload[:strings.IndexByte(string(m.Payload), 0)+1], 1, false)
		s.fire(absolute(c.domain, args[0]), m.Type == wire.Remove)
	case wire.Watch:
		w := c.watches[len(c.watches)-1]
		s.send(c, event(w, w.path))
	}
}

var ok = wire.Join("OK")

func (s *Server) perform(c *conn, m wire.Message) ([]byte, error) {
	if m.Tx != 0 {
		return nil, tree.ENOSYS
	}
	d := c.domain
	arg := func(n int, rest bool) ([]string, error) {
		a, err := wire.Split(m.Payload, n, rest)
		if err != nil {
			return nil, tree.EINVAL
		}
		a[0] = absolute(d, a[0])
		return a, nil
	}
	switch m.Type {
	case wire.Read, wire.Directory, wire.GetPerms, wire.Mkdir, wire.Remove:
		a, err := arg(1, false)
		if err != nil {
			return nil, err
		}
		switch m.Type {
		case wire.Read:
			return s.tree.Read(d, a[0])
		case wire.Directory:
			names, err := s.tree.List(d, a[0])
			return fit(wire.Join(names...), err)
		case wire.GetPerms:
			perms, err := s.tree.Perms(d, a[0])
			var out []string
			for _, p := range perms {
				out = append(out, p.String())
			}
			return fit(wire.Join(out...), err)
		case wire.Mkdir:
			return ok, s.tree.Mkdir(d, a[0])
		default:
			return ok, s.tree.Remove(d, a[0])
		}
	case wire.Write:
		a, err := arg(2, true)
		if err != nil {
			return nil, err
		}
		return ok, s.tree.Write(d, a[0], []byte(a[1]))
	case wire.SetPerms:
		n := strings.Count(string(m.Payload), "\x00")
		if n < 2 {
			return nil, tree.EINVAL
		}
		a, err := arg(n, false)
		if err != nil {
			return nil, err
		}
		var perms []tree.Perm
		for _, x := range a[1:] {
			p, err := tree.ParsePerm(x)
			if err != nil {
				return nil, err
			}
			perms = append(perms, p)
		}
		return ok, s.tree.SetPerms(d, a[0], perms)
	case wire.Watch, wire.Unwatch:
		a, err := wire.Split(m.Payload, 2, false)
		if err != nil {
			return nil, tree.EINVAL
		}
		return ok, c.watch(m.Type, a[0], a[1])
	}
	return nil, tree.ENOSYS
}

func fit(b []byte, err error) ([]byte, error) {
	if err == nil && len(b) > wire.MaxPayload {
		return nil, tree.E2BIG
	}
	return b, err
}

func (c *conn) watch(t wire.Type, path, token string) error {
	abs := absolute(c.domain, path)
	if err := tree.Check(abs); err != nil {
		return err
	}
	for i, w := range c.watches {
		if w.path == abs && w.token == token {
			if t == wire.Watch {
				return tree.EEXIST
			}
			c.watches = append(c.watches[:i], c.watches[i+1:]...)
			return nil
		}
	}
	if t == wire.Unwatch {
		return tree.ENOENT
	}
	if len(c.watches) >= maxWatches && c.domain >= FirstGuest {
		return tree.ENOSPC
	}
	c.watches = append(c.watches, watch{path: abs, token: token, shown: path})
	return nil
}

// fire sends an event to every watch that a change of path concerns: watches on it or above
// it, and, when a subtree was removed, watches below it.
func (s *Server) fire(path string, removed bool) {
	for c := range s.conns {
		for _, w := range c.watches {
			var at string
			switch {
			case w.path == path || w.path == "/" || strings.HasPrefix(path, w.path+"/"):
				at = path
			case removed && strings.HasPrefix(w.path, path+"/"):
				at = w.path
			default:
				continue
			}
			if s.tree.Readable(c.domain, at) {
				s.send(c, event(w, at))
			}
		}
	}
}

// event names the changed path in the form the client used for its watch.
func event(w watch, at string) wire.Message {
	shown := at
	if !strings.HasPrefix(w.shown, "/") {
		shown = w.shown + strings.TrimPrefix(at, w.path)
	}
	return wire.Message{Type: wire.WatchEvent, Payload: wire.Join(shown, w.token)}
}

// absolute resolves a client's path beneath its implicit domain path.
func absolute(d tree.Domain, path string) string {
	if strings.HasPrefix(path, "/") {
		return path
	}
	return DomainPath(d) + "/" + path
}
