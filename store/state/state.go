// Package state is the lasting half of the store: it owns the clients' sockets and identities,
// watches, open transactions and the contents, and keeps the contents on disk. It does not
// parse what clients write. It splits their byte streams by the 16-byte header, gives each
// request to a worker (package logic) and carries out the operation that the header names with
// the arguments the worker found, with the rights of the connection's domain.
//
// What State trusts a worker with is this and no more: which arguments one request has. A
// worker that a request has taken over can put others in their place, which that client could
// have sent itself; it cannot choose another operation, domain or transaction, and sees no
// contents. After its response it is gone ([ResetEach]). One that dies, hangs or answers what
// cannot be (logic.Action.Check) costs its own request, answered EIO, and is replaced.
//
// A request is carried out whole under one lock, in the order in which requests get there: its
// changes are kept on disk (Options.Persist), then the reply is put into its client's queue,
// then the events into others'. What a client has read as done is therefore in the file. Nobody
// who holds the lock waits for a client: each has a goroutine that reads its requests and writes
// its replies, and one that writes events. A client that does not read its replies is not read
// from; one that does not read its events is cut off when they are too many; an event that waits
// already is not queued again. A guest's connections use one worker at a time.
//
// When State starts again it has the contents. Connections, watches and open transactions are
// gone: whoever made the connections hands new ones in, and clients set their watches anew,
// each of which fires at once, so that no change is missed.
package state

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// Options of a State.
type Options struct {
	Tree    *tree.Tree
	Persist tree.Persist // nil: the contents are in memory only
	// Workers parse requests. Nil: this process does, which is for tests of what uses a store.
	Workers Workers
	Reset   Reset         // 0: ResetEach
	Timeout time.Duration // of a worker, for one request; 0: ten seconds
	Size    int           // workers that live; 0: four
}

// A Client is a new connection and who is at its other end.
type Client struct {
	Conn   net.Conn
	Domain tree.Domain
}

// State is a store. Run owns it.
type State struct {
	log  *slog.Logger
	opt  Options
	pool *pool
	wg   sync.WaitGroup

	mu    sync.Mutex // guards what follows, and all of core; unlock ends what changed something
	core  *core
	woken []*conn // who has something to be written, in the order of that
	conns map[*session]*conn
	turns map[tree.Domain]*turn
	ended bool
}

type conn struct {
	domain  tree.Domain
	session *session
	nc      net.Conn
	raw     syscall.RawConn // nil: it has no descriptor
	out     *queue
	turn    *turn
}

// turn lets the connections of one guest take a worker one after another.
type turn struct {
	mu    sync.Mutex
	conns int
}

// New makes a State.
func New(log *slog.Logger, o Options) *State {
	if o.Reset == 0 {
		o.Reset = ResetEach
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.Size == 0 {
		o.Size = defaultSize
	}
	s := &State{log: log, opt: o, core: newCore(log, o.Tree, o.Persist), conns: map[*session]*conn{}, turns: map[tree.Domain]*turn{}}
	s.core.emit = s.emit
	s.core.hangUp = func(x *session) {
		if c := s.conns[x]; c != nil {
			c.hangUp()
		}
	}
	return s
}

// Run serves until ctx ends and then closes every connection. accept yields new connections
// with their identity.
func (s *State) Run(ctx context.Context, accept <-chan Client) {
	if s.opt.Workers != nil {
		s.pool = newPool(ctx, s.log, s.opt)
	}
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case cl, ok := <-accept:
			if !ok {
				accept = nil
				continue
			}
			s.attach(cl)
		}
	}
	s.mu.Lock()
	s.ended = true
	for _, c := range s.conns {
		c.hangUp()
	}
	s.mu.Unlock()
	if s.pool != nil {
		s.pool.interrupt()
		defer s.pool.close()
	}
	s.wg.Wait()
}

// Listen accepts connections for accept, which Run reads, until ctx or the listener ends: those
// of root, who are [tree.Privileged], as the C daemon's. Others are closed.
func Listen(ctx context.Context, log *slog.Logger, l *net.UnixListener, accept chan<- Client) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			if errors.Is(err, unix.ECONNABORTED) {
				continue
			}
			return err
		}
		uid, err := peer(c)
		if err != nil || uid != 0 {
			log.Warn("store connection refused", "uid", uid, "err", err)
			hangUp(c)
			continue
		}
		select {
		case accept <- Client{Conn: c, Domain: tree.Privileged}:
		case <-ctx.Done():
			hangUp(c)
			return nil
		}
	}
}

