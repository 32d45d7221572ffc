package validator

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/response"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/schedule"
	"redoubt.dev/redoubt/validation/verdict"
)

const uuid = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a01"

// A fake is a guest and its inspectors: it notes what is done to it, and is as the test says.
type fake struct {
	t    *testing.T
	m    *Manager
	spec spec.Guest

	mu       sync.Mutex
	log      []string
	held     map[protocol.Holder]bool
	open     bool
	masked   [][]int // of the next traps
	status   []uint32
	inFlight []int // of the next snapshots
	scans    []func(ctx context.Context, q asked.Scan) ([]baseline.Finding, error)
	failed   string
	mute     error  // of a look
	onHold   func() // nil: nothing
}

func newFake(t *testing.T, v *spec.Validation) *fake {
	t.Helper()
	was := commitTime
	commitTime = time.Millisecond
	t.Cleanup(func() { commitTime = was })
	dir := t.TempDir()
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	j, err := audit.OpenJournal(dir, audit.Actor{Service: "builder"}, log, audit.Alive{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.Close)
	ledger, err := response.Open(filepath.Join(dir, response.LedgerFile))
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t, held: map[protocol.Holder]bool{}}
	f.spec = spec.Guest{Name: "web", Disks: []spec.Disk{{Path: "/disk"}}, NICs: []spec.NIC{{VLAN: 1}}, Validation: v}
	f.m, err = New(Options{Dir: filepath.Join(dir, "validation"), Log: log, Journal: j, Scanner: f, Ledger: ledger, Revoke: f.revoke})
	if err != nil {
		t.Fatal(err)
	}
	f.sign()
	f.m.Begin(f)
	t.Cleanup(func() {
		f.m.End(uuid)
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.open || f.held[protocol.HolderValidation] {
			t.Errorf("a snapshot is left (%v), or the guest held (%v)", f.open, f.held)
		}
	})
	return f
}

// sign gives the guest a baseline.
func (f *fake) sign() {
	f.t.Helper()
	key, err := baseline.GenerateKey()
	if err != nil {
		f.t.Fatal(err)
	}
	var text strings.Builder
	h := baseline.Header{Guest: uuid, Version: 1, Created: time.Unix(1, 0).UTC(), Rules: baseline.DefaultRules()}
	if err := baseline.Write(&text, h, slices.Values([]baseline.Entry(nil))); err != nil {
		f.t.Fatal(err)
	}
	if err := f.m.write(uuid, fileDraft, []byte(text.String())); err != nil {
		f.t.Fatal(err)
	}
	signed, err := baseline.Sign([]byte(text.String()), key)
	if err != nil {
		f.t.Fatal(err)
	}
	public, _ := key.Public().(ed25519.PublicKey)
	if _, err := f.m.sign(uuid, spec.Validation{}, signed[text.Len():], baseline.FormatPublicKey(public)); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fake) note(format string, a ...any) { f.log = append(f.log, fmt.Sprintf(format, a...)) }

func (f *fake) UUID() string                 { return uuid }
func (f *fake) Name() string                 { return "web" }
func (f *fake) Owner() (tenant, name string) { return "default", "web" }
func (f *fake) Spec() *spec.Guest            { return &f.spec }
func (f *fake) Tell(kind, text string)       {}
func (f *fake) View() ([]asked.Disk, error)  { return nil, nil }
func (f *fake) Restrict(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, _ := f.m.Ledger.Get(uuid)
	f.note("restrict %v", r.Quarantined)
	return nil
}

func (f *fake) revoke(_ context.Context, _ string, revoked bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("revoke %v", revoked)
	return nil
}

func (f *fake) Fail(reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failed = reason
}

func (f *fake) Hold(_ context.Context, in protocol.Hold, files ...*os.File) (out protocol.Held, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.onHold != nil {
		f.onHold()
	}
	f.held[in.Who] = true
	f.note("hold %s", in.Who)
	if len(files) == 0 {
		return out, nil
	}
	_, _ = files[0].Write([]byte{1})
	f.mu.Unlock()
	n, _ := files[1].Read(make([]byte, 1))
	f.mu.Lock()
	out.Begun = n == 1
	if len(f.masked) > 0 {
		out.Masked, f.masked = f.masked[0], f.masked[1:]
	}
	if len(f.status) > 0 {
		out.Status, f.status = f.status[0], f.status[1:]
	}
	if !in.Keep {
		f.held[in.Who] = false
		f.note("let go %s", in.Who)
		out.Took = time.Millisecond
	}
	return out, f.mute
}

