package asked

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/job"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
	"redoubt.dev/redoubt/validation/verdict"
)

const guest = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a01"

// badScan is what an inspector that was taken over does in place of a scan.
func badScan(ctx context.Context, r *rpc.Request, disks []*os.File) (any, error) {
	var in protocol.Scan
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	switch what := in.Accept[0]; what {
	case "die":
		return nil, unix.Kill(os.Getpid(), unix.SIGKILL)
	case "hang":
		<-ctx.Done()
		return nil, ctx.Err()
	case "lie":
		return protocol.Scanned{Answer: protocol.MaxAnswer + 1}, nil
	case "lie more":
		return protocol.Scanned{Index: -1}, nil
	case "talk":
		return nil, rpc.Errorf(rpc.Exists, "%s", strings.Repeat("x", 4096))
	default:
		for i, f := range disks { // whichever it was given
			if err := attacks[what](f); err == nil {
				return protocol.Scanned{}, fmt.Errorf("done to %d", i)
			}
		}
		return protocol.Scanned{}, nil
	}
}

func newScanner(t *testing.T, program string, confined bool) *Scanner {
	t.Helper()
	a := newAsker(t, program, confined)
	return NewScanner(a.Journal, a.Start)
}

// A disk is an image with a file system on it and what belongs to it while its guest runs.
type disk struct {
	path     string
	size     int64
	changes  *os.File
	snapshot *os.File
	writer   *block.Tracked
}

const scratch = block.MinScratch

func newDisk(t *testing.T) *disk {
	t.Helper()
	f, err := os.Open("testdata/disk.img.gz")
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	d := &disk{path: filepath.Join(t.TempDir(), "disk.img"), size: 8 << 20}
	image, err := io.ReadAll(z)
	must(t, err)
	must(t, os.WriteFile(d.path, image, 0o600))
	d.changes, err = memfd.New("changes", block.ChangesSize(d.size))
	must(t, err)
	img, err := block.Open(d.path, false)
	must(t, err)
	c, err := block.OpenChanges(d.changes, d.size)
	must(t, err)
	d.writer = block.NewTracked(img, c, nil)
	t.Cleanup(func() { must(t, d.writer.Close()) })
	return d
}

// begin begins a snapshot and gives what an inspector gets of it.
func (d *disk) begin(t *testing.T, validated bool) []Disk {
	t.Helper()
	var err error
	d.snapshot, err = memfd.New("snapshot", block.SnapshotSize(scratch))
	must(t, err)
	s, err := block.OpenSnapshot(d.snapshot, d.size, scratch)
	must(t, err)
	d.writer.Hold()
	err = d.writer.Begin(s, validated)
	d.writer.Release()
	must(t, err)
	out := Disk{Scratch: scratch}
	for from, to := range map[*os.File]**os.File{d.changes: &out.Changes, d.snapshot: &out.Snapshot} {
		*to, err = memfd.ReadOnly(from)
		must(t, err)
	}
	out.Image, err = os.Open(d.path)
	must(t, err)
	return []Disk{out}
}

// change overwrites a file's contents in place, as the guest's kernel does.
func (d *disk) change(t *testing.T, was, is string) {
	t.Helper()
	b, err := os.ReadFile(d.path)
	must(t, err)
	at := bytes.Index(b, []byte(was))
	if at < 0 {
		t.Fatalf("no %q on the disk", was)
	}
	_, err = d.writer.WriteAt([]byte(is), int64(at))
	must(t, err)
}

func content(t *testing.T, text Text) []byte {
	t.Helper()
	b := make([]byte, text.Size)
	if len(b) > 0 {
		_, err := text.File.ReadAt(b, 0)
		must(t, err)
	}
	return b
}

func inMemory(t *testing.T, b []byte) Text {
	t.Helper()
	f, err := memfd.New("text", int64(len(b)))
	must(t, err)
	_, err = f.WriteAt(b, 0)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return Text{f, len(b)}
}

