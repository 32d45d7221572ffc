package state_test

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// once runs one bad answer per token that arms it; else it is a worker as any.
func once(bad *atomic.Int64, answer func(fd int, seq uint64, r logic.Request)) func(fd int) error {
	return func(fd int) error {
		in := make([]byte, logic.MaxMessage)
		for {
			n, err := unix.Read(fd, in)
			if err != nil || n == 0 {
				return err
			}
			seq, r, err := logic.ParseRequest(in[:n])
			if err != nil {
				return err
			}
			if bad.Load() > 0 && bad.Add(-1) >= 0 {
				answer(fd, seq, r)
				return nil
			}
			if _, err := unix.Write(fd, logic.AppendAnswer(nil, seq, logic.Decide(r))); err != nil {
				return err
			}
		}
	}
}

// TestBadWorkers: a worker that dies, says nothing, or answers what cannot be costs the one
// request, which changes nothing; the client and all others go on.
func TestBadWorkers(t *testing.T) {
	send := func(fd int, b []byte) { _, _ = unix.Write(fd, b) }
	says := func(f func(a *logic.Action)) func(fd int, seq uint64, r logic.Request) {
		return func(fd int, seq uint64, r logic.Request) {
			a := logic.Decide(r)
			f(&a)
			send(fd, logic.AppendAnswer(nil, seq, a))
		}
	}
	for name, answer := range map[string]func(fd int, seq uint64, r logic.Request){
		"dies":  func(int, uint64, logic.Request) {},
		"hangs": func(fd int, _ uint64, _ logic.Request) { _, _ = unix.Read(fd, make([]byte, 1)) },
		"half": func(fd int, seq uint64, r logic.Request) {
			b := logic.AppendAnswer(nil, seq, logic.Decide(r))
			send(fd, b[:len(b)-1])
		},
		"more": func(fd int, seq uint64, r logic.Request) {
			send(fd, append(logic.AppendAnswer(nil, seq, logic.Decide(r)), 0))
		},
		"garbage":       func(fd int, _ uint64, _ logic.Request) { send(fd, bytesOf(0xff, 200)) },
		"huge":          func(fd int, _ uint64, _ logic.Request) { send(fd, make([]byte, logic.MaxMessage+1)) },
		"another's":     func(fd int, seq uint64, r logic.Request) { send(fd, logic.AppendAnswer(nil, seq+1, logic.Decide(r))) },
		"no path":       says(func(a *logic.Action) { a.Path = "" }),
		"a bad path":    says(func(a *logic.Action) { a.Path = "/a//b" }),
		"too much":      says(func(a *logic.Action) { a.Value = make([]byte, 8000) }),
		"a stray field": says(func(a *logic.Action) { a.Commit = true }),
		"a made error":  says(func(a *logic.Action) { *a = logic.Action{Errno: "EWHATEVER"} }),
		"a descriptor": func(fd int, seq uint64, r logic.Request) {
			b := logic.AppendAnswer(nil, seq, logic.Decide(r))
			_ = unix.Sendmsg(fd, b, unix.UnixRights(fd), nil, 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var bad atomic.Int64
			timeout := time.Minute
			if name == "hangs" {
				timeout = 50 * time.Millisecond
			}
			s := start(t, state.Options{Workers: behaving(t, once(&bad, answer)), Reset: 3, Timeout: timeout})
			c, other := s.dial(builder), s.dial(server.VTPM)
			must(t, c.Write("/a", "before"))
			for range 6 { // more than there are workers
				bad.Store(1)
				if err := c.Write("/a", "lost"); !errors.Is(err, tree.EIO) {
					t.Fatalf("the request of the bad worker: %v", err)
				}
				if v, err := other.Read("/a"); v != "before" || err != nil {
					t.Fatalf("%q %v", v, err)
				}
			}
			must(t, c.Write("/a", "after"))
		})
	}
}

