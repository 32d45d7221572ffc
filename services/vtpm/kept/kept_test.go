package kept

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/ipc/fdstore/fdstoretest"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/store/tree"
)

const (
	web  = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a01"
	mail = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a02"
)

// service is a manager's process that does what the test says.
type service struct {
	conn *ipc.Conn // the Builder's end
	peer *rpc.Peer // its own
	done chan struct{}
	once sync.Once

	inherited map[string]protocol.Inherit
}

func (s *service) PID() int        { return 1 }
func (s *service) Conn() *ipc.Conn { return s.conn }

func (s *service) Done() <-chan struct{} { return s.done }
func (s *service) Err() error            { return errors.New("killed") }

func (s *service) Kill() {
	s.once.Do(func() {
		_ = s.peer.Close()
		close(s.done)
	})
}

func (s *service) Stop(context.Context) error { s.Kill(); return nil }

// host is what the Manager under test has around it.
type host struct {
	t   *testing.T
	mgr *Manager

	mu       sync.Mutex
	services []*service
	answer   func(protocol.Inherit) (protocol.Inherited, error)
	calls    []string
	kept     [][]int // process numbers that Leftovers was told
	again    chan string
	failed   chan string
}

func newHost(t *testing.T) *host { return newHostOf(t, nil, nil, ready) }

// newHostOf is one that keeps, and follows one that kept.
func newHostOf(t *testing.T, kept *fdstore.Store, left Devices, answer func(protocol.Inherit) (protocol.Inherited, error)) *host {
	h := &host{t: t, again: make(chan string, 4), failed: make(chan string, 4), answer: answer}
	h.mgr = New(Options{
		Kept: kept, Left: left,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Start: func() (keeper.Process, error) {
			return h.start()
		},
		Configure: func(context.Context, *keeper.Instance) error { return nil },
		Handler:   func(context.Context, *rpc.Request) (any, error) { return nil, rpc.Errorf(rpc.Refused, "no") },
		Guests:    func() []string { return nil },
		Leftovers: func(_ context.Context, kept []int) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.kept = append(h.kept, kept)
			return nil
		},
		Again: func(uuid string, d tree.Domain) {
			// As the Builder does: another one's guest is provisioned while its service is only beginning.
			h.mgr.wg.Go(func() {
				err := h.mgr.Provision(context.Background(), uuid, func(*rpc.Peer) error { return nil })
				if err != nil && rpc.KindOf(err) != rpc.Unavailable {
					t.Errorf("provisioned again: %v", err)
				}
			})
			h.again <- fmt.Sprint(uuid, " ", d)
		},
		Gone: func(string) {},
		Fail: func(uuid, _ string) { h.failed <- uuid },
		Lost: func(err error) { t.Errorf("lost: %v", err) },
	})
	if err := h.mgr.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.mgr.Close(0) })
	return h
}

func (h *host) start() (*service, error) {
	a, b, err := ipc.Pipe()
	if err != nil {
		return nil, err
	}
	s := &service{conn: a, done: make(chan struct{}), inherited: map[string]protocol.Inherit{}}
	s.peer = rpc.New(b, func(_ context.Context, r *rpc.Request) (any, error) {
		defer ipc.CloseAll(r.Files)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.calls = append(h.calls, r.Method)
		if r.Method != protocol.MethodInherit {
			return struct{}{}, nil
		}
		var in protocol.Inherit
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		if len(in.Files) != len(r.Files) {
			h.t.Errorf("%d names, %d descriptors", len(in.Files), len(r.Files))
		}
		s.inherited[in.UUID] = in
		return h.answer(in)
	})
	go func() { _ = s.peer.Run(context.Background()) }()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.services = append(h.services, s)
	return s, nil
}

// now is the process in force.
func (h *host) now() *service {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.services[len(h.services)-1]
}

