package toolstack

import (
	"context"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/services/protocol"
)

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

// TestEventsJoined: who follows is told of each event once, those before and those after it began to, though one says it is of a
// time that is far off.
func TestEventsJoined(t *testing.T) {
	ts, _ := slow(t)
	g := web(ts, Running)
	mux := http.NewServeMux()
	mux.Handle(redoubtv1connect.NewGuestServiceHandler(&api{ts}))
	server := httptest.NewServer(mux)
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	at := time.Now()
	ts.event(protocol.Event{UUID: "id of web", Kind: "far off", Time: at.AddDate(200, 0, 0)})
	g.mu.Lock() // who follows has subscribed, and does not come to the timeline
	type follower = connect.ServerStreamForClient[v1.EventsResponse]
	following := make(chan *follower, 1)
	go func() {
		s, err := redoubtv1connect.NewGuestServiceClient(server.Client(), server.URL).Events(ctx, &v1.EventsRequest{Name: "web", Follow: true})
		if err != nil {
			t.Error(err)
		}
		following <- s
	}()
	for subscribed := 0; subscribed == 0; runtime.Gosched() {
		ts.events.mu.Lock()
		subscribed = len(ts.events.subs)
		ts.events.mu.Unlock()
	}
	between := moment{protocol.Event{UUID: "id of web", Kind: "between", Time: at}, ts.seq.Add(1)}
	g.timeline = append(g.timeline, between)
	ts.events.send(between)
	g.mu.Unlock()
	s := <-following
	if s == nil {
		return
	}
	ts.event(protocol.Event{UUID: "id of web", Kind: "last", Time: at})
	told := map[string]int{}
	for told["last"] == 0 && s.Receive() {
		told[s.Msg().Event.Kind]++
	}
	if err := s.Err(); err != nil || len(told) != 3 {
		t.Errorf("told of %v, %v", told, err)
	}
	for kind, times := range told {
		if times != 1 {
			t.Errorf("event %s is told %d times", kind, times)
		}
	}
	cancel()
	_ = s.Close()
}

// TestEndedFirst: who hears of a guest's end finds it down, and who finds it down finds its end in the timeline.
func TestEndedFirst(t *testing.T) {
	ts, _ := slow(t)
	g := web(ts, Running)
	sub := ts.events.subscribe()
	defer sub.close()
	ts.events.mu.Lock() // nobody hears of anything
	done := make(chan struct{})
	go func() {
		defer close(done)
		ts.ended(protocol.Ended{UUID: "id of web", Outcome: protocol.Crashed, Reason: "x"})
	}()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	told := 0
	err := g.await(ctx, func() bool { told = len(g.timeline); return g.state == Failed })
	ts.events.mu.Unlock()
	<-done
	if err != nil || told != 1 {
		t.Errorf("down: %v; %d events", err, told)
	}
	if m := <-sub.ch; m.Kind != protocol.EventEnded {
		t.Errorf("event %s", m.Kind)
	}
}