// TestScan: in its sandbox an inspector drafts a baseline of a snapshot and finds what changes afterwards, by the changes alone;
// what changes during its scan it does not see, nor what it is told by a damaged index.
func TestScan(t *testing.T) {
	s, d := newScanner(t, program, true), newDisk(t)
	scan := func(validated bool, q Scan) Answer {
		t.Helper()
		q.Guest = guest
		a, err := s.Scan(t.Context(), "g", d.begin(t, validated), q)
		must(t, err)
		return a
	}
	drafted := scan(false, Scan{Draft: true, Created: time.Unix(1, 0).UTC()})
	if !drafted.Full || drafted.Version != 1 || drafted.Entries < 3 {
		t.Fatalf("%+v", drafted.Scanned)
	}
	text := content(t, drafted.Answer)
	b, err := baseline.Open(text)
	must(t, err)
	must(t, b.Check())
	held := inMemory(t, text)
	compare := func(validated bool, q Scan) (baseline.Comparison, Answer) {
		t.Helper()
		q.Baseline = held
		a := scan(validated, q)
		var c baseline.Comparison
		must(t, json.Unmarshal(content(t, a.Answer), &c))
		return c, a
	}
	c, first := compare(true, Scan{Changed: true, Index: drafted.Index})
	if len(c.Findings) != 0 || first.Full || first.Read != 0 {
		t.Fatalf("%+v, %+v", c, first.Scanned)
	}
	d.change(t, "what runs at login", "WHAT runs at login")
	c, second := compare(true, Scan{Changed: true, Index: first.Index, Last: first.Answer})
	if len(c.Findings) != 1 || c.Findings[0].Name.Path != "/usr/bin/login" || c.Findings[0].Kind != baseline.Changed || second.Full || second.Read > 2 { // two blocks of this file system share a bit of the map
		t.Fatalf("%+v, %+v", c, second.Scanned)
	}
	d.change(t, "WHAT runs at login", "what runs at login")
	disks := d.begin(t, true)
	d.change(t, "what runs at login", "what runs LATER...") // after the snapshot
	a, err := s.Scan(t.Context(), "g", disks, Scan{Guest: guest, Baseline: held, Changed: true, Index: second.Index, Last: second.Answer})
	must(t, err)
	c = baseline.Comparison{}
	must(t, json.Unmarshal(content(t, a.Answer), &c))
	if len(c.Findings) != 0 || a.Full {
		t.Fatalf("%+v, %+v", c, a.Scanned)
	}
	c, third := compare(true, Scan{Changed: true, Index: inMemory(t, []byte("no index"))})
	if len(c.Findings) != 1 || !third.Full || third.Why == "" {
		t.Fatalf("%+v, %+v", c, third.Scanned)
	}
}

// TestScanLost: a guest that overwrites more than there is room for costs the answer.
func TestScanLost(t *testing.T) {
	s, d := newScanner(t, program, true), newDisk(t)
	disks := d.begin(t, false)
	free := make([]byte, 1<<20)
	for at := int64(4 << 20); at < d.size; at += int64(len(free)) { // where nothing lies
		_, err := d.writer.WriteAt(free, at)
		must(t, err)
	}
	_, err := s.Scan(t.Context(), "g", disks, Scan{Guest: guest, Draft: true})
	if rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), "give validation.scratch more") {
		t.Errorf("%v", err)
	}
}

// TestDisksAreReadOnly: an inspector that was taken over changes neither image nor snapshot nor map. With descriptors to write, and
// without the sandbox, all attacks succeed.
func TestDisksAreReadOnly(t *testing.T) {
	for name, c := range map[string]struct{ confined, readOnly bool }{
		"as it is": {true, true}, "without the sandbox": {false, true}, "without any of the two": {false, false},
	} {
		s := newScanner(t, badProgram, c.confined)
		for attack := range attacks {
			d := newDisk(t)
			disks := d.begin(t, false)
			if !c.readOnly {
				disks[0].Image.Close()
				w, err := os.OpenFile(d.path, os.O_RDWR, 0)
				must(t, err)
				disks[0].Image = w
			}
			before := sums(t, d)
			_, err := s.Scan(t.Context(), "g", disks, Scan{Guest: guest, Accept: []string{attack}})
			changed := sums(t, d) != before
			done := err != nil && strings.Contains(err.Error(), "done to")
			if want := !c.readOnly || attack == reopen && !c.confined; changed != want && attack != "hole" || done != want {
				t.Errorf("%s: %s: changed: %v (%v)", name, attack, changed, err)
			}
		}
	}
}

