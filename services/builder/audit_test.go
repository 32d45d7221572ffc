package builder

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func open(t *testing.T, dir string) *journal {
	t.Helper()
	j, err := openJournal(dir, quiet())
	must(t, err)
	t.Cleanup(j.close)
	return j
}

// records are what the log holds, as text: act, object, outcome.
func records(t *testing.T, dir string) (all []string) {
	t.Helper()
	for r, err := range audit.Records(filepath.Join(dir, AuditDir)) {
		must(t, err)
		all = append(all, strings.Join([]string{r.Act, r.Object, string(r.Outcome)}, " "))
	}
	return all
}

// TestJournalFindsTampering: whatever is done to the log between two Builders is found by the
// next one, which keeps the damaged log as it is and begins another with an alarm. What a killed
// writer can leave is none.
func TestJournalFindsTampering(t *testing.T) {
	log := func(dir string) string {
		names, err := filepath.Glob(filepath.Join(dir, AuditDir, "*.log"))
		if err != nil || len(names) != 1 {
			t.Fatalf("%v %v", names, err)
		}
		return names[0]
	}
	edit := func(f func([]byte) []byte) func(t *testing.T, dir, _ string) {
		return func(t *testing.T, dir, _ string) {
			b, err := os.ReadFile(log(dir))
			must(t, err)
			must(t, os.WriteFile(log(dir), f(b), 0o600))
		}
	}
	lines := func(f func([][]byte) [][]byte) func(t *testing.T, dir, _ string) {
		return edit(func(b []byte) []byte { return bytes.Join(f(bytes.SplitAfter(b, []byte("\n"))), nil) })
	}
	for name, c := range map[string]struct {
		do   func(t *testing.T, dir, old string)
		good bool
	}{
		"nothing": {func(*testing.T, string, string) {}, true},
		"torn":    {edit(func(b []byte) []byte { return append(b, `{"seq":`...) }), true},
		"head behind": {func(t *testing.T, dir, old string) {
			b, err := os.ReadFile(filepath.Join(old, AuditHead))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, AuditHead), b, 0o600))
		}, true},
		"edit":    {edit(func(b []byte) []byte { return bytes.Replace(b, []byte("web-1"), []byte("web-2"), 1) }), false},
		"missing": {lines(func(l [][]byte) [][]byte { return slices.Delete(l, 1, 2) }), false},
		"order":   {lines(func(l [][]byte) [][]byte { l[1], l[2] = l[2], l[1]; return l }), false},
		"cut":     {lines(func(l [][]byte) [][]byte { return l[:len(l)-2] }), false},
		// A whole older log with its own head: only the head that is kept apart tells.
		"rolled back": {func(t *testing.T, dir, old string) {
			must(t, os.RemoveAll(filepath.Join(dir, AuditDir)))
			must(t, os.CopyFS(filepath.Join(dir, AuditDir), os.DirFS(filepath.Join(old, AuditDir))))
		}, false},
		"log removed":  {func(t *testing.T, dir, _ string) { must(t, os.RemoveAll(filepath.Join(dir, AuditDir))) }, false},
		"head removed": {func(t *testing.T, dir, _ string) { must(t, os.Remove(filepath.Join(dir, AuditHead))) }, false},
		"head edited": {func(t *testing.T, dir, _ string) {
			must(t, os.WriteFile(filepath.Join(dir, AuditHead), []byte("x"), 0o600))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir, old := t.TempDir(), t.TempDir()
			j := open(t, dir)
			must(t, j.record(j.entry("build", "web-1", audit.Asked), j.entry("build", "web-1", audit.Done)))
			must(t, os.CopyFS(old, os.DirFS(dir)))
			must(t, j.record(j.entry("stop", "web-1", audit.Asked)))
			j.close()
			c.do(t, dir, old)
			was := map[string]string{}
			if b, err := os.ReadFile(filepath.Join(dir, AuditDir, "00000000000000000001.log")); err == nil {
				was["log"] = string(b)
			}
			j = open(t, dir)
			must(t, j.record(j.entry("build", "web-9", audit.Asked)))
			j.close()
			aside, err := filepath.Glob(filepath.Join(dir, AuditDamaged+"*"))
			must(t, err)
			all := records(t, dir)
			if c.good {
				if len(aside) != 0 || !slices.Contains(all, "stop web-1 asked") || slices.Contains(all, ActDamaged+" audit log done") {
					t.Fatalf("a good log: set aside %v, records %q", aside, all)
				}
			} else {
				if len(aside) != 1 || len(all) < 3 || all[1] != ActDamaged+" audit log done" {
					t.Fatalf("set aside %v, records %q", aside, all)
				}
				if b, _ := os.ReadFile(filepath.Join(aside[0], "00000000000000000001.log")); string(b) != was["log"] {
					t.Error("the evidence was changed")
				}
			}
			if all[len(all)-1] != "build web-9 asked" {
				t.Errorf("records %q", all)
			}
			if damage, err := CheckAudit(dir); damage != "" || err != nil {
				t.Errorf("afterwards: %s %v", damage, err)
			}
		})
	}
}

