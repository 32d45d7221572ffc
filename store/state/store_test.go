package state_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

const (
	guest   = server.FirstGuest
	guest2  = server.FirstGuest + 1
	builder = server.Builder
)

// store is a running store with a socket for XenStore's own clients.
type store struct {
	tb     testing.TB
	socket string
	accept chan state.Client
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func start(tb testing.TB, o state.Options) *store {
	tb.Helper()
	if o.Tree == nil {
		o.Tree = tree.New(server.ReservedNames()...)
	}
	dir, err := os.MkdirTemp("", "store") // short: a socket's path may have 107 bytes
	must(tb, err)
	s := &store{tb: tb, socket: filepath.Join(dir, "socket"), accept: make(chan state.Client)}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	must(tb, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { state.New(quiet(), o).Run(ctx, s.accept) })
	wg.Go(func() { _ = state.Listen(ctx, quiet(), l, s.accept) })
	tb.Cleanup(func() { cancel(); wg.Wait(); _ = os.RemoveAll(dir) })
	return s
}

// connect makes a connection with an identity.
func (s *store) connect(d tree.Domain) net.Conn {
	s.tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(s.tb, err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "store")
		ends[i], err = net.FileConn(f)
		must(s.tb, err)
		f.Close()
	}
	s.accept <- state.Client{Conn: ends[0], Domain: d}
	s.tb.Cleanup(func() { ends[1].Close() })
	return ends[1]
}

func (s *store) dial(d tree.Domain) *client.Client {
	s.tb.Helper()
	c := client.New(s.connect(d))
	s.tb.Cleanup(func() { c.Close() })
	return c
}

