package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

// mortal is a store that can die and come again with its contents.
type mortal struct {
	t      *testing.T
	tree   *tree.Tree
	accept chan state.Client
	end    func()
}

func newMortal(t *testing.T) *mortal {
	m := &mortal{t: t, tree: tree.New(server.ReservedNames()...), end: func() {}}
	m.rise()
	t.Cleanup(func() { m.end() })
	return m
}

// rise begins another store, after the end of the last one.
func (m *mortal) rise() {
	m.end()
	ctx, cancel := context.WithCancel(context.Background())
	accept := make(chan state.Client)
	var wg sync.WaitGroup
	wg.Go(func() {
		state.New(slog.New(slog.NewTextHandler(io.Discard, nil)), state.Options{Tree: m.tree}).Run(ctx, accept)
	})
	m.accept = accept
	m.end = sync.OnceFunc(func() { cancel(); wg.Wait() })
}

// pair is a connection: the store's end and the client's.
func (m *mortal) pair() (net.Conn, net.Conn) {
	m.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(m.t, err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "store")
		ends[i], err = net.FileConn(f)
		must(m.t, err)
		f.Close()
	}
	return ends[0], ends[1]
}

func (m *mortal) dial() net.Conn {
	m.t.Helper()
	theirs, ours := m.pair()
	m.accept <- state.Client{Conn: theirs, Domain: server.Builder}
	return ours
}

func lasting(t *testing.T, m *mortal) *client.Lasting {
	l := client.NewLasting(m.dial())
	t.Cleanup(l.Close)
	return l
}