// next kills the process and waits for the one after it.
func (h *host) next(answer func(protocol.Inherit) (protocol.Inherited, error)) *service {
	h.t.Helper()
	h.mu.Lock()
	h.answer = answer
	h.mu.Unlock()
	h.now().Kill()
	if err := h.mgr.Call(h.t.Context(), "probe", struct{}{}, nil); err != nil {
		h.t.Fatal(err)
	}
	return h.now()
}

func (h *host) attach(uuid string, d tree.Domain) {
	h.t.Helper()
	front, back, err := ipc.Files()
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { front.Close() })
	defer back.Close()
	if err := h.mgr.Attach(h.t.Context(), protocol.Attach{UUID: uuid, Domain: d}, back); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) provision(uuid string) {
	h.t.Helper()
	if err := h.mgr.Provision(h.t.Context(), uuid, func(*rpc.Peer) error { return nil }); err != nil {
		h.t.Fatal(err)
	}
}

// keep has a process give an engine away.
func (h *host) keep(s *service, uuid string, pid int) error {
	h.t.Helper()
	var files []*os.File
	for range 2 {
		a, b, err := ipc.Files()
		if err != nil {
			h.t.Fatal(err)
		}
		files = append(files, a, b)
	}
	defer ipc.CloseAll(files)
	_, err := s.peer.Call(h.t.Context(), protocol.MethodKeep, protocol.Keep{UUID: uuid, PID: pid, Files: engineFiles}, nil, files...)
	return err
}

func ready(protocol.Inherit) (protocol.Inherited, error) { return protocol.Inherited{Ready: true}, nil }

func notReady(protocol.Inherit) (protocol.Inherited, error) { return protocol.Inherited{}, nil }

// TestInherits: the next manager is given what the last one had, and each guest goes on as it says.
func TestInherits(t *testing.T) {
	h := newHost(t)
	h.attach(web, 3)
	if err := h.keep(h.now(), web, 77); err != nil {
		t.Fatal(err)
	}
	h.provision(web)
	h.attach(mail, 4) // has no engine yet

	for range 3 {
		s := h.next(ready)
		if in := s.inherited[web]; in.PID != 77 || in.Domain != 3 || len(in.Files) != 6 {
			t.Errorf("inherited %+v", in)
		}
		if in := s.inherited[mail]; in.PID != 0 || len(in.Files) != 2 {
			t.Errorf("inherited %+v", in)
		}
	}
	if last := h.kept[len(h.kept)-1]; len(last) != 1 || last[0] != 77 {
		t.Errorf("left in peace were %v", last)
	}

	// Not ready: what was provisioned is provisioned again, the rest goes on being.
	h.next(notReady)
	if got := <-h.again; got != web+" 3" || len(h.again) != 0 {
		t.Errorf("again: %s", got)
	}
	if s := h.next(ready); len(s.inherited[web].Files) != 2 {
		t.Errorf("an engine that was not inherited is kept: %+v", s.inherited[web])
	}

	// Lost.
	if err := h.keep(h.now(), web, 78); err != nil {
		t.Fatal(err)
	}
	h.next(func(in protocol.Inherit) (protocol.Inherited, error) {
		if in.UUID == web {
			return protocol.Inherited{}, rpc.Errorf(rpc.Unavailable, "no")
		}
		return ready(in)
	})
	if got := <-h.failed; got != web || len(h.failed) != 0 {
		t.Errorf("failed: %s", got)
	}

	// Down.
	for _, uuid := range []string{web, mail} {
		if err := h.mgr.Release(t.Context(), uuid, false); err != nil {
			t.Fatal(err)
		}
	}
	if s := h.next(ready); len(s.inherited) != 0 {
		t.Errorf("inherited %+v", s.inherited)
	}
}