// TestHungWorkersHoldUpOneGuest: while every request of a guest hangs its worker, over many
// connections, others are served.
func TestHungWorkersHoldUpOneGuest(t *testing.T) {
	hang := func(fd int) error {
		in := make([]byte, logic.MaxMessage)
		for {
			n, err := unix.Read(fd, in)
			if err != nil || n == 0 {
				return err
			}
			seq, r, err := logic.ParseRequest(in[:n])
			if err != nil {
				return err
			}
			if r.Domain == guest {
				continue // says nothing, for ever
			}
			if _, err := unix.Write(fd, logic.AppendAnswer(nil, seq, logic.Decide(r))); err != nil {
				return err
			}
		}
	}
	s := start(t, state.Options{Workers: behaving(t, hang), Timeout: time.Hour, Size: 3})
	m := wire.Message{Type: wire.Read, Payload: wire.Join("/")}.Append(nil)
	for range 20 {
		_, err := s.connect(guest).Write(m)
		must(t, err)
	}
	c := s.dial(guest2)
	for range 100 {
		if _, err := c.Read("/"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTakenOver: a worker that a guest's request has taken over, and that answers whatever it
// likes, gets that guest nothing that it may not have anyway.
func TestTakenOver(t *testing.T) {
	for name, f := range map[string]func(a *logic.Action){
		"writes the ready node":    func(a *logic.Action) { a.Path = server.ReadyNode(1) },
		"writes another's node":    func(a *logic.Action) { a.Path = server.DomainPath(guest2) + "/state" },
		"writes in the root":       func(a *logic.Action) { a.Path = "/x" },
		"writes more than it may":  func(a *logic.Action) { a.Value = make([]byte, 3000) },
		"writes as another domain": func(a *logic.Action) { a.Path, a.Relative = server.DomainPath(guest2)+"/x", true },
	} {
		t.Run(name, func(t *testing.T) {
			taken := func(fd int) error {
				in := make([]byte, logic.MaxMessage)
				for {
					n, err := unix.Read(fd, in)
					if err != nil || n == 0 {
						return err
					}
					seq, r, err := logic.ParseRequest(in[:n])
					if err != nil {
						return err
					}
					a := logic.Decide(r)
					if r.Domain == guest {
						f(&a)
					}
					if _, err := unix.Write(fd, logic.AppendAnswer(nil, seq, a)); err != nil {
						return err
					}
				}
			}
			contents := tree.New(server.ReservedNames()...)
			s := start(t, state.Options{Tree: contents, Workers: behaving(t, taken)})
			home := s.home(guest)
			s.home(guest2)
			before := all(contents)
			if err := s.dial(guest).Write(home+"/state", "4"); err == nil {
				t.Error("it was done")
			}
			if after := all(contents); after != before {
				t.Errorf("contents changed from %s to %s", before, after)
			}
		})
	}
}

func all(t *tree.Tree) (s string) {
	for c := range t.All {
		s += c.Path + "=" + string(c.Value) + " "
	}
	return s
}

// TestReset: a worker is replaced after as many responses as the policy says.
func TestReset(t *testing.T) {
	for reset, want := range map[state.Reset]int{state.ResetEach: 30, 10: 3, state.ResetOff: 0} {
		var retired atomic.Int64
		var all sync.WaitGroup
		inner := inProcess(t)
		workers := state.WorkersFunc(func(ctx context.Context) (*state.Worker, error) {
			w, err := inner.Start(ctx)
			if err == nil {
				w.Kill = func() { retired.Add(1) }
			}
			return w, err
		})
		s := start(t, state.Options{Workers: workers, Reset: reset, Size: 1})
		c := s.dial(builder)
		for range 30 {
			if _, err := c.Read("/"); err != nil {
				t.Fatal(err)
			}
		}
		if got := int(retired.Load()); got != want {
			t.Errorf("reset %d: %d workers retired after 30 responses, want %d", reset, got, want)
		}
		all.Wait()
	}
}

// TestNoWorkers: while none can be started requests fail, and when one can again they do not.
func TestNoWorkers(t *testing.T) {
	var broken atomic.Bool
	inner := inProcess(t)
	workers := state.WorkersFunc(func(ctx context.Context) (*state.Worker, error) {
		if broken.Load() {
			return nil, os.ErrPermission
		}
		return inner.Start(ctx)
	})
	broken.Store(true)
	s := start(t, state.Options{Workers: workers})
	c := s.dial(builder)
	for range 20 {
		if err := c.Write("/a", "1"); !errors.Is(err, tree.EIO) {
			t.Fatal(err)
		}
	}
	broken.Store(false)
	must(t, c.Write("/a", "2"))
}

// TestWatchEventsOfTransactions: nothing is told before the commit, nothing of what was
// discarded, and the reply comes before the events it causes.
func TestWatchEventsOfTransactions(t *testing.T) {
	s := start(t, state.Options{Workers: inProcess(t)})
	c := s.dial(builder)
	must(t, c.Watch("/a", "t"))
	next(t, c)
	no := errors.New("no")
	_ = c.Transaction(func(x *client.Tx) error { _ = x.Write("/a/discarded", ""); return no })
	must(t, c.Transaction(func(x *client.Tx) error {
		must(t, x.Write("/a/b", "1"))
		must(t, x.Write("/a/b", "2"))
		select {
		case e := <-c.Events():
			t.Errorf("told %v before the commit", e)
		default:
		}
		return x.Remove("/a/nothing")
	}))
	if e := next(t, c); e.Path != "/a/b" {
		t.Fatalf("%v", e)
	}
	must(t, c.Write("/a/last", ""))
	if e := next(t, c); e.Path != "/a/last" {
		t.Fatalf("%v", e)
	}
	raw := s.connect(builder)
	for i, m := range []wire.Message{
		{Type: wire.Watch, Request: 1, Payload: wire.Join("/z", "t")},
		{Type: wire.Write, Request: 2, Payload: []byte("/z\x00v")},
	} {
		_, err := raw.Write(m.Append(nil))
		must(t, err)
		r, err := wire.ReadMessage(raw)
		must(t, err)
		e, err := wire.ReadMessage(raw)
		must(t, err)
		if r.Type != m.Type || r.Request != uint32(i+1) || e.Type != wire.WatchEvent || e.Request != 0 || e.Tx != 0 {
			t.Errorf("%v %d, then %v %d", r.Type, r.Request, e.Type, e.Request)
		}
	}
}
