package validator

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/crossview"
	"redoubt.dev/redoubt/validation/verdict"
)

// listing is a request with a listing of a guest, open to whoever sent it.
func listing(t *testing.T, text string) (protocol.Validate, *rpc.Request, *os.File) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "listing"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	sent, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	in := protocol.Validate{
		UUID: uuid, Seen: &protocol.Seen{Size: len(text), Begun: time.Unix(5, 0), Volume: "disk0"}, Files: protocol.Files{protocol.FileSeen},
	}
	return in, &rpc.Request{Files: []*os.File{sent}}, f
}

// TestSeenSealed: both snapshots are held to the listing as it was sent, with the time of each; what they both do not show counts.
func TestSeenSealed(t *testing.T) {
	f := newFake(t, nil)
	in, r, file := listing(t, "/\x00/etc\x00")
	var texts []string
	var taken []time.Time
	hides := func(paths ...string) func(context.Context, asked.Scan) ([]baseline.Finding, error) {
		return func(_ context.Context, q asked.Scan) (all []baseline.Finding, err error) {
			b, err := read(q.Listing)
			texts, taken = append(texts, string(b)), append(taken, q.Seen.Taken)
			if _, werr := q.Listing.File.WriteAt([]byte("x"), 0); werr == nil {
				t.Error("the listing can be changed")
			}
			if _, werr := file.WriteAt([]byte("/changed"), 0); werr != nil {
				t.Error(werr)
			}
			for _, p := range paths {
				all = append(all, baseline.Finding{Kind: baseline.Hidden, Name: baseline.Name{Volume: "disk0", Path: p}, Severity: baseline.Critical})
			}
			return all, err
		}
	}
	f.scans = append(f.scans, hides("/a", "/b"), hides("/b"))
	v, err := f.m.Validate(t.Context(), in, r)
	if err != nil {
		t.Fatal(err)
	}
	w, _ := v.(rpc.WithFiles)
	a, _ := w.Value.(protocol.Answered)
	b := make([]byte, a.Size)
	if _, err := w.Files[0].ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	var report verdict.Report
	if err := json.Unmarshal(b, &report); err != nil {
		t.Fatal(err)
	}
	if len(report.Findings) != 1 || report.Findings[0].Name.Path != "/b" || len(report.Withdrawn) != 1 {
		t.Errorf("%+v", report)
	}
	if len(texts) != 2 || texts[0] != "/\x00/etc\x00" || texts[1] != texts[0] || !taken[0].Equal(report.Snapshots[0].TakenAt) || !taken[1].After(taken[0]) {
		t.Errorf("the inspectors had %q, of %v", texts, taken)
	}
	f.mu.Lock()
	f.scans = append(f.scans, func(_ context.Context, q asked.Scan) ([]baseline.Finding, error) {
		if q.Seen != nil || q.Listing.File != nil {
			t.Error("the next validation has the listing of the last")
		}
		return nil, nil
	})
	f.mu.Unlock()
	if _, err := f.validate(protocol.Validate{}); err != nil {
		t.Fatal(err)
	}
}

// TestSeenMerged: what a listing does not show is among the findings, each once.
func TestSeenMerged(t *testing.T) {
	finding := func(k baseline.Kind, path string) baseline.Finding {
		return baseline.Finding{Kind: k, Name: baseline.Name{Volume: "disk0", Path: path}}
	}
	c := verdict.Compared{
		Comparison: baseline.Comparison{Findings: []baseline.Finding{finding(baseline.Added, "/b"), finding(baseline.Unreadable, "/c")}},
		Hidden:     &crossview.Result{Findings: []baseline.Finding{finding(baseline.Hidden, "/a"), finding(baseline.Hidden, "/b"), finding(baseline.Unreadable, "/c")}},
	}
	var got []string
	for _, f := range c.All() {
		got = append(got, string(f.Kind)+" "+f.Name.Path)
	}
	if s := strings.Join(got, ", "); s != "hidden /a, added /b, hidden /b, unreadable /c" {
		t.Error(s)
	}
	if len(c.Findings) != 2 {
		t.Error("the comparison itself has changed, from which the next goes on")
	}
}

// TestSeenRefused: a listing that is not what it says is refused, before anything is done.
func TestSeenRefused(t *testing.T) {
	f := newFake(t, nil)
	for name, spoil := range map[string]func(*protocol.Validate, *rpc.Request){
		"size":    func(in *protocol.Validate, _ *rpc.Request) { in.Seen.Size++ },
		"much":    func(in *protocol.Validate, _ *rpc.Request) { in.Seen.Size = protocol.MaxSeen + 1 },
		"none":    func(in *protocol.Validate, _ *rpc.Request) { in.Seen.Size = 0 },
		"time":    func(in *protocol.Validate, _ *rpc.Request) { in.Seen.Begun = time.Time{} },
		"no word": func(in *protocol.Validate, _ *rpc.Request) { in.Seen = nil },
		"no file": func(in *protocol.Validate, r *rpc.Request) { in.Files, r.Files = nil, nil },
		"name":    func(in *protocol.Validate, _ *rpc.Request) { in.Files[0] = protocol.FileRules },
		"names":   func(in *protocol.Validate, _ *rpc.Request) { in.Files = nil },
	} {
		in, r, _ := listing(t, "/\x00")
		sent := r.Files[0]
		spoil(&in, r)
		if _, err := f.m.Validate(t.Context(), in, r); rpc.KindOf(err) != rpc.Invalid {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := sent.Stat(); err == nil && len(r.Files) > 0 {
			t.Errorf("%s: the descriptor is left open", name)
		}
	}
	f.want("")
}

// TestSeenOnce: one listing is looked at at a time, and who brought it is told when the guest goes down.
func TestSeenOnce(t *testing.T) {
	f := newFake(t, &spec.Validation{Tries: spec.MaxTries})
	f.masked = slices.Repeat([][]int{{0}}, spec.MaxTries) // no safe moment comes
	held := make(chan struct{})
	f.onHold = sync.OnceFunc(func() { close(held) })
	first := make(chan error, 1)
	in, r, _ := listing(t, "/\x00")
	go func() {
		_, err := f.m.Validate(t.Context(), in, r)
		first <- err
	}()
	<-held
	in, r, _ = listing(t, "/\x00")
	if _, err := f.m.Validate(t.Context(), in, r); err == nil || !strings.Contains(err.Error(), "another listing") {
		t.Error(err)
	}
	f.m.End(uuid)
	if err := <-first; rpc.KindOf(err) != rpc.Unavailable {
		t.Error(err)
	}
}