// TestBuilderDied: a manager of the next Builder inherits what those of the last one had, but no channel of an
// emulator that is not the guest's, and nothing of guests that are no more.
func TestBuilderDied(t *testing.T) {
	const gone = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a03"
	for name, answer := range map[string]func(protocol.Inherit) (protocol.Inherited, error){"ready": ready, "not ready": notReady} {
		t.Run(name, func(t *testing.T) {
			keeper := fdstoretest.New(t)
			store, _ := keeper.Next()
			h := newHostOf(t, store, nil, ready)
			for i, uuid := range []string{web, mail, gone} {
				h.attach(uuid, tree.Domain(3+i))
				if err := h.keep(h.now(), uuid, 77+i); err != nil {
					t.Fatal(err)
				}
			}
			h.provision(web)

			store, left := keeper.Next()
			var engines []int
			devices, err := Left(left,
				func(uuid string) bool { return uuid != gone },
				func(a protocol.Attach) bool { return a.UUID == web && a.Domain == 3 }, // the other one is rebooting
				func(pid int) error { engines = append(engines, pid); return nil })
			if err != nil || len(devices) != 2 || len(engines) != 2 {
				t.Fatalf("%v, %v, %v", devices, engines, err)
			}
			store.Discard(left)
			next := newHostOf(t, store, devices, answer)
			s := next.now()
			if in := s.inherited[web]; in.PID != 77 || in.Domain != 3 || len(in.Files) != 6 {
				t.Errorf("inherited %+v", in)
			}
			if in := s.inherited[mail]; in.PID != 78 || len(in.Files) != 5 {
				t.Errorf("inherited %+v", in)
			}
			if name == "not ready" {
				if got := <-next.again; got != web+" 3" || len(next.again) != 0 {
					t.Errorf("again: %s", got)
				}
			}
			for _, uuid := range []string{web, mail} {
				if err := next.mgr.Release(t.Context(), uuid, false); err != nil {
					t.Fatal(err)
				}
			}
			if n := keeper.Len(); n != 0 {
				t.Errorf("%d entries are left", n)
			}
		})
	}
}

// TestProvisionedOverADeath: a manager that dies while it provisions has it done by the next one,
// unless that finds it done.
func TestProvisionedOverADeath(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(protocol.Inherit) (protocol.Inherited, error)
		calls  int
	}{"not ready": {notReady, 2}, "ready": {ready, 1}} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.answer = c.answer
			h.attach(web, 3)
			n := 0
			if err := h.mgr.Provision(t.Context(), web, func(*rpc.Peer) error {
				if n++; n == 1 {
					h.now().Kill()
					return rpc.ErrGone
				}
				return nil
			}); err != nil || n != c.calls {
				t.Errorf("%d times, %v", n, err)
			}
			if len(h.again) != 0 {
				t.Error("and once more")
			}
		})
	}
}

// TestSlowGuest: a guest whose vTPM takes its time holds up no other guest, and its own start waits.
func TestSlowGuest(t *testing.T) {
	h := newHost(t)
	h.attach(web, 3)
	h.attach(mail, 4)
	h.provision(mail)
	slow := make(chan struct{})
	h.next(func(in protocol.Inherit) (protocol.Inherited, error) {
		if in.UUID == web {
			h.mu.Unlock() // nothing else of this process waits for it
			<-slow
			h.mu.Lock()
		}
		return ready(in)
	})
	if err := h.mgr.Call(t.Context(), "quote", struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		done <- h.mgr.Provision(t.Context(), web, func(*rpc.Peer) error { return errors.New("made anew") })
	}()
	close(slow)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestKeepRefused: an engine of a guest that is not there, or without all its descriptors, is not
// taken into keeping.
func TestKeepRefused(t *testing.T) {
	h := newHost(t)
	if err := h.keep(h.now(), web, 77); err == nil {
		t.Error("taken for a guest that is not there")
	}
	h.attach(web, 3)
	a, b, err := ipc.Files()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	if _, err := h.now().peer.Call(t.Context(), protocol.MethodKeep, protocol.Keep{UUID: web, PID: 1, Files: protocol.Files{protocol.FileControl}}, nil, a); err == nil {
		t.Error("taken without its lifeline")
	}
}
