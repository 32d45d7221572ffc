package cli

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
)

// generations are toolstacks, of which each serves one stream and is then replaced: the stream ends with the error of ends.
type generations struct {
	redoubtv1connect.UnimplementedGuestServiceHandler
	events [][]*v1.Event
	output [][]string
	ends   []error
	states []v1.State // of the guest, as often as it is asked for; the last one stays

	served, asked int
}

func (g *generations) Run(context.Context, *v1.RunRequest) (*v1.RunResponse, error) {
	return &v1.RunResponse{Guest: &v1.Guest{Name: "web"}}, nil
}

func (g *generations) Get(context.Context, *v1.GetRequest) (*v1.GetResponse, error) {
	s := g.states[min(g.asked, len(g.states)-1)]
	g.asked++
	return &v1.GetResponse{Guest: &v1.Guest{Name: "web", State: s, Reason: "its own", SpecJson: "{}"}}, nil
}

func (g *generations) next() (n int, end error) {
	n = g.served
	g.served++
	if n >= len(g.ends) {
		return -1, connect.NewError(connect.CodeInternal, errors.New("one stream too many"))
	}
	return n, g.ends[n]
}

func (g *generations) Events(_ context.Context, _ *v1.EventsRequest, s *connect.ServerStream[v1.EventsResponse]) error {
	n, end := g.next()
	if n < 0 || n >= len(g.events) {
		return end
	}
	for _, e := range g.events[n] {
		if err := s.Send(&v1.EventsResponse{Event: e}); err != nil {
			return err
		}
	}
	return end
}

func (g *generations) Logs(_ context.Context, _ *v1.LogsRequest, s *connect.ServerStream[v1.LogsResponse]) error {
	n, end := g.next()
	if n < 0 || n >= len(g.output) {
		return end
	}
	for _, text := range g.output[n] {
		if err := s.Send(&v1.LogsResponse{Output: []byte(text)}); err != nil {
			return err
		}
	}
	return end
}

var (
	died = connect.NewError(connect.CodeAborted, errors.New("the Builder was replaced over this"))
	last = connect.NewError(connect.CodeNotFound, errors.New("no such guest"))
)

// TestWaitReplaced: a wait for a guest outlives toolstacks, whether they end in order or not.
func TestWaitReplaced(t *testing.T) {
	starting, running, failed := v1.State_STATE_STARTING, v1.State_STATE_RUNNING, v1.State_STATE_FAILED
	for name, c := range map[string]struct {
		g    generations
		want string // of the error
	}{
		"in order": {generations{ends: []error{nil, nil, nil}, states: []v1.State{starting, starting, running}}, ""},
		"died":     {generations{ends: []error{died, died}, states: []v1.State{starting, running}}, ""},
		"failed":   {generations{ends: []error{nil, nil}, states: []v1.State{starting, failed}}, "guest web is failed: its own"},
		"an error": {generations{ends: []error{nil, last}, states: []v1.State{starting}}, "no such guest"},
	} {
		out, err := command(t, &c.g, "run", "web", "--wait")
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v", name, out, err)
		}
		if c.want == "" && !strings.Contains(out, "guest web is running") {
			t.Errorf("%s: %q", name, out)
		}
	}
}

func at(time int64, guest, kind string) *v1.Event {
	return &v1.Event{TimeUnixNano: time, Guest: guest, Kind: kind}
}

// TestEventsReplaced: events that are followed outlive toolstacks, each event once, in text and in JSON.
func TestEventsReplaced(t *testing.T) {
	past := []*v1.Event{at(1, "web", "one"), at(3, "web", "two"), at(4, "db", "three")}
	all := append(past[:3:3], at(2, "cache", "four"), at(5, "web", "five"))
	twice := slices.Insert(slices.Clone(all), 3, all[3])
	for _, end := range []error{nil, died} {
		for _, flags := range [][]string{{"--follow"}, {"--follow", "--json"}} {
			g := &generations{events: [][]*v1.Event{past, past, twice}, ends: []error{end, end, last}}
			out, err := command(t, g, append([]string{"events"}, flags...)...)
			if connect.CodeOf(err) != connect.CodeNotFound || strings.Count(out, "\n") != len(all) {
				t.Errorf("%v, %v: %v\n%s", end, flags, err, out)
			}
			for _, e := range all {
				if strings.Count(out, e.Kind) != 1 {
					t.Errorf("%v, %v: event %s\n%s", end, flags, e.Kind, out)
				}
			}
		}
	}
	// Without --follow the end is the end.
	g := &generations{events: [][]*v1.Event{past}, ends: []error{nil}}
	if out, err := command(t, g, "events"); err != nil || strings.Count(out, "\n") != len(past) || g.served != 1 {
		t.Errorf("%d streams: %v\n%s", g.served, err, out)
	}
}

