package backend_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/backend"
	"redoubt.dev/redoubt/vtpm/channel"
	"redoubt.dev/redoubt/vtpm/frontend"
)

// mortal is a world whose store can die and come again with its contents, as the Builder has it:
// it is no client, and those who are get new connections.
type mortal struct {
	*world
	contents *tree.Tree
	store    *state.State
	accept   chan state.Client
	end      func()
	vtpm     *client.Lasting
	guest    *client.Lasting
}

func newMortal(t *testing.T, opt backend.Options) *mortal {
	t.Helper()
	m := &mortal{world: &world{t: t, tpm: &fakeTPM{dead: make(chan struct{}), err: errors.New("killed"), seen: make(chan []byte, 16)}}}
	m.contents, m.end = tree.New(server.ReservedNames()...), func() {}
	m.rise()
	m.vtpm, m.guest = client.NewLasting(m.connection(server.VTPM)), client.NewLasting(m.connection(guest))
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	m.hub = backend.NewHub(m.vtpm, quiet)
	wg.Go(func() { _ = m.hub.Run(ctx) })
	m.must(m.store.Introduce(guest, []state.Node{
		{Path: server.FrontPath(guest), Perms: []tree.Perm{{Domain: guest}, {Domain: server.VTPM, Access: tree.Read}}},
		{Path: server.FrontPath(guest) + "/state", Value: "3"},
		{Path: server.BackPath(guest), Perms: []tree.Perm{{Domain: server.VTPM}}},
		{Path: server.BackPath(guest) + "/instance"},
	}))
	a, b, err := ipc.Pipe()
	m.must(err)
	opt.Domain, opt.Channel, opt.Report = guest, channel.New(a), func(string) {}
	m.back, err = m.hub.Attach(ctx, opt)
	m.must(err)
	m.fe = frontend.New(channel.New(b), frontend.Options{Guest: m.world})
	t.Cleanup(func() {
		m.vtpm.Last() // nobody waits for a store that does not come again
		m.fe.Close()
		m.back.Close()
		cancel()
		m.vtpm.Close()
		m.guest.Close()
		wg.Wait()
		m.end()
	})
	return m
}

// rise begins another store, after the end of the last one.
func (m *mortal) rise() {
	m.end()
	ctx, cancel := context.WithCancel(context.Background())
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	accept := make(chan state.Client)
	s := state.New(quiet, state.Options{Tree: m.contents})
	var wg sync.WaitGroup
	wg.Go(func() { s.Run(ctx, accept) })
	m.store, m.accept = s, accept
	m.end = sync.OnceFunc(func() { cancel(); wg.Wait() })
}

func (m *mortal) connection(d tree.Domain) net.Conn {
	m.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	m.must(err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "store")
		ends[i], err = net.FileConn(f)
		m.must(err)
		f.Close()
	}
	m.accept <- state.Client{Conn: ends[0], Domain: d}
	return ends[1]
}

// die ends the store, starts another, and gives those who had connections new ones.
func (m *mortal) die() {
	m.t.Helper()
	m.rise()
	m.must(m.guest.Renew(m.connection(guest)))
	m.must(m.vtpm.Renew(m.connection(server.VTPM)))
}

// TestEveryOrderOverDeaths: in each order of the four facts, the store dies before every step, and
// in a second run while what the step brings about is under way. The command waits until the last
// and is then answered.
func TestEveryOrderOverDeaths(t *testing.T) {
	var orders func(left, chosen []int)
	orders = func(left, chosen []int) {
		for i := range left {
			rest := append(append([]int(nil), left[:i]...), left[i+1:]...)
			orders(rest, append(chosen[:len(chosen):len(chosen)], left[i]))
		}
		if len(left) > 0 {
			return
		}
		for _, beside := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/beside=%t", strings.Trim(fmt.Sprint(chosen), "[]"), beside), func(t *testing.T) {
				overDeaths(t, chosen, beside)
			})
		}
	}
	orders([]int{0, 1, 2, 3}, nil)
}

func overDeaths(t *testing.T, order []int, beside bool) {
	m := newMortal(t, backend.Options{})
	out := m.execute()
	for _, i := range order {
		select {
		case err := <-out:
			t.Fatalf("answered before step %d: %v", i, err)
		default:
		}
		if !beside || i == 1 { // the Builder itself makes its call again
			m.die()
		}
		done := make(chan error, 1)
		go func() {
			done <- []func() error{
				func() error { return m.guest.Write(server.FrontPath(guest)+"/state", "4") },
				func() error {
					return m.store.Set([]state.Node{{Path: server.BackPath(guest) + "/instance", Value: fmt.Sprint(number)}})
				},
				func() error { return m.vtpm.Write(server.ReadyNode(number), "1") },
				func() error { m.back.EngineUp(number, m.tpm, []byte("log")); return nil },
			}[i]()
		}()
		if beside && i != 1 {
			m.die()
		}
		m.must(<-done)
	}
	if beside {
		m.die()
	}
	if err := await(t, out); err != nil {
		t.Fatal(err)
	}
	if v, err := m.vtpm.Read(server.BackPath(guest) + "/state"); v != "9" {
		t.Fatalf("back end's state %q %v", v, err)
	}
}

// TestStoreLostForGood: a guest that waits when the store is lost is failed closed, and one that
// is attached afterwards, too.
func TestStoreLostForGood(t *testing.T) {
	m := newMortal(t, backend.Options{})
	out := m.execute()
	m.vtpm.Last()
	m.end()
	var failed *frontend.FailedError
	if err := await(t, out); !errors.As(err, &failed) {
		t.Fatalf("%v", err)
	}
	a, b, err := ipc.Pipe()
	m.must(err)
	late, err := m.hub.Attach(t.Context(), backend.Options{Domain: guest + 1, Channel: channel.New(a), Report: func(string) {}})
	m.must(err)
	defer late.Close()
	fe := frontend.New(channel.New(b), frontend.Options{Guest: m.world})
	defer fe.Close()
	<-fe.Done()
	if err := fe.Err(); !errors.As(err, &failed) {
		t.Fatalf("attached afterwards: %v", err)
	}
}