func (f *fake) LetGo(_ context.Context, who protocol.Holder) (out protocol.WasHeld, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held[who] = false
	f.note("let go %s", who)
	return protocol.WasHeld{Took: time.Millisecond}, nil
}

func (f *fake) Snapshot(_ context.Context, validated, force bool, stopped, begun *os.File) (out protocol.Snapshotted, err error) {
	if n, _ := stopped.Read(make([]byte, 1)); n != 1 {
		return out, errors.New("the guest was not stopped")
	}
	defer func() { _, _ = begun.Write([]byte{1}) }()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.inFlight) > 0 {
		out.InFlight, f.inFlight = f.inFlight[0], f.inFlight[1:]
	}
	if out.InFlight > 0 && !force {
		f.note("in flight")
		return out, nil
	}
	if !f.held[protocol.HolderValidation] {
		f.t.Error("a snapshot of a guest that runs")
	}
	f.open = true
	f.note("snapshot %v", validated)
	return out, nil
}

func (f *fake) DropSnapshot(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = false
	f.note("drop")
	return nil
}

// Scan implements Scanner.
func (f *fake) Scan(ctx context.Context, _ string, _ []asked.Disk, q asked.Scan) (out asked.Answer, err error) {
	f.mu.Lock()
	f.note("scan %v", q.Changed)
	var do func(context.Context, asked.Scan) ([]baseline.Finding, error)
	if len(f.scans) > 0 {
		do, f.scans = f.scans[0], f.scans[1:]
	}
	f.mu.Unlock()
	var found []baseline.Finding
	if do != nil {
		if found, err = do(ctx, q); err != nil {
			return out, err
		}
	}
	b, err := json.Marshal(baseline.Comparison{Findings: found})
	if err != nil {
		return out, err
	}
	if out.Answer, err = text("answer", b); err != nil {
		return out, err
	}
	out.Index.File, err = memfd.New("index", 4096)
	out.Index.Size = 1
	return out, err
}

// did is what was done since the last time.
func (f *fake) did() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := strings.Join(f.log, ", ")
	f.log = nil
	return s
}

func (f *fake) validate(in protocol.Validate) (*verdict.Report, error) {
	f.t.Helper()
	in.UUID = uuid
	v, err := f.m.Validate(f.t.Context(), in, &rpc.Request{})
	if err != nil {
		return nil, err
	}
	w, ok := v.(rpc.WithFiles)
	if !ok {
		f.t.Fatalf("%T", v)
	}
	a, _ := w.Value.(protocol.Answered)
	b := make([]byte, a.Size)
	if _, err := w.Files[0].ReadAt(b, 0); err != nil {
		f.t.Fatal(err)
	}
	w.Files[0].Close()
	var r verdict.Report
	if err := json.Unmarshal(b, &r); err != nil {
		f.t.Fatal(err)
	}
	return &r, nil
}

func finds(paths ...string) func(context.Context, asked.Scan) ([]baseline.Finding, error) {
	return func(context.Context, asked.Scan) (all []baseline.Finding, err error) {
		for _, p := range paths {
			all = append(all, baseline.Finding{Kind: baseline.Changed, Name: baseline.Name{Volume: "disk0", Path: p}, Severity: baseline.Critical})
		}
		return all, nil
	}
}

func (f *fake) want(want string) {
	f.t.Helper()
	if got := f.did(); got != want {
		f.t.Errorf("it did\n%s, not\n%s", got, want)
	}
}

// TestClean: the guest goes on before its disk is read, and the next validation reads what changed.
func TestClean(t *testing.T) {
	f := newFake(t, nil)
	r, err := f.validate(protocol.Validate{})
	if err != nil || len(r.Findings) > 0 || len(r.Snapshots) != 1 || !r.Snapshots[0].Safe || r.Baseline != 1 {
		t.Fatal(r, err)
	}
	f.want("hold validation, snapshot false, let go validation, scan false, drop")
	if _, err := f.validate(protocol.Validate{}); err != nil {
		t.Fatal(err)
	}
	f.want("hold validation, snapshot true, let go validation, scan true, drop")
	if _, err := f.validate(protocol.Validate{Full: true}); err != nil {
		t.Fatal(err)
	}
	f.want("hold validation, snapshot true, let go validation, scan false, drop")
}