// TestLogsReplaced: a log that is followed outlives toolstacks, and ends with the guest.
func TestLogsReplaced(t *testing.T) {
	up, stopped := v1.State_STATE_RUNNING, v1.State_STATE_STOPPED
	long := strings.Repeat("0123456789abcde\n", 40_000) // more than a toolstack keeps
	for name, c := range map[string]struct {
		output [][]string
		ends   []error
		states []v1.State
		want   string
	}{
		"down":           {[][]string{{"a\n", "b\n"}}, []error{nil}, []v1.State{stopped}, "a\nb\n"},
		"goes down":      {[][]string{{"a\n", "b\n"}, {"a\nb\nc\n"}}, []error{nil, nil}, []v1.State{up, stopped}, "a\nb\nc\n"},
		"replaced":       {[][]string{{"a\n", "b\n"}, {"a\nb\nc\n", "a\nb\n"}}, []error{nil, nil}, []v1.State{up, stopped}, "a\nb\nc\na\nb\n"},
		"died twice":     {[][]string{{"a\n"}, {"a\n", "b\n"}, {"a\nb\n", "c\n"}}, []error{died, died, nil}, []v1.State{up, up, stopped}, "a\nb\nc\n"},
		"nothing new":    {[][]string{{"a\n"}, {"a\n"}}, []error{nil, nil}, []v1.State{up, stopped}, "a\n"},
		"nothing at all": {[][]string{{}, {}}, []error{nil, nil}, []v1.State{up, stopped}, ""},
		"started again":  {[][]string{{"a\nb\n"}, {"c\na\n"}}, []error{nil, nil}, []v1.State{up, stopped}, "a\nb\nc\na\n"},
		"long":           {[][]string{{long, "x\n"}, {long[len(long)-256<<10:] + "x\ny\n"}}, []error{nil, nil}, []v1.State{up, stopped}, long + "x\ny\n"},
	} {
		g := &generations{output: c.output, ends: c.ends, states: c.states}
		out, err := command(t, g, "logs", "web", "--follow")
		if err != nil || out != c.want || g.served != len(c.ends) {
			t.Errorf("%s: %d streams, %v: %d bytes %.80q, want %d", name, g.served, err, len(out), out, len(c.want))
		}
	}
	g := &generations{output: [][]string{{"a\n"}, {"a\nb\n"}}, ends: []error{nil, nil}, states: []v1.State{up, stopped}}
	if out, err := command(t, g, "logs", "web", "--follow", "--json"); err != nil || strings.Count(out, "\n") != 2 || !strings.Contains(out, `"output":"b\n"`) {
		t.Errorf("%v: %s", err, out)
	}
	// Without --follow the guest is not asked for, and the end is the end.
	g = &generations{output: [][]string{{"a\n"}}, ends: []error{nil}}
	if out, err := command(t, g, "logs", "web"); err != nil || out != "a\n" || g.asked != 0 {
		t.Errorf("%d times asked, %v: %q", g.asked, err, out)
	}
	g = &generations{output: [][]string{{"a\n"}}, ends: []error{died}}
	if _, err := command(t, g, "logs", "web"); err == nil {
		t.Error("a log that was cut off is taken for whole")
	}
}

// TestOverlap: as by its definition, for texts that overlap in more than one way.
func TestOverlap(t *testing.T) {
	random := rand.New(rand.NewPCG(1, uint64(os.Getpid())))
	text := func() []byte {
		b := make([]byte, random.IntN(12))
		for i := range b {
			b[i] = "ab"[random.IntN(2)]
		}
		return b
	}
	for range 20_000 {
		printed, next := text(), text()
		want := min(len(printed), len(next))
		for !bytes.HasSuffix(printed, next[:want]) {
			want--
		}
		if got := overlap(printed, next); got != want {
			t.Fatalf("%q, %q: %d, want %d", printed, next, got, want)
		}
	}
}