func event(t *testing.T, l *client.Lasting, want client.Event) {
	t.Helper()
	select {
	case e, ok := <-l.Events():
		if !ok || e != want {
			t.Fatalf("event %v (%v), want %v", e, ok, want)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("no event %v", want)
	}
}

// TestLastingOutlivesDeaths: what is asked for while there is no store is done by the next one,
// and a watch tells of what happened meanwhile.
func TestLastingOutlivesDeaths(t *testing.T) {
	m := newMortal(t)
	l := lasting(t, m)
	must(t, l.Watch("/a", "t"))
	event(t, l, client.Event{Path: "/a", Token: "t"})
	if err := l.Watch("/a", "t"); !errors.Is(err, tree.EEXIST) {
		t.Errorf("twice: %v", err)
	}
	must(t, l.Watch("/gone", "g"))
	event(t, l, client.Event{Path: "/gone", Token: "g"})
	for round := range 3 {
		m.end()
		done := make(chan error, 3)
		value := strconv.Itoa(round)
		go func() { done <- l.Write("/mine", value) }()
		go func() { done <- l.Remove("/never/was") }()
		go func() { done <- l.Watch("/b"+value, "b") }()
		m.rise()
		other := client.New(m.dial())
		must(t, other.Write("/a", value)) // before l is there again
		must(t, l.Renew(m.dial()))
		var removed int
		for range 3 {
			switch err := <-done; {
			case errors.Is(err, tree.ENOENT):
				removed++
			case err != nil:
				t.Fatal(err)
			}
		}
		if removed > 1 {
			t.Fatal("more than the removal failed")
		}
		seen := map[client.Event]bool{}
		for want := (client.Event{Path: "/a", Token: "t"}); !seen[want]; {
			select {
			case e := <-l.Events():
				seen[e] = true
			case <-time.After(20 * time.Second):
				t.Fatalf("the watch did not fire; seen %v", seen)
			}
		}
		if v, err := l.Read("/a"); v != value || err != nil {
			t.Fatalf("%q %v", v, err)
		}
		if v, err := other.Read("/mine"); v != value || err != nil {
			t.Fatalf("%q %v", v, err)
		}
		other.Close()
	}
	must(t, l.Unwatch("/gone", "g"))
	if err := l.Unwatch("/gone", "g"); !errors.Is(err, tree.ENOENT) {
		t.Errorf("no such watch: %v", err)
	}
}

// TestLastingRenewFails: a connection that is dead before its watches are set is no connection,
// and the next one is.
func TestLastingRenewFails(t *testing.T) {
	m := newMortal(t)
	l := lasting(t, m)
	must(t, l.Watch("/a", "t"))
	m.end()
	for range 3 {
		theirs, ours := m.pair()
		theirs.Close()
		if err := l.Renew(ours); !errors.Is(err, client.ErrClosed) {
			t.Fatalf("a dead connection: %v", err)
		}
	}
	m.rise()
	must(t, l.Renew(m.dial()))
	must(t, l.Write("/a", "1"))
}

// TestLastingEnds: Close and Last end what waits, also inside Renew.
func TestLastingEnds(t *testing.T) {
	t.Run("close", func(t *testing.T) {
		m := newMortal(t)
		l := lasting(t, m)
		must(t, l.Watch("/a", "t"))
		m.end()
		done, renewed := make(chan error, 1), make(chan error, 1)
		go func() { done <- l.Write("/a", "1") }()
		deaf, ours := m.pair() // takes the request and never answers
		defer deaf.Close()
		go func() { renewed <- l.Renew(ours) }()
		_, err := deaf.Read(make([]byte, 1))
		must(t, err)
		l.Close()
		for _, c := range []chan error{done, renewed} {
			if err := <-c; !errors.Is(err, client.ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
		}
		_, late := m.pair()
		if err := l.Renew(late); !errors.Is(err, client.ErrClosed) {
			t.Errorf("Renew after Close: %v", err)
		}
		for range l.Events() { // ends
		}
	})
	t.Run("last", func(t *testing.T) {
		m := newMortal(t)
		l := lasting(t, m)
		l.Last()
		must(t, l.Write("/a", "1"))
		m.end()
		if err := l.Write("/a", "2"); !errors.Is(err, client.ErrClosed) {
			t.Errorf("after the last connection's end: %v", err)
		}
		for range l.Events() {
		}
	})
	t.Run("last-while-waiting", func(t *testing.T) {
		m := newMortal(t)
		l := lasting(t, m)
		m.end()
		done := make(chan error, 1)
		go func() { done <- l.Write("/a", "2") }()
		l.Last()
		if err := <-done; !errors.Is(err, client.ErrClosed) {
			t.Errorf("%v", err)
		}
	})
}

// TestLastingUnderFire: the store dies again and again while many write, watch and unwatch. All
// that succeeded holds in the end: each value is there, each watch that was kept fires, and no
// other does.
func TestLastingUnderFire(t *testing.T) {
	m := newMortal(t)
	l := lasting(t, m)
	var seen sync.Map
	var reader, writers sync.WaitGroup
	marker := make(chan struct{})
	reader.Go(func() {
		for e := range l.Events() {
			if e.Token == "marker" && e.Path == "/marker/end" {
				close(marker)
				return
			}
			seen.Store(e, true)
		}
	})
	defer reader.Wait()
	defer l.Close()
	const n, rounds = 6, 40
	did := make(chan struct{}, 1)
	for i := range n {
		writers.Go(func() {
			for r := range rounds {
				p := fmt.Sprintf("/w/%d/%d", i, r)
				for _, op := range []func() error{
					func() error { return l.Watch(p, "keep") }, func() error { return l.Watch(p, "drop") },
					func() error { return l.Write(p, "1") }, func() error { return l.Unwatch(p, "drop") },
				} {
					if err := op(); err != nil {
						t.Error(err)
						return
					}
					select {
					case did <- struct{}{}:
					default:
					}
				}
			}
		})
	}
	stop := make(chan struct{})
	var killer sync.WaitGroup
	killer.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-did: // something was done since the last death
			}
			m.rise()
			if err := l.Renew(m.dial()); err != nil {
				t.Error(err)
				return
			}
		}
	})
	writers.Wait()
	close(stop)
	killer.Wait()
	seen.Clear()
	// From here on only what is kept may fire.
	m.rise()
	must(t, l.Renew(m.dial()))
	must(t, l.Watch("/marker", "marker"))
	must(t, l.Write("/marker/end", "1"))
	select {
	case <-marker:
	case <-time.After(20 * time.Second):
		t.Fatal("no marker")
	}
	for i := range n {
		for r := range rounds {
			p := fmt.Sprintf("/w/%d/%d", i, r)
			if _, ok := seen.Load(client.Event{Path: p, Token: "keep"}); !ok {
				t.Fatalf("%s: the watch did not fire", p)
			}
			if v, err := l.Read(p); v != "1" || err != nil {
				t.Fatalf("%s: %q %v", p, v, err)
			}
		}
	}
}