// home makes a guest's directory, as the Builder does.
func (s *store) home(d tree.Domain) string {
	s.tb.Helper()
	b := s.dial(builder)
	p := server.DomainPath(d)
	must(s.tb, b.Mkdir(p))
	must(s.tb, b.SetPerms(p, tree.Perm{Domain: d}))
	return p
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func next(tb testing.TB, c *client.Client) client.Event {
	tb.Helper()
	select {
	case e, ok := <-c.Events():
		if !ok {
			tb.Fatal("connection ended")
		}
		return e
	case <-time.After(20 * time.Second):
		tb.Fatal("no event")
	}
	return client.Event{}
}

// raw sends one message and returns the answer to it.
func raw(tb testing.TB, c net.Conn, m wire.Message) wire.Message {
	tb.Helper()
	_, err := c.Write(m.Append(nil))
	must(tb, err)
	for {
		r, err := wire.ReadMessage(c)
		must(tb, err)
		if r.Type != wire.WatchEvent {
			return r
		}
	}
}

func fails(tb testing.TB, r wire.Message, want tree.Errno) {
	tb.Helper()
	if r.Type != wire.Error || string(r.Payload) != string(want)+"\x00" {
		tb.Errorf("answer %v %q, want %v", r.Type, r.Payload, want)
	}
}

// TestTransactions: a client's transactions are repeated until they hold, and none is lost.
func TestTransactions(t *testing.T) {
	s := start(t, state.Options{Workers: inProcess(t), Reset: state.ResetOff})
	b := s.dial(builder)
	must(t, b.Write("/counter", ""))
	const clients, times = 4, 50
	var wg sync.WaitGroup
	for range clients {
		c := s.dial(builder)
		wg.Go(func() {
			for range times {
				for {
					err := c.Transaction(func(x *client.Tx) error {
						v, err := x.Read("/counter")
						if err != nil {
							return err
						}
						return x.Write("/counter", v+"x")
					})
					if err == nil {
						break
					}
					if !errors.Is(err, tree.EAGAIN) {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if v, err := b.Read("/counter"); err != nil || len(v) != clients*times {
		t.Fatalf("%d of %d transactions are there, %v", len(v), clients*times, err)
	}
	// A function that fails leaves nothing, nor an open transaction behind.
	g := s.dial(guest)
	home := s.home(guest)
	mine := errors.New("mine")
	for range 100 {
		if err := g.Transaction(func(x *client.Tx) error { _ = x.Write(home+"/x", "1"); return mine }); !errors.Is(err, mine) {
			t.Fatal(err)
		}
	}
	if _, err := g.Read(home + "/x"); !errors.Is(err, tree.ENOENT) {
		t.Fatal(err)
	}
}

// TestManyTransactions: a guest gets ten transactions, over all its connections; their end
// makes room, and so does the end of a connection.
func TestManyTransactions(t *testing.T) {
	s := start(t, state.Options{})
	a, b := s.connect(guest), s.connect(guest)
	begin := wire.Message{Type: wire.TransactionStart, Payload: wire.Join("")}
	for range 5 {
		for _, c := range []net.Conn{a, b} {
			if r := raw(t, c, begin); r.Type != wire.TransactionStart {
				t.Fatalf("%v %q", r.Type, r.Payload)
			}
		}
	}
	for range 1000 {
		fails(t, raw(t, a, begin), tree.ENOSPC)
	}
	if r := raw(t, a, wire.Message{Type: wire.TransactionEnd, Tx: 1, Payload: wire.Join("F")}); r.Type == wire.Error {
		t.Fatalf("%q", r.Payload)
	}
	if r := raw(t, b, begin); r.Type == wire.Error {
		t.Fatalf("%q", r.Payload)
	}
	fails(t, raw(t, a, wire.Message{Type: wire.Read, Tx: 1, Payload: wire.Join("/")}), tree.ENOENT)
	fails(t, raw(t, a, wire.Message{Type: wire.TransactionStart, Tx: 2, Payload: wire.Join("")}), tree.EBUSY)
	if r := raw(t, b, wire.Message{Type: wire.ResetWatches, Payload: wire.Join("")}); r.Type == wire.Error {
		t.Fatalf("%q", r.Payload)
	}
	for range 6 {
		if r := raw(t, a, begin); r.Type == wire.Error {
			t.Fatalf("after the other connection's end: %q", r.Payload)
		}
	}
}

// TestWatchQuota: a guest gets 128 watches; a token that leaves no room for a path is refused.
func TestWatchQuota(t *testing.T) {
	s := start(t, state.Options{})
	home := s.home(guest)
	g := s.dial(guest)
	for i := range 128 {
		must(t, g.Watch(home, string(rune('a'+i%26))+string(rune('a'+i/26))))
	}
	if err := g.Watch(home, "more"); !errors.Is(err, tree.ENOSPC) {
		t.Fatal(err)
	}
	must(t, g.Unwatch(home, "aa"))
	must(t, g.Watch(home, "more"))
	w := s.dial(server.VTPM)
	if err := w.Watch(home, string(make([]byte, 0))); err != nil {
		t.Fatal(err)
	}
	if err := s.dial(builder).Watch(home, string(bytesOf('t', 1023))); !errors.Is(err, tree.E2BIG) {
		t.Fatal(err)
	}
}

func bytesOf(b byte, n int) []byte {
	s := make([]byte, n)
	for i := range s {
		s[i] = b
	}
	return s
}

// TestSpecialWatches: a guest's first connection introduces it and its last releases it; so do
// the requests. Guests are not told.
func TestSpecialWatches(t *testing.T) {
	s := start(t, state.Options{})
	w, nosy := s.dial(server.VTPM), s.dial(guest2)
	_, err := nosy.List("/") // its own introduction is over
	must(t, err)
	for _, c := range []*client.Client{w, nosy} {
		must(t, c.Watch("@introduceDomain", "in"))
		must(t, c.Watch("@releaseDomain", "out"))
		next(t, c)
		next(t, c)
	}
	expect := func(path string) {
		t.Helper()
		if e := next(t, w); e.Path != path {
			t.Fatalf("event %v, want %s", e, path)
		}
	}
	b := s.connect(builder)
	introduced := func(d string, want string) {
		t.Helper()
		if r := raw(t, b, wire.Message{Type: wire.IsDomainIntroduced, Payload: wire.Join(d)}); string(r.Payload) != want+"\x00" {
			t.Errorf("domain %s introduced: %q", d, r.Payload)
		}
	}
	introduced("16", "F")
	g := s.connect(guest)
	expect("@introduceDomain")
	introduced("16", "T")
	introduced("0", "T")
	g.Close()
	expect("@releaseDomain")
	introduced("16", "F")
	if r := raw(t, b, wire.Message{Type: wire.Introduce, Payload: wire.Join("40", "1", "2")}); string(r.Payload) != "OK\x00" {
		t.Fatalf("%q", r.Payload)
	}
	expect("@introduceDomain")
	introduced("40", "T")
	if r := raw(t, b, wire.Message{Type: wire.Release, Payload: wire.Join("40")}); string(r.Payload) != "OK\x00" {
		t.Fatalf("%q", r.Payload)
	}
	expect("@releaseDomain")
	fails(t, raw(t, b, wire.Message{Type: wire.Release, Payload: wire.Join("40")}), tree.ENOENT)
	// A released guest's connections end.
	g = s.connect(guest)
	expect("@introduceDomain")
	if r := raw(t, b, wire.Message{Type: wire.Release, Payload: wire.Join("16")}); string(r.Payload) != "OK\x00" {
		t.Fatalf("%q", r.Payload)
	}
	if _, err := wire.ReadMessage(g); !errors.Is(err, io.EOF) {
		t.Fatalf("the connection of a released guest: %v", err)
	}
	expect("@releaseDomain")
	// Only the Builder manages domains.
	g = s.connect(guest)
	for _, m := range []wire.Message{
		{Type: wire.Introduce, Payload: wire.Join("41", "1", "2")},
		{Type: wire.Release, Payload: wire.Join("17")},
		{Type: wire.SetTarget, Payload: wire.Join("16", "17")},
		{Type: wire.Resume, Payload: wire.Join("17")},
		{Type: wire.Control, Payload: wire.Join("check")},
		{Type: wire.SetPerms, Payload: wire.Join("@releaseDomain", "b16")},
	} {
		fails(t, raw(t, g, m), tree.EACCES)
	}
	// The nosy guest heard of nothing until it may.
	bc := s.dial(builder)
	must(t, bc.SetPerms("@releaseDomain", tree.Perm{Domain: builder}, tree.Perm{Domain: guest2, Access: tree.Read}))
	g.Close()
	if e := next(t, nosy); e.Path != "@releaseDomain" {
		t.Fatalf("event %v", e)
	}
	select {
	case e := <-nosy.Events():
		t.Fatalf("event %v", e)
	default:
	}
}

// TestLongDirectory: more names than fit into one reply arrive in parts.
func TestLongDirectory(t *testing.T) {
	s := start(t, state.Options{})
	b := s.dial(builder)
	const n = 700
	for i := range n {
		must(t, b.Mkdir(fmt.Sprintf("/long/%020d", i)))
	}
	names, err := b.List("/long")
	if err != nil || len(names) != n {
		t.Fatalf("%d names, %v", len(names), err)
	}
}

// TestNeverReading: a client that sends without ever reading is not read from for ever, and
// others are served meanwhile.
func TestNeverReading(t *testing.T) {
	s := start(t, state.Options{})
	home := s.home(guest)
	b := s.dial(builder)
	must(t, b.Write(home+"/big", string(bytesOf('x', 2048))))
	c := s.connect(guest)
	done := make(chan struct{})
	go func() {
		defer close(done)
		m := wire.Message{Type: wire.Read, Payload: wire.Join(home + "/big")}.Append(nil)
		for {
			if _, err := c.Write(m); err != nil {
				return
			}
		}
	}()
	for range 1000 {
		if _, err := b.Read(home); err != nil {
			t.Fatal(err)
		}
	}
	must(t, b.Remove(home))
	c.Close()
	<-done
}

// TestNeverReadingEvents: a guest that never reads what it watches is cut off, and nobody else
// notices.
func TestNeverReadingEvents(t *testing.T) {
	s := start(t, state.Options{})
	home := s.home(guest)
	b := s.dial(builder)
	c := s.connect(guest)
	if r := raw(t, c, wire.Message{Type: wire.Watch, Payload: wire.Join(home, string(bytesOf('t', 1000)))}); r.Type != wire.Watch {
		t.Fatalf("%q", r.Payload)
	}
	w := s.dial(server.VTPM)
	must(t, b.SetPerms(home, tree.Perm{Domain: guest}, tree.Perm{Domain: server.VTPM, Access: tree.Read}))
	must(t, w.Watch(home, "t"))
	for i := range 1500 {
		must(t, b.Write(fmt.Sprintf("%s/n%d", home, i), ""))
	}
	for {
		if _, err := wire.ReadMessage(c); err != nil {
			break // cut off, or this waits for ever
		}
	}
	next(t, w)
	if v, err := w.Read(home + "/n1499"); v != "" || err != nil {
		t.Fatalf("%q %v", v, err)
	}
}
