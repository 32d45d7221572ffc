package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
)

// start runs a store and returns how to connect to it.
func start(t *testing.T) func(d tree.Domain) (*client.Client, net.Conn) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	accept := make(chan server.Client)
	var wg sync.WaitGroup
	wg.Go(func() {
		server.New(slog.New(slog.NewTextHandler(io.Discard, nil)), server.ReservedNames()...).Run(ctx, accept)
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return func(d tree.Domain) (*client.Client, net.Conn) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var ends [2]net.Conn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "store")
			if ends[i], err = net.FileConn(f); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		accept <- server.Client{Conn: ends[0], Domain: d}
		c := client.New(ends[1])
		t.Cleanup(func() { c.Close() })
		return c, ends[1]
	}
}

func next(t *testing.T, c *client.Client) client.Event {
	t.Helper()
	select {
	case e, ok := <-c.Events():
		if !ok {
			t.Fatal("connection ended")
		}
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no event")
	}
	return client.Event{}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestWatch: a watch fires once when set, then on changes at, beneath and, when a subtree is
// removed, above its path.
func TestWatch(t *testing.T) {
	dial := start(t)
	b, _ := dial(server.Builder)
	w, _ := dial(server.Builder)
	must(t, w.Watch("/a/b", "tok"))
	if e := next(t, w); e != (client.Event{Path: "/a/b", Token: "tok"}) {
		t.Fatalf("first event %v", e)
	}
	must(t, b.Write("/a/b/c", "1"))
	if e := next(t, w); e.Path != "/a/b/c" {
		t.Fatalf("beneath: %v", e)
	}
	must(t, b.Write("/a/x", "1"))
	must(t, b.Remove("/a"))
	if e := next(t, w); e.Path != "/a/b" {
		t.Fatalf("removal above: %v", e)
	}
	must(t, w.Unwatch("/a/b", "tok"))
	if err := w.Unwatch("/a/b", "tok"); !errors.Is(err, tree.ENOENT) {
		t.Fatalf("second unwatch: %v", err)
	}
}

// TestReadyNodeCannotBeForged: neither a guest nor the Builder creates a ready node.
func TestReadyNodeCannotBeForged(t *testing.T) {
	dial := start(t)
	for _, d := range []tree.Domain{server.Builder, server.Toolstack, server.FirstGuest} {
		c, _ := dial(d)
		if err := c.Write(server.ReadyNode(1), "1"); !errors.Is(err, tree.EACCES) {
			t.Errorf("domain %d: %v", d, err)
		}
	}
	m, _ := dial(server.VTPM)
	must(t, m.Write(server.ReadyNode(1), "1"))
}

// TestGuestSeesOnlyItsOwn: a guest's watch on the whole store tells nothing of others.
func TestGuestSeesOnlyItsOwn(t *testing.T) {
	dial := start(t)
	b, _ := dial(server.Builder)
	const g, other = server.FirstGuest, server.FirstGuest + 1
	for _, d := range []tree.Domain{g, other} {
		must(t, b.Mkdir(server.FrontPath(d)))
		must(t, b.SetPerms(server.DomainPath(d), tree.Perm{Domain: server.Builder, Access: tree.None}))
		must(t, b.SetPerms(server.FrontPath(d), tree.Perm{Domain: d, Access: tree.None}))
	}
	c, _ := dial(g)
	must(t, c.Watch("/local", "all"))
	next(t, c)
	must(t, b.Write(server.FrontPath(other)+"/secret", "x"))
	must(t, c.Write(server.FrontPath(g)+"/state", "4"))
	if e := next(t, c); e.Path != server.FrontPath(g)+"/state" {
		t.Fatalf("a guest learns of %v", e)
	}
}

// TestFloodHurtsOnlyItself: a guest that writes in a loop and never reads its events is cut
// off; a service that watches it goes on.
func TestFloodHurtsOnlyItself(t *testing.T) {
	dial := start(t)
	b, _ := dial(server.Builder)
	const g = server.FirstGuest
	must(t, b.Mkdir(server.FrontPath(g)))
	must(t, b.SetPerms(server.FrontPath(g), tree.Perm{Domain: g, Access: tree.None}))
	w, _ := dial(server.VTPM)
	must(t, b.SetPerms(server.FrontPath(g), tree.Perm{Domain: g, Access: tree.None}, tree.Perm{Domain: server.VTPM, Access: tree.Read}))
	must(t, w.Watch(server.FrontPath(g), "front"))
	c, _ := dial(g)
	for i := range 900 {
		must(t, c.Write(fmt.Sprintf("%s/n%d", server.FrontPath(g), i), "x"))
	}
	for range 3000 {
		must(t, c.Write(server.FrontPath(g)+"/state", "4"))
	}
	next(t, w)
	if v, err := w.Read(server.FrontPath(g) + "/state"); v != "4" {
		t.Fatalf("the watcher lost its connection: %q %v", v, err)
	}
}
