package toolstack

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// said is a call that reached the Builder, and how it is answered.
type said struct {
	method string
	answer chan error
}

// slow is a toolstack whose Builder takes its time: it tells of each call and answers when it is told to.
func slow(t *testing.T) (*Toolstack, chan said) {
	t.Helper()
	calls := make(chan said)
	ts := withBuilder(t, func(ctx context.Context, r *rpc.Request) (any, error) {
		s := said{r.Method, make(chan error)}
		select {
		case calls <- s:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		select {
		case err := <-s.answer:
			return struct{}{}, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	return ts, calls
}

// is takes the next call, which has to be this one.
func is(t *testing.T, calls chan said, method string) said {
	t.Helper()
	s := <-calls
	if s.method != method {
		t.Fatalf("call %s, want %s", s.method, method)
	}
	return s
}

func web(ts *Toolstack, s State) *guest {
	g := newGuest(saved{Version: savedVersion, UUID: "id of web", Spec: spec.Guest{Name: "web"}}, "")
	ts.add(g)
	g.state = s
	return g
}

// TestRemovedMeanwhile: a guest that is being removed is not started, nor removed twice; where it cannot be removed it is there.
func TestRemovedMeanwhile(t *testing.T) {
	ts, calls := slow(t)
	g := web(ts, Stopped)
	if err := ts.save(g.saved); err != nil {
		t.Fatal(err)
	}
	for _, failed := range []error{rpc.Errorf(rpc.Unavailable, "not now"), nil} {
		done := make(chan error, 1)
		go func() { done <- ts.remove(t.Context(), "web") }()
		destroy := is(t, calls, protocol.MethodDestroy)
		if _, err := ts.run(t.Context(), nil, "web", protocol.Options{}); rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), "is being removed") {
			t.Errorf("run: %v", err)
		}
		if err := ts.remove(t.Context(), "web"); rpc.KindOf(err) != rpc.Unavailable {
			t.Errorf("rm: %v", err)
		}
		destroy.answer <- failed
		if err := <-done; (err == nil) != (failed == nil) {
			t.Errorf("rm: %v", err)
		}
		if _, err := ts.find("web"); (err == nil) != (failed != nil) {
			t.Errorf("found: %v", err)
		}
	}
}

// TestEndedAtOnce: a guest that ended before the Builder has answered that it runs is taken up again, or removed, after that.
func TestEndedAtOnce(t *testing.T) {
	ts, calls := slow(t)
	web(ts, Stopped)
	ran := make(chan error, 1)
	go func() { _, err := ts.run(t.Context(), nil, "web", protocol.Options{}); ran <- err }()
	build := is(t, calls, protocol.MethodBuild)
	ts.ended(protocol.Ended{UUID: "id of web", Outcome: protocol.Crashed, Reason: "at once"})
	_, run := ts.run(t.Context(), nil, "web", protocol.Options{})
	for _, err := range []error{run, ts.remove(t.Context(), "web")} {
		if rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), "is being started") {
			t.Error(err)
		}
	}
	build.answer <- rpc.Errorf(rpc.Unavailable, "it has crashed")
	if err := <-ran; rpc.KindOf(err) != rpc.Unavailable {
		t.Error(err)
	}
	if g, err := ts.find("web"); err != nil || g.launching || g.state != Failed {
		t.Errorf("%v", err)
	}
}

// TestForgotten: what is forgotten is the guest that it was said of, not a later one of its name.
func TestForgotten(t *testing.T) {
	ts, _ := slow(t)
	first := web(ts, Stopped)
	later := newGuest(saved{UUID: "another", Spec: spec.Guest{Name: "web"}}, "")
	ts.add(later)
	if err := ts.save(later.saved); err != nil {
		t.Fatal(err)
	}
	forget(ts, first)
	if g, err := ts.find("web"); err != nil || g != later {
		t.Errorf("the later one: %v", err)
	}
	// Nor is it written of what is forgotten.
	ts.byUUID[first.saved.UUID] = first // as who looked it up before has it
	ts.event(protocol.Event{UUID: first.saved.UUID, Kind: protocol.EventManufactured, Instance: 7, EKSHA256: "its"})
	if b, err := os.ReadFile(filepath.Join(ts.dir, "web.json")); err != nil || !strings.Contains(string(b), "another") {
		t.Errorf("the later one's record: %s, %v", b, err)
	}
}

func forget(ts *Toolstack, g *guest) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	ts.forget(g)
}

