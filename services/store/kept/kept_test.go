package kept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/store"
	"redoubt.dev/redoubt/services/storm"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/disk"
	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

const stateProgram = "redoubt-store-state"

// TestMain makes the test binary the store's programs, too: links of those names lie beside it,
// where package process looks for them.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case stateProgram:
		process.Main(stateProgram, store.Serve)
	case store.LogicProgram:
		if logic.Serve(3) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	for _, name := range []string{stateProgram, store.LogicProgram} {
		if err := os.Symlink(self, filepath.Join(filepath.Dir(self), name)); err != nil && !errors.Is(err, os.ErrExist) {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// shop is a store as the Builder keeps it.
type shop struct {
	*Store
	t    *testing.T
	dir  string
	lost chan error
	proc atomic.Pointer[process.Process] // there is, or that is being started
}

func openShop(t *testing.T) *shop { return openShopOf(t, 0) }

func openShopOf(t *testing.T, deaths int) *shop {
	t.Helper()
	dir, err := os.MkdirTemp("", "store") // a socket's name is short
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return reopen(t, dir, deaths)
}

// reopen is a Store with processes outside any sandbox: the test binary is their program.
func reopen(t *testing.T, dir string, deaths int) *shop {
	t.Helper()
	s := &shop{t: t, dir: dir, lost: make(chan error, 1)}
	var err error
	s.Store, err = Open(t.Context(), Options{
		RunDir: dir, Seen: filepath.Join(dir, services.StoreDir), Log: slog.New(slog.DiscardHandler), Deaths: deaths,
		Start: func(string) (keeper.Process, error) {
			p, err := process.Start(process.Options{Program: stateProgram, LogDir: dir})
			if err == nil {
				s.proc.Store(p)
			}
			return p, err
		},
		Worker: func() (*process.Process, error) {
			return process.Start(process.Options{Program: store.LogicProgram, LogDir: dir})
		},
		Guests: func() []string { return nil },
		Lost:   func(err error) { s.lost <- err },
	})
	must(t, err)
	t.Cleanup(func() { s.Close(20 * time.Second) })
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// killed ends the service and waits until it is gone.
func (s *shop) killed() {
	p := s.proc.Load()
	p.Kill()
	<-p.Done()
}

// next waits for a service after that of a number.
func (s *shop) next(ctx context.Context, number uint64) error {
	for {
		i, err := s.keeper.Current(ctx)
		if err != nil || i.Number != number {
			return err
		}
		<-i.Done() // killed, and not yet seen to be gone
		if err := s.call(ctx, "nothing", struct{}{}); err == nil {
			return errors.New("a store answers nonsense")
		}
	}
}

// user is a service with a connection to the store, at the other end of a control connection.
type user struct {
	*client.Lasting
	calls atomic.Int32
}

func (s *shop) user(d tree.Domain, fail func(error)) *user {
	s.t.Helper()
	f, number, err := s.Connect(s.t.Context(), d)
	must(s.t, err)
	c, err := net.FileConn(f)
	f.Close()
	must(s.t, err)
	k := &user{Lasting: client.NewLasting(c)}
	s.t.Cleanup(k.Close)
	s.Hold(d, number, s.serve(func(r *rpc.Request) error {
		k.calls.Add(1)
		if r.Method == protocol.NoticeStoreLost {
			k.Last()
			return nil
		}
		defer r.Files[0].Close()
		c, err := net.FileConn(r.Files[0])
		if err != nil {
			return err
		}
		return k.Renew(c)
	}), func(err error) { fail(err); k.Last() })
	return k
}

// serve is a service that answers calls with f.
func (s *shop) serve(f func(*rpc.Request) error) *rpc.Peer {
	s.t.Helper()
	a, b, err := ipc.Pipe()
	must(s.t, err)
	ours := rpc.New(a, nil)
	theirs := rpc.New(b, func(_ context.Context, r *rpc.Request) (any, error) { return struct{}{}, f(r) })
	var wg sync.WaitGroup
	wg.Go(func() { _ = ours.Run(context.Background()) })
	wg.Go(func() { _ = theirs.Run(context.Background()) })
	s.t.Cleanup(func() { ours.Close(); theirs.Close(); wg.Wait() })
	return ours
}

// TestStoreDiesAtAnyMoment: the store is killed at random moments while domains come and go and
// services use it. Every call succeeds, and what it did is there.
func TestStoreDiesAtAnyMoment(t *testing.T) {
	s := openShopOf(t, 1<<30)
	vtpm := s.user(server.VTPM, func(err error) { t.Error(err) })
	must(t, vtpm.Watch("/local/domain", ""))
	go func() {
		for range vtpm.Events() { // looked at in package client
		}
	}()
	must(t, s.Layout(t.Context()))
	round := func(i int) {
		d := server.FirstGuest + tree.Domain(i)
		must(t, s.Announce(t.Context(), d))
		front := s.user(d, func(err error) { t.Error(err) })
		must(t, s.Set(t.Context(), []state.Node{{Path: server.BackPath(d) + "/instance", Value: fmt.Sprint(i + 1)}}))
		must(t, front.Write(server.FrontPath(d)+"/state", "4"))
		must(t, vtpm.Write(server.ReadyNode(i+1), "1"))
		for p, want := range map[string]string{
			server.FrontPath(d) + "/state": "4", server.FrontPath(d) + "/backend": server.BackPath(d),
			server.BackPath(d) + "/instance": fmt.Sprint(i + 1), server.ReadyNode(i + 1): "1",
		} {
			if v, err := vtpm.Read(p); v != want || err != nil {
				t.Fatalf("round %d: %s is %q, %v; want %q", i, p, v, err, want)
			}
		}
		if err := front.Write(server.ReadyNode(i+1), "forged"); !errors.Is(err, tree.EACCES) {
			t.Fatalf("round %d: the guest's identity writes the ready node: %v", i, err)
		}
		must(t, vtpm.Remove(server.ReadyNode(i+1)))
		s.Forget(d)
		if _, err := vtpm.Read(server.BackPath(d) + "/instance"); !errors.Is(err, tree.ENOENT) {
			t.Fatalf("round %d: forgotten and still there: %v", i, err)
		}
		front.Close()
	}
	// How fast this machine is says how often a store can die and something still be done.
	begun := time.Now()
	round(0)
	took := time.Since(begun)
	stop := make(chan struct{})
	var killer sync.WaitGroup
	kills := 0
	killer.Go(func() {
		for {
			number := s.at()
			select {
			case <-stop:
				return
			case <-time.After(rand.N(took)):
			}
			s.proc.Load().Kill()
			kills++
			if rand.IntN(4) > 0 { // else the next one may be killed while it starts
				if err := s.next(context.Background(), number); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	for i := range rounds {
		round(i + 1)
	}
	close(stop)
	killer.Wait()
	t.Logf("%d kills", kills)
	select {
	case err := <-s.lost:
		t.Fatal(err)
	default:
	}
}

// TestStoreClients: those of the socket with a name see their connection end, as with any
// xenstored that is started again, and connect anew at once.
func TestStoreClients(t *testing.T) {
	s := openShop(t)
	dial := func() *client.Client {
		c, err := net.Dial("unix", filepath.Join(s.dir, services.StoreSocket))
		must(t, err)
		cl := client.New(c)
		t.Cleanup(func() { cl.Close() })
		return cl
	}
	c := dial()
	must(t, c.Write("/kept", "1"))
	s.killed()
	if _, err := c.Read("/kept"); !errors.Is(err, client.ErrClosed) {
		t.Fatalf("a connection outlived the store: %v", err)
	}
	if v, err := dial().Read("/kept"); v != "1" || err != nil {
		t.Fatalf("%q %v", v, err)
	}
}

// TestStoreHoldersDoNotHinderEachOther: one that hangs and one that refuses get no connection,
// and the others do; the one that refuses is told of. The one whose end is known is left alone.
func TestStoreHoldersDoNotHinderEachOther(t *testing.T) {
	s := openShop(t)
	hang := make(chan struct{})
	asked := make(chan struct{}, 1)
	s.Hold(16, 1, s.serve(func(*rpc.Request) error {
		asked <- struct{}{}
		<-hang
		return nil
	}), func(err error) { t.Errorf("the one that hangs: %v", err) })
	t.Cleanup(func() { close(hang) })
	refused := make(chan error, 1)
	s.Hold(17, 1, s.serve(func(*rpc.Request) error { return errors.New("no") }), func(err error) { refused <- err })
	gone := s.user(18, func(err error) { t.Errorf("the one that is gone: %v", err) })
	s.drop(18)
	k := s.user(19, func(err error) { t.Error(err) })
	s.killed()
	if _, err := k.Read("/"); err != nil {
		t.Fatal(err)
	}
	<-asked
	if err := <-refused; !strings.Contains(err.Error(), "no") {
		t.Errorf("the one that refuses: %v", err)
	}
	if n := gone.calls.Load(); n != 0 {
		t.Errorf("the one that is gone was called %d times", n)
	}
}

// TestStoreLost: a store that dies again and again, and one whose contents are damaged when it is
// started again, end the Builder with the reason; nobody waits for them.
func TestStoreLost(t *testing.T) {
	check := func(t *testing.T, s *shop, vtpm *user, want string) {
		t.Helper()
		err := <-s.lost
		if !strings.Contains(err.Error(), want) {
			t.Errorf("lost: %v, want %q", err, want)
		}
		if err := s.Set(t.Context(), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a call afterwards: %v", err)
		}
		if _, err := vtpm.Read("/"); !errors.Is(err, client.ErrClosed) {
			t.Errorf("the vTPM service waits for ever: %v", err)
		}
		for range vtpm.Events() { // ends: guests that wait fail closed
		}
	}
	t.Run("storm", func(t *testing.T) {
		s := openShop(t)
		vtpm := s.user(server.VTPM, func(error) {})
		for range storm.MaxDeaths + 1 {
			number := s.at()
			s.killed()
			if err := s.next(t.Context(), number); err != nil {
				break
			}
		}
		check(t, s, vtpm, "again and again")
	})
	t.Run("damaged", func(t *testing.T) {
		s := openShop(t)
		vtpm := s.user(server.VTPM, func(error) {})
		path := filepath.Join(s.dir, services.StoreDir, disk.File)
		must(t, os.WriteFile(path, []byte("something else"), 0o600))
		s.killed()
		check(t, s, vtpm, disk.File)
		if b, err := os.ReadFile(path); err != nil || string(b) != "something else" {
			t.Errorf("damaged contents were changed: %q %v", b, err)
		}
	})
}

// at is the number of the service that was there last.
func (s *shop) at() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.number
}

// TestStoreBegins: contents of another Builder are not taken over.
func TestStoreBegins(t *testing.T) {
	s := openShop(t)
	must(t, s.Set(t.Context(), []state.Node{{Path: "/old", Value: "1"}}))
	must(t, s.Release(t.Context(), server.FirstGuest, []string{"/old"}))
	must(t, s.Set(t.Context(), []state.Node{{Path: "/old", Value: "1"}}))
	s.Close(20 * time.Second)
	again := reopen(t, s.dir, 0)
	if _, err := again.user(server.Builder, func(error) {}).Read("/old"); !errors.Is(err, tree.ENOENT) {
		t.Errorf("%v", err)
	}
}