// noMomentLog is what the log has of a moment that was not safe: its snapshot is dropped, when the guest goes on.
func noMomentLog(validated bool) string {
	return fmt.Sprintf("hold validation, snapshot %v, let go validation, drop", validated)
}

// TestNotSafe: moments that are not safe are let pass, and what changed until then is looked at with the next one; after so many it is given up, or taken all the same where that was asked.
func TestNotSafe(t *testing.T) {
	f := newFake(t, &spec.Validation{Tries: 3})
	f.masked, f.inFlight = [][]int{{0}, nil, nil}, []int{0, 2, 0}
	r, err := f.validate(protocol.Validate{})
	if err != nil || r.Snapshots[0].Tries != 3 || !r.Snapshots[0].Safe {
		t.Fatal(r, err)
	}
	f.want(noMomentLog(false) + ", hold validation, in flight, let go validation, hold validation, snapshot false, let go validation, scan false, drop")
	f.masked = [][]int{{0}, {0, 1}, {1}}
	if _, err = f.validate(protocol.Validate{}); err == nil || !strings.Contains(err.Error(), "no safe moment in 3; at the last, interrupts are off on processors 1") {
		t.Fatal(err)
	}
	f.want(noMomentLog(true) + ", " + noMomentLog(false) + ", " + noMomentLog(false))
	f.masked, f.inFlight = [][]int{{0}, {0}, {0}, {0}}, []int{0, 0, 0, 1}
	r, err = f.validate(protocol.Validate{Force: true})
	if err != nil || r.Snapshots[0].Safe || !strings.Contains(r.Snapshots[0].Why, "forced: interrupts are off on processors 0; 1 request of the disks in flight") {
		t.Fatal(r, err)
	}
	f.want(strings.Repeat(noMomentLog(false)+", ", 3) + "hold validation, snapshot false, let go validation, scan true, drop")
	f.mute = errors.New("no register is told")
	if _, err = f.validate(protocol.Validate{Force: true}); err == nil || !strings.Contains(err.Error(), "no register is told") {
		t.Fatal(err)
	}
	again := func(validated bool) string { // that it goes on is asked for also where it may do so already
		return strings.Replace(noMomentLog(validated), "let go validation, ", "let go validation, let go validation, ", 1)
	}
	f.want(again(true) + strings.Repeat(", "+again(false), 3))
}

// TestConfirmed: only what a second snapshot shows, too, acts; the ledger has it before it is in force.
func TestConfirmed(t *testing.T) {
	f := newFake(t, &spec.Validation{Respond: spec.Respond{Critical: []spec.Response{spec.Quarantine, spec.Pause}}})
	f.scans = append(f.scans, finds("/a", "/b"), finds("/b", "/c"))
	r, err := f.validate(protocol.Validate{})
	if err != nil || len(r.Findings) != 1 || r.Findings[0].Name.Path != "/b" || len(r.Withdrawn) != 1 || len(r.Snapshots) != 2 ||
		!slices.Equal(r.Responses, []spec.Response{spec.Quarantine, spec.Pause}) {
		t.Fatalf("%+v, %v", r, err)
	}
	f.want("hold validation, snapshot false, let go validation, scan false, drop, hold validation, snapshot true, let go validation, scan true, drop, restrict true, hold verdict")
	in, reason, _ := f.m.inForce(uuid)
	if !slices.Equal(in, []spec.Response{spec.Quarantine, spec.Pause}) || !strings.Contains(reason, "/b") {
		t.Error(in, reason)
	}
	if err := f.m.MayStart("default", uuid, "web"); err == nil || !strings.Contains(err.Error(), "redoubt release web") {
		t.Error(err)
	}
	if err := f.m.Release(t.Context(), protocol.Control{UUID: uuid}, f); err != nil {
		t.Fatal(err)
	}
	f.want("restrict false, let go verdict")
	f.scans = append(f.scans, finds("/a"), finds())
	if r, err = f.validate(protocol.Validate{}); err != nil || len(r.Findings) != 0 || len(r.Withdrawn) != 1 || len(r.Responses) != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
}

