package calls

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/ipc/rpc/rpctest"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, dir string) *audit.Journal {
	t.Helper()
	j, err := audit.OpenJournal(dir, audit.Actor{Service: services.Builder}, slog.New(slog.DiscardHandler), audit.Alive{})
	must(t, err)
	t.Cleanup(j.Close)
	return j
}

// records are what the log holds, as text: act, object, outcome.
func records(t *testing.T, dir string) (all []string) {
	t.Helper()
	for r, err := range audit.Records(filepath.Join(dir, audit.Dir)) {
		must(t, err)
		all = append(all, strings.Join([]string{r.Act, r.Object, string(r.Outcome)}, " "))
	}
	return all
}

// TestCallsAreRecorded: before anything is done it is in the log who asked, and afterwards what
// came of it; and where the log cannot be written, nothing is done.
func TestCallsAreRecorded(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir)
	calls := 0
	call := rpctest.Serve(t, Recorded(j, "acme", func(string) string { return "" }, func(_ context.Context, r *rpc.Request) (any, error) {
		calls++
		if all := records(t, dir); !strings.HasSuffix(all[len(all)-1], " asked") {
			t.Errorf("%s: served before it was recorded: %q", r.Method, all)
		}
		switch r.Method {
		case protocol.MethodStop:
			return struct{}{}, nil
		case protocol.MethodBuild:
			return nil, errors.New("no memory")
		}
		return nil, rpc.Errorf(rpc.Refused, "no such call")
	}))
	who := protocol.Caller{UID: 1000, PID: 77}
	must(t, call(protocol.MethodStop, protocol.Stop{UUID: "u1", Name: "web-1", Caller: who}))
	build := protocol.Build{UUID: "u1", Caller: who}
	build.Spec.Name = "web-2"
	_ = call(protocol.MethodBuild, build)
	_ = call("nonsense \xff", "no object")
	want := []string{"stop web-1 asked", "stop web-1 done", "build web-2 asked", "build web-2 failed", "nonsense \ufffd  asked", "nonsense \ufffd  refused"}
	if all := records(t, dir)[1:]; !slices.Equal(all, want) {
		t.Errorf("%q, want %q", all, want)
	}
	n := 0
	for r, err := range audit.Records(filepath.Join(dir, audit.Dir)) {
		must(t, err)
		if r.Actor.UID == who.UID && r.Actor.PID == who.PID && r.Actor.Service == services.Toolstack && r.Detail["uuid"] == "u1" {
			n++
		}
	}
	if n != 4 {
		t.Errorf("%d records name the caller", n)
	}
	j.Close()
	calls = 0
	if err := call(protocol.MethodStop, protocol.Stop{UUID: "u1"}); rpc.KindOf(err) != rpc.Unavailable || calls != 0 {
		t.Errorf("without a log: %v, %d calls", err, calls)
	}
}

// TestRefusalsDoNotFillTheLog: a service that makes calls it may not make is in the log, and
// cannot fill it.
func TestRefusalsDoNotFillTheLog(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir)
	call := rpctest.Serve(t, Watched(j, services.Emulator, "web-1", func(context.Context, *rpc.Request) (any, error) {
		return nil, rpc.Errorf(rpc.Refused, "no")
	}))
	const n = 5000
	for range n {
		if err := call(strings.Repeat("x", 2000), struct{}{}); rpc.KindOf(err) != rpc.Refused {
			t.Fatal(err)
		}
	}
	last := ""
	count := 0
	for r, err := range audit.Records(filepath.Join(dir, audit.Dir)) {
		must(t, err)
		if r.Act == ActCall && r.Outcome == audit.Refused && r.Actor.Service == services.Emulator && r.Detail["guest"] == "web-1" {
			count++
			last = r.Detail["count"]
		}
	}
	if count < maxRefusals || count > maxRefusals+13 || last != "4096" {
		t.Errorf("%d records of %d refusals, the last with count %s", count, n, last)
	}
}

// TestAskedIsRead: what recorded decodes are the fields of every call of the toolstack.
func TestAskedIsRead(t *testing.T) {
	who := protocol.Caller{UID: 5, PID: 6}
	for _, in := range []any{
		protocol.Build{UUID: "u", Caller: who},
		protocol.Stop{UUID: "u", Caller: who},
		protocol.Destroy{UUID: "u", Caller: who},
		protocol.Quote{UUID: "u", Caller: who},
		protocol.Activate{UUID: "u", Caller: who},
		protocol.AttachConsole{UUID: "u", Caller: who},
	} {
		raw, err := json.Marshal(in)
		must(t, err)
		var a asked
		if err := json.Unmarshal(raw, &a); err != nil || a.UUID != "u" || a.Caller != who {
			t.Errorf("%T: %+v %v", in, a, err)
		}
	}
}