// TestJournalEndsWhatWasLeft: what a killed Builder left open ended with it.
func TestJournalEndsWhatWasLeft(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir)
	i := tenure{services.BlkBack, "7.1", 7}
	must(t, j.record(j.started(i), j.linked("web-1", i), j.linked("web-2", i), j.entry(audit.ActGuestEnd, "web-2", audit.Done)))
	j.close()
	before := time.Now()
	open(t, dir).close()
	open(t, dir).close()
	ends := records(t, dir)[5:]
	if want := []string{audit.ActGuestEnd + " web-1 done", audit.ActInstanceEnd + " blkback done"}; !slices.Equal(ends, want) {
		t.Errorf("%q, want %q", ends, want)
	}
	later, err := audit.Exposed(audit.Records(filepath.Join(dir, AuditDir)), services.BlkBack, time.Now(), time.Now())
	if err != nil || len(later) != 0 {
		t.Errorf("exposed afterwards: %v %v", later, err)
	}
	then, err := audit.Exposed(audit.Records(filepath.Join(dir, AuditDir)), services.BlkBack, before, before)
	if err != nil || len(then) != 1 || then[0].Guest != "web-1" {
		t.Errorf("exposed before: %v %v", then, err)
	}
}

// served calls a handler as a peer would.
func served(t *testing.T, h rpc.Handler) func(method string, in any) error {
	t.Helper()
	a, b, err := ipc.Pipe()
	must(t, err)
	ours, theirs := rpc.New(a, nil), rpc.New(b, h)
	done := make(chan struct{}, 2)
	for _, p := range []*rpc.Peer{ours, theirs} {
		go func() { _ = p.Run(context.Background()); done <- struct{}{} }()
	}
	t.Cleanup(func() { ours.Close(); theirs.Close(); <-done; <-done })
	return func(method string, in any) error {
		_, err := ours.Call(t.Context(), method, in, nil)
		return err
	}
}

// TestCallsAreRecorded: before anything is done it is in the log who asked, and afterwards what
// came of it; and where the log cannot be written, nothing is done.
func TestCallsAreRecorded(t *testing.T) {
	dir := t.TempDir()
	b := &Builder{journal: open(t, dir), guests: map[string]*guest{}, log: quiet()}
	calls := 0
	call := served(t, b.recorded("acme", func(_ context.Context, r *rpc.Request) (any, error) {
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
	for r, err := range audit.Records(filepath.Join(dir, AuditDir)) {
		must(t, err)
		if r.Actor.UID == who.UID && r.Actor.PID == who.PID && r.Actor.Service == services.Toolstack && r.Detail["uuid"] == "u1" {
			n++
		}
	}
	if n != 4 {
		t.Errorf("%d records name the caller", n)
	}
	b.journal.w.Close()
	calls = 0
	if err := call(protocol.MethodStop, protocol.Stop{UUID: "u1"}); rpc.KindOf(err) != rpc.Unavailable || calls != 0 {
		t.Errorf("without a log: %v, %d calls", err, calls)
	}
}

// TestRefusalsDoNotFillTheLog: a service that makes calls it may not make is in the log, and
// cannot fill it.
func TestRefusalsDoNotFillTheLog(t *testing.T) {
	dir := t.TempDir()
	b := &Builder{journal: open(t, dir), log: quiet()}
	call := served(t, b.refusals(services.Emulator, "web-1", func(context.Context, *rpc.Request) (any, error) {
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
	for r, err := range audit.Records(filepath.Join(dir, AuditDir)) {
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