func hangUp(c net.Conn) { c.Close() }

func peer(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(cerr, err); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

func (s *State) attach(cl Client) {
	limit := maxEvents
	if cl.Domain < tree.FirstGuest {
		limit = maxEventsOwn
	}
	c := &conn{domain: cl.Domain, nc: cl.Conn, out: newQueue(limit)}
	if u, ok := cl.Conn.(*net.UnixConn); ok {
		c.raw, _ = u.SyscallConn() // of one that is closed there is none, and that is noticed elsewhere
	}
	s.mu.Lock()
	c.session = s.core.open(c.domain)
	s.conns[c.session] = c
	if c.domain >= tree.FirstGuest {
		if c.turn = s.turns[c.domain]; c.turn == nil {
			c.turn = &turn{}
			s.turns[c.domain] = c.turn
		}
		c.turn.conns++
	}
	s.unlock()
	s.wg.Go(func() { s.serve(c) })
	s.wg.Go(func() {
		c.out.write(c.nc)
		c.nc.Close() // serve sees it
	})
}

// hangUp makes the connection's goroutines end. It does not wait.
func (c *conn) hangUp() {
	c.out.close()
	c.nc.Close()
}

func (s *State) drop(c *conn) {
	c.hangUp()
	s.mu.Lock()
	defer s.unlock()
	delete(s.conns, c.session)
	if c.turn != nil {
		if c.turn.conns--; c.turn.conns == 0 {
			delete(s.turns, c.domain)
		}
	}
	s.core.close(c.session)
}

// emit queues a message for a client; s.mu is held.
func (s *State) emit(x *session, m wire.Message) {
	c := s.conns[x]
	if c == nil {
		return
	}
	if !c.out.put(m) {
		s.log.Warn("store client does not read its events; cut off", "domain", c.domain)
		c.hangUp()
	}
	s.woken = append(s.woken, c)
}

// unlock unlocks s.mu, and writes what was queued meanwhile.
func (s *State) unlock() {
	woken := s.woken
	s.woken = nil
	s.mu.Unlock()
	for _, c := range woken {
		c.out.push(c.try)
	}
}

// try writes as much as is possible without waiting and says how much.
func (c *conn) try(b []byte) (n int) {
	if c.raw == nil {
		return 0
	}
	_ = c.raw.Write(func(fd uintptr) bool {
		n, _ = unix.Write(int(fd), b) // an error is seen by whoever writes next
		return true
	})
	return max(n, 0)
}

func (s *State) serve(c *conn) {
	defer s.drop(c)
	r := bufio.NewReaderSize(c.nc, wire.HeaderSize+wire.MaxPayload)
	for c.out.room() {
		m, err := wire.ReadMessage(r)
		if err != nil {
			if errors.Is(err, wire.ErrMessage) {
				s.log.Warn("store client cut off", "domain", c.domain, "err", err)
			} else if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
				s.log.Warn("store client lost", "domain", c.domain, "err", err)
			}
			return
		}
		a, err := s.decide(c, m)
		s.mu.Lock()
		if s.ended { // a worker that was ended for that reason says nothing of the request
			s.mu.Unlock()
			return
		}
		if err != nil {
			s.log.Error("store request lost", "domain", c.domain, "type", m.Type, "err", err)
			s.core.refuse(c.session, m, tree.EIO)
		} else {
			s.core.handle(c.session, m, a)
		}
		s.unlock()
		if c.out.flush(c.nc) != nil {
			return
		}
	}
}

func (s *State) decide(c *conn, m wire.Message) (logic.Action, error) {
	r := logic.Request{Domain: c.domain, Type: m.Type, Payload: m.Payload}
	if s.pool == nil {
		a := logic.Decide(r)
		return a, a.Check(r.Type, r.Domain)
	}
	if c.turn != nil {
		c.turn.mu.Lock()
		defer c.turn.mu.Unlock()
	}
	return s.pool.decide(r)
}