// TestRemovedUnheard: what is removed is forgotten though the caller has hung up; until then nobody has it do anything.
func TestRemovedUnheard(t *testing.T) {
	ts, calls := slow(t)
	g := web(ts, Stopped)
	if err := ts.save(g.saved); err != nil {
		t.Fatal(err)
	}
	ctx, hangUp := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ts.remove(ctx, "web") }()
	destroy := is(t, calls, protocol.MethodDestroy)
	hangUp()
	a := &api{ts}
	for name, call := range map[string]func() error{
		"run": func() error { _, err := a.Run(t.Context(), &v1.RunRequest{Name: "web"}); return err },
		"rm":  func() error { _, err := a.Remove(t.Context(), &v1.RemoveRequest{Name: "web"}); return err },
		"quarantine": func() error {
			_, err := a.Quarantine(t.Context(), &v1.QuarantineRequest{Name: "web"})
			return err
		},
		"validation": func() error {
			_, err := a.Validation(t.Context(), &v1.ValidationRequest{Name: "web"})
			return err
		},
	} {
		if err := call(); connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "is being removed") {
			t.Errorf("%s: %v", name, err)
		}
	}
	destroy.answer <- nil
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := ts.find("web"); rpc.KindOf(err) != rpc.NotFound {
		t.Errorf("found: %v", err)
	}
	if err := g.remove("web"); rpc.KindOf(err) != rpc.NotFound { // by who had looked it up before
		t.Errorf("rm: %v", err)
	}
}

// TestStopRefused: a guest that the Builder does not stop is what it was, or has become meanwhile.
func TestStopRefused(t *testing.T) {
	for _, ready := range []bool{false, true} {
		ts, calls := slow(t)
		g := web(ts, Starting)
		done := make(chan error, 1)
		go func() { _, err := ts.stop(t.Context(), "web", 0); done <- err }()
		stop := is(t, calls, protocol.MethodStop)
		want := Starting
		if ready {
			ts.event(protocol.Event{UUID: "id of web", Kind: protocol.EventVTPMReady})
			want = Running
		}
		stop.answer <- rpc.Errorf(rpc.Unavailable, "what cannot be recorded is not done")
		if err := <-done; rpc.KindOf(err) != rpc.Unavailable {
			t.Error(err)
		}
		if g.state != want {
			t.Errorf("the guest is %s, want %s", g.state, want)
		}
	}
}

// TestStopsRefused: of several calls that stop a guest each may be refused; it is being stopped while one is under way.
func TestStopsRefused(t *testing.T) {
	ts, calls := slow(t)
	g := web(ts, Running)
	refused := rpc.Errorf(rpc.Unavailable, "not now")
	done := make(chan error, 2)
	ctx, hangUp := context.WithCancel(t.Context())
	stop := func() said {
		go func() { _, err := ts.stop(ctx, "web", 0); done <- err }()
		return is(t, calls, protocol.MethodStop)
	}
	state := func() State {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.state
	}
	first, second := stop(), stop()
	first.answer <- refused
	if err := <-done; rpc.KindOf(err) != rpc.Unavailable || state() != Stopping {
		t.Errorf("%v: the guest is %s, while it is being stopped", err, state())
	}
	hangUp() // the answer counts nevertheless
	second.answer <- refused
	if err := <-done; rpc.KindOf(err) != rpc.Unavailable || state() != Running {
		t.Errorf("%v: the guest is %s, and nobody stops it", err, state())
	}
}

// TestStopOfEarlier: a guest that an earlier toolstack was told to stop is being stopped, whatever this one's calls come to.
func TestStopOfEarlier(t *testing.T) {
	ts, calls := slow(t)
	g := web(ts, Stopping) // as adopt leaves it
	done := make(chan error, 1)
	go func() { _, err := ts.stop(t.Context(), "web", 0); done <- err }()
	stop := is(t, calls, protocol.MethodStop)
	ts.event(protocol.Event{UUID: "id of web", Kind: protocol.EventVTPMReady})
	stop.answer <- rpc.Errorf(rpc.Unavailable, "not now")
	if err := <-done; rpc.KindOf(err) != rpc.Unavailable || g.state != Stopping {
		t.Errorf("%v: the guest is %s", err, g.state)
	}
}

// TestStopStarting: a guest that is being started is stopped when that is over: until then the Builder does not know it.
func TestStopStarting(t *testing.T) {
	ts, calls := slow(t)
	s := &spec.Guest{Name: "web", Boot: spec.Boot{Kernel: "/k"}, TPM: spec.TPM{Disabled: true}}
	ran, stopped := make(chan error, 1), make(chan error, 1)
	go func() { _, err := ts.run(t.Context(), s, "", protocol.Options{}); ran <- err }()
	open := is(t, calls, protocol.MethodOpen)
	go func() { _, err := ts.stop(t.Context(), "web", 0); stopped <- err }()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := ts.stop(ctx, "web", 0); err == nil { // nobody waits for longer than asked
		t.Error("stopped before it was started")
	}
	open.answer <- rpc.Errorf(rpc.NotFound, "no such kernel")
	if err := <-ran; rpc.KindOf(err) != rpc.NotFound {
		t.Error(err)
	}
	if err := <-stopped; err != nil && rpc.KindOf(err) != rpc.NotFound { // it is down, or forgotten already
		t.Error(err)
	}
	select {
	case c := <-calls:
		t.Errorf("the Builder is asked: %s", c.method)
	default:
	}
}