func sums(t *testing.T, d *disk) (all string) {
	t.Helper()
	for _, path := range []string{d.path, fmt.Sprintf("/proc/self/fd/%d", d.changes.Fd()), fmt.Sprintf("/proc/self/fd/%d", d.snapshot.Fd())} {
		b, err := os.ReadFile(path)
		must(t, err)
		all += fmt.Sprintf("%x ", hash(b))
	}
	return all
}

func hash(b []byte) (h uint64) {
	for _, c := range b {
		h = h*31 + uint64(c)
	}
	return h
}

// TestBadScan: an inspector that dies, hangs, lies or talks costs the answer, within bounds.
func TestBadScan(t *testing.T) {
	s, d := newScanner(t, badProgram, false), newDisk(t)
	for what, died := range map[string]bool{"die": true, "hang": true, "lie": false, "lie more": false, "talk": false} {
		if s.Limit = time.Minute; what == "hang" {
			s.Limit = 300 * time.Millisecond
		}
		a, err := s.Scan(t.Context(), "g", d.begin(t, false), Scan{Guest: guest, Accept: []string{what}})
		if err == nil || errors.Is(err, job.ErrDied) != died || len(err.Error()) > 2*maxWords || a.Index.File != nil || a.Answer.File != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for range most {
		s.slots <- struct{}{}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Scan(ctx, "g", d.begin(t, false), Scan{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestScanSeen: an inspector holds the disk to what the guest shows of it. The findings are not part of the comparison that the
// next one goes on from.
func TestScanSeen(t *testing.T) {
	s, d := newScanner(t, program, true), newDisk(t)
	b, err := os.ReadFile(d.path)
	must(t, err)
	fs, err := ext4.Open(bytes.NewReader(b), d.size, ext4.Options{})
	must(t, err)
	var all, without string
	for e, err := range fs.Walk() {
		must(t, err)
		all += e.Path + "\x00"
		if e.Path != "/usr/bin/login" {
			without += e.Path + "\x00"
		}
	}
	drafted, err := s.Scan(t.Context(), "g", d.begin(t, false), Scan{Guest: guest, Draft: true, Created: time.Unix(1, 0).UTC()})
	must(t, err)
	q := Scan{Guest: guest, Baseline: inMemory(t, content(t, drafted.Answer)), Changed: true, Index: drafted.Index}
	seen := func(text, volume string) (c verdict.Compared, err error) {
		t.Helper()
		q.Listing, q.Seen = inMemory(t, []byte(text)), &protocol.Seen{Size: len(text), Begun: time.Now(), Taken: time.Now(), Volume: volume}
		a, err := s.Scan(t.Context(), "g", d.begin(t, true), q)
		if err == nil {
			q.Index, q.Last = a.Index, a.Answer
			must(t, json.Unmarshal(content(t, a.Answer), &c))
		}
		return c, err
	}
	c, err := seen(all, "")
	if err != nil || c.Hidden == nil || len(c.All()) != 0 || c.Hidden.Names < 3 || c.Hidden.Volume != "disk0" {
		t.Fatalf("%+v, %v", c.Hidden, err)
	}
	c, err = seen(without, "disk0")
	if err != nil || len(c.Findings) != 0 || len(c.All()) != 1 || c.All()[0].Kind != baseline.Hidden || c.All()[0].Name.Path != "/usr/bin/login" {
		t.Fatalf("%+v, %v", c, err)
	}
	if c, err = seen(all, "disk0"); err != nil || len(c.All()) != 0 { // what was hidden last is forgotten
		t.Fatalf("%+v, %v", c, err)
	}
	for text, volume := range map[string]string{"/usr": "", "/\x00": "disk1p1"} {
		if _, err := seen(text, volume); rpc.KindOf(err) != rpc.Invalid {
			t.Errorf("%q of %q: %v", text, volume, err)
		}
	}
}