// TestLost: a validation that came to nothing costs no change: the next one has them all.
func TestLost(t *testing.T) {
	f := newFake(t, nil)
	if _, err := f.validate(protocol.Validate{}); err != nil {
		t.Fatal(err)
	}
	f.scans = append(f.scans, func(context.Context, asked.Scan) ([]baseline.Finding, error) {
		return nil, errors.New("the snapshot is lost")
	})
	f.did()
	if _, err := f.validate(protocol.Validate{}); err == nil || !strings.Contains(err.Error(), "the snapshot is lost") {
		t.Fatal(err)
	}
	f.want("hold validation, snapshot true, let go validation, scan true, drop")
	if _, err := f.validate(protocol.Validate{}); err != nil {
		t.Fatal(err)
	}
	f.want("hold validation, snapshot false, let go validation, scan true, drop")
}

// TestGone: a guest that goes down during a validation ends it: who asked is told, nothing is left.
func TestGone(t *testing.T) {
	f := newFake(t, &spec.Validation{Hold: true})
	scanning := make(chan struct{})
	f.scans = append(f.scans, func(ctx context.Context, _ asked.Scan) ([]baseline.Finding, error) {
		close(scanning)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	asked := make(chan error, 1)
	go func() {
		_, err := f.m.Validate(t.Context(), protocol.Validate{UUID: uuid}, &rpc.Request{})
		asked <- err
	}()
	<-scanning
	f.m.End(uuid)
	if err := <-asked; err == nil {
		t.Error("who asked is told of no end")
	}
	if _, err := f.m.Validate(t.Context(), protocol.Validate{UUID: uuid}, &rpc.Request{}); rpc.KindOf(err) != rpc.Unavailable {
		t.Error(err)
	}
}

// TestHeld: with hold the guest goes on when the verdict is there.
func TestHeld(t *testing.T) {
	f := newFake(t, &spec.Validation{Hold: true})
	if _, err := f.validate(protocol.Validate{}); err != nil {
		t.Fatal(err)
	}
	f.want("hold validation, snapshot false, scan false, drop, let go validation")
}

// TestByItself: a guest is validated after so much was written, without anybody who asks.
func TestByItself(t *testing.T) {
	f := newFake(t, &spec.Validation{Written: 1 << 20})
	scanned := make(chan struct{}, 1)
	f.scans = append(f.scans, func(context.Context, asked.Scan) ([]baseline.Finding, error) {
		scanned <- struct{}{}
		return nil, nil
	})
	f.m.Wrote(uuid, 1<<19)
	f.m.Wrote(uuid, 1<<20)
	<-scanned
}

// TestNoBaseline: nothing is due before there is a baseline, and whoever asks is told.
func TestNoBaseline(t *testing.T) {
	f := newFake(t, &spec.Validation{Written: 1 << 20})
	f.m.End(uuid)
	if err := os.Remove(filepath.Join(f.m.dir(uuid), fileBaseline)); err != nil {
		t.Fatal(err)
	}
	f.m.Begin(f)
	f.m.Wrote(uuid, 1<<21)
	if _, err := f.m.Validate(t.Context(), protocol.Validate{UUID: uuid}, &rpc.Request{}); !errors.Is(err, errNone) {
		t.Error(err)
	}
	none := f.m.with(t.Context(), uuid, func(_ context.Context, w *worker) error { return nil }) // what was written was taken in
	if none != nil || f.did() != "" {
		t.Errorf("%v: without a baseline it is validated", none)
	}
	if err := os.RemoveAll(f.m.dir(uuid)); err != nil {
		t.Fatal(err)
	}
	scanned := make(chan struct{}, 1)
	f.mu.Lock()
	f.scans = append(f.scans, func(context.Context, asked.Scan) ([]baseline.Finding, error) {
		scanned <- struct{}{}
		return nil, nil
	})
	f.mu.Unlock()
	f.sign()
	if err := f.m.with(t.Context(), uuid, func(_ context.Context, w *worker) error {
		w.step(schedule.Event{Kind: schedule.Resumed})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	<-scanned
}
