package toolstack

import (
	"context"
	"strings"
	"testing"
	"time"

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

// TestForgotten: what is forgotten is the guest that it was said of, not a later one of its name.
func TestForgotten(t *testing.T) {
	ts, _ := slow(t)
	first := web(ts, Stopped)
	later := newGuest(saved{UUID: "another", Spec: spec.Guest{Name: "web"}}, "")
	ts.add(later)
	if err := ts.save(later.saved); err != nil {
		t.Fatal(err)
	}
	ts.mu.Lock()
	ts.forget(first)
	ts.mu.Unlock()
	if g, err := ts.find("web"); err != nil || g != later {
		t.Errorf("the later one: %v", err)
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

// TestMoments: an event that an adoption has told is not told again, whatever time it says it is of.
func TestMoments(t *testing.T) {
	ts, _ := slow(t)
	g := web(ts, Running)
	sub := ts.events.subscribe()
	defer sub.close()
	at := time.Unix(1, 0)
	for n, kind := range []string{"a", "b"} {
		ts.event(protocol.Event{UUID: "id of web", Kind: kind, Number: n + 1, Time: at.AddDate(200, 0, 0)})
	}
	ts.event(protocol.Event{UUID: "id of web", Kind: "b", Number: 2, Time: at})
	ts.event(protocol.Event{UUID: "id of web", Kind: "c", Number: 3, Time: at})
	ts.event(protocol.Event{UUID: "id of web", Kind: "d", Time: at})
	var kinds []string
	last := uint64(0)
	for _, m := range g.timeline {
		if m.seq <= last {
			t.Errorf("%s: number %d after %d", m.Kind, m.seq, last)
		}
		kinds, last = append(kinds, m.Kind), m.seq
	}
	if got := strings.Join(kinds, ""); got != "abcd" {
		t.Errorf("timeline %s", got)
	}
}
