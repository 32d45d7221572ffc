package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// t0 is when the tests' logs begin.
var t0 = time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC)

func entry(i int) Entry {
	return Entry{
		Time: t0.Add(time.Duration(i) * time.Minute), Act: "start-guest", Object: fmt.Sprintf("guest-%d", i), Outcome: Done,
		Actor:  Actor{Service: "redoubt-toolstack", UID: 1000, PID: 100 + i, Tenant: "acme"},
		Detail: map[string]string{"b": "<2>", "a": "1\n"},
	}
}

var quick = Options{NoSync: true, Now: func() time.Time { return t0 }}

func open(t testing.TB, dir string, o Options) *Writer {
	t.Helper()
	w, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

func appendN(t testing.TB, w *Writer, from, to int) Head {
	t.Helper()
	var h Head
	var err error
	for i := from; i < to; i++ {
		if h, err = w.Append(entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func verify(t testing.TB, dir string, heads ...Head) Report {
	t.Helper()
	r, err := Verify(dir, heads...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func whole(t testing.TB, dir string, records uint64, heads ...Head) {
	t.Helper()
	r := verify(t, dir, heads...)
	if len(r.Findings) > 0 || r.Records != records {
		t.Fatalf("%d records, want %d; %v", r.Records, records, r.Findings)
	}
}

// Written, closed, continued, in segments: whole, and read back as it was written.
func TestWriteReadVerify(t *testing.T) {
	dir := t.TempDir()
	o := quick
	o.SegmentSize = 1000
	w := open(t, dir, o)
	appendN(t, w, 0, 5)
	w.Close()
	if _, err := w.Append(entry(0)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	w = open(t, dir, Options{SegmentSize: 1000})
	h := appendN(t, w, 5, 10)
	if h != w.Head() || h.Seq != 11 {
		t.Errorf("head %v", h)
	}
	whole(t, dir, 11, h)
	segs, err := segments(dir)
	if err != nil || len(segs) < 3 {
		t.Fatalf("%d segments, %v", len(segs), err)
	}
	n := 0
	for r, err := range Records(dir) {
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			want := entry(n - 1)
			if fmt.Sprint(r.Entry) != fmt.Sprint(want) {
				t.Errorf("%v, want %v", r.Entry, want)
			}
		} else if r.Act != ActBegin {
			t.Errorf("first record: %v", r)
		}
		n++
	}
	if n != 11 {
		t.Errorf("%d records", n)
	}
}

func TestAppendRefuses(t *testing.T) {
	w := open(t, t.TempDir(), quick)
	for want, change := range map[string]func(*Entry){
		"no act":       func(e *Entry) { e.Act = "" },
		"outcome":      func(e *Entry) { e.Outcome = "maybe" },
		"not UTF-8":    func(e *Entry) { e.Object = "\xff" },
		"is not UTF-8": func(e *Entry) { e.Detail = map[string]string{"\xff": ""} },
		"at most":      func(e *Entry) { e.Object = strings.Repeat("x", MaxLine) },
		"year":         func(e *Entry) { e.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		e := entry(1)
		change(&e)
		if _, err := w.Append(e); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if h := appendN(t, w, 0, 1); h.Seq != 2 { // a refused entry leaves no trace
		t.Errorf("%v", h)
	}
}

// logOf is the text of a log of n records in one piece, and its head.
func logOf(t testing.TB, n int) ([]byte, Head) {
	t.Helper()
	dir := t.TempDir()
	w := open(t, dir, quick)
	h := appendN(t, w, 0, n-1)
	b, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	return b, h
}

func checkBytes(text []byte, heads ...Head) Report {
	return check([]segment{{segmentName(1), func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(text)), nil
	}}}, heads)
}

// Every edit of one byte is found, at its line.
func TestEveryEdit(t *testing.T) {
	text, head := logOf(t, 4)
	if r := checkBytes(text, head); len(r.Findings) > 0 || r.Head != head {
		t.Fatal(r)
	}
	line := 1
	for i := range text {
		for _, v := range []byte{text[i] ^ 1, text[i] ^ 2, text[i] ^ 4, text[i] ^ 8, text[i] ^ 16, text[i] ^ 32, text[i] ^ 64, text[i] ^ 128, ' ', '\n', '"', 0} {
			if v == text[i] {
				continue
			}
			b := bytes.Clone(text)
			b[i] = v
			r := checkBytes(b, head)
			if len(r.Findings) == 0 {
				t.Fatalf("byte %d: %q for %q is not found", i, v, text[i])
			}
			if f := r.Findings[0]; f.Line != line {
				t.Fatalf("byte %d of line %d: %v", i, line, f)
			}
		}
		if text[i] == '\n' {
			line++
		}
	}
}

// Every cut is found: of bytes anywhere with the head known, of lines between others without it.
func TestEveryCut(t *testing.T) {
	text, head := logOf(t, 5)
	for from := range text {
		for _, n := range []int{1, 2, 7, 64, 300, len(text) - from} {
			if from+n > len(text) {
				continue
			}
			b := slices.Concat(text[:from], text[from+n:])
			if r := checkBytes(b, head); len(r.Findings) == 0 {
				t.Fatalf("%d bytes from %d", n, from)
			}
		}
	}
	lines := bytes.SplitAfter(text, []byte("\n"))[:5]
	for from := range lines {
		for to := from + 1; to <= len(lines); to++ {
			b := bytes.Join(slices.Concat(lines[:from], lines[to:]), nil)
			r := checkBytes(b, head)
			want := Finding{Kind: Missing, Line: from + 1, Seq: uint64(to + 1)}
			if to == len(lines) {
				want = Finding{Kind: TailCut, Seq: uint64(from + 1)}
				if r := checkBytes(b); len(r.Findings) > 0 {
					t.Errorf("without a head a cut tail cannot be seen, but: %v", r.Findings)
				}
			}
			if len(r.Findings) != 1 || r.Findings[0].Kind != want.Kind || r.Findings[0].Line != want.Line || r.Findings[0].Seq != want.Seq {
				t.Errorf("lines %d to %d cut: %v, want %v", from+1, to, r.Findings, want)
			}
		}
	}
}

// Every change of order, and every line that is there twice, is found without a head.
func TestEverySwap(t *testing.T) {
	text, _ := logOf(t, 6)
	lines := bytes.SplitAfter(text, []byte("\n"))[:6]
	for i := range lines {
		for j := range lines {
			b := slices.Clone(lines)
			if i == j {
				b = slices.Insert(b, i, b[i])
			} else {
				b[i], b[j] = b[j], b[i]
			}
			if r := checkBytes(bytes.Join(b, nil)); len(r.Findings) == 0 || r.Findings[0].Line > min(i, j)+2 {
				t.Errorf("%d and %d: %v", i, j, r.Findings)
			}
		}
	}
}

// A line of another log, or one with a new hash, does not fit the chain; a log written anew as a
// whole is found by a head only.
func TestForgery(t *testing.T) {
	text, head := logOf(t, 5)
	other, _ := logOf(t, 5)
	lines, others := bytes.SplitAfter(text, []byte("\n")), bytes.SplitAfter(other, []byte("\n"))
	mixed := slices.Clone(lines)
	mixed[2] = others[2]
	r := checkBytes(bytes.Join(mixed, nil))
	if len(r.Findings) != 2 || r.Findings[0].Kind != Rewritten || r.Findings[0].Line != 3 || r.Findings[1].Line != 4 {
		t.Error(r.Findings)
	}
	rec, err := parse(bytes.TrimSuffix(lines[2], []byte("\n")))
	if err != nil {
		t.Fatal(err)
	}
	rec.Outcome = Refused
	rec.Hash = rec.sum()
	if mixed[2], err = rec.encode(); err != nil {
		t.Fatal(err)
	}
	if r := checkBytes(bytes.Join(mixed, nil)); len(r.Findings) != 1 || r.Findings[0].Kind != Rewritten || r.Findings[0].Line != 4 {
		t.Error(r.Findings)
	}
	if r := checkBytes(other); len(r.Findings) > 0 {
		t.Error(r.Findings)
	}
	if r := checkBytes(other, head); len(r.Findings) != 1 || r.Findings[0].Kind != WrongHead {
		t.Error(r.Findings)
	}
	// Too long a line is passed over with bounded memory and the rest is judged.
	long := slices.Concat(lines[0], bytes.Repeat([]byte("x"), 3*MaxLine), []byte("\n"), bytes.Join(lines[1:], nil))
	if r := checkBytes(long, head); len(r.Findings) != 1 || r.Findings[0].Kind != Edited || r.Findings[0].Line != 2 {
		t.Error(r.Findings)
	}
}

// Killed at any byte of a record, the log is continued; what was unfinished is set aside and told.
func TestTornTail(t *testing.T) {
	text, _ := logOf(t, 3)
	lines := bytes.SplitAfter(text, []byte("\n"))
	last, err := parse(bytes.TrimSuffix(lines[1], []byte("\n")))
	if err != nil {
		t.Fatal(err)
	}
	full := len(lines[0]) + len(lines[1])
	for end := full; end <= len(text); end += 13 {
		dir := t.TempDir()
		write(t, dir, segmentName(1), text[:end])
		write(t, dir, headFile, Head{last.Seq, last.Hash}.line())
		if end > full {
			if r := verify(t, dir); len(r.Findings) != 1 || r.Findings[0].Kind != TornTail || r.Findings[0].Line != 3 {
				t.Errorf("%d: %v", end, r.Findings)
			}
		}
		w := open(t, dir, quick)
		h := appendN(t, w, 7, 8)
		w.Close()
		if end == full {
			whole(t, dir, 3, h)
			continue
		}
		whole(t, dir, 4, h)
		torn, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("torn-%020d", 3)))
		if err != nil || !bytes.Equal(torn, text[full:end]) {
			t.Errorf("%d: %q, %v", end, torn, err)
		}
		var acts []string
		for r, err := range Records(dir) {
			if err != nil {
				t.Fatal(err)
			}
			acts = append(acts, r.Act)
		}
		if acts[2] != ActTorn {
			t.Errorf("%d: %v", end, acts)
		}
	}
	// Torn in the very first record, with the head file still empty.
	dir := t.TempDir()
	write(t, dir, segmentName(1), text[:20])
	write(t, dir, headFile, nil)
	w := open(t, dir, quick)
	w.Close()
	whole(t, dir, 2)
	for _, n := range []int{0, 1} { // or before it, or before the head
		dir := t.TempDir()
		write(t, dir, segmentName(1), bytes.Join(lines[:n], nil))
		write(t, dir, headFile, nil)
		whole(t, dir, uint64(n))
		h := appendN(t, open(t, dir, quick), 0, 1)
		whole(t, dir, 2, h)
	}
}

func write(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A writer does not continue a damaged log, and changes nothing in it.
func TestOpenDamaged(t *testing.T) {
	text, head := logOf(t, 4)
	lines := bytes.SplitAfter(text, []byte("\n"))
	for name, c := range map[string]struct {
		text, head []byte
		want       Kind
	}{
		"edited":         {bytes.Replace(text, []byte("guest-1"), []byte("guest-2"), 1), head.line(), Edited},
		"cut":            {bytes.Join(lines[:2], nil), head.line(), TailCut},
		"cut in between": {slices.Concat(lines[0], lines[2], lines[3]), head.line(), Missing},
		"other head":     {text, Head{head.Seq, Hash{1}}.line(), TailCut},
		"no head":        {text, []byte("x"), BadHead},
		"empty head":     {text, nil, BadHead},
	} {
		dir := t.TempDir()
		write(t, dir, segmentName(1), c.text)
		write(t, dir, headFile, c.head)
		_, err := Open(dir, quick)
		var d *DamageError
		if !errors.As(err, &d) || d.Finding.Kind != c.want {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
		if b, _ := os.ReadFile(filepath.Join(dir, segmentName(1))); !bytes.Equal(b, c.text) {
			t.Errorf("%s: the log was changed", name)
		}
		if r := verify(t, dir, head); len(r.Findings) == 0 {
			t.Errorf("%s: verify finds nothing", name)
		}
	}
	dir := t.TempDir()
	write(t, dir, headFile, head.line())
	if _, err := Open(dir, quick); err == nil {
		t.Error("a log whose segments are gone was begun anew")
	}
}

// Whole segments that are gone, or have changed places, are found.
func TestSegments(t *testing.T) {
	make := func() (string, []segment, Head) {
		dir := t.TempDir()
		o := quick
		o.SegmentSize = 900
		w := open(t, dir, o)
		h := appendN(t, w, 0, 8)
		w.Close()
		segs, err := segments(dir)
		if err != nil || len(segs) < 3 {
			t.Fatalf("%d segments, %v", len(segs), err)
		}
		return dir, segs, h
	}
	_, all, _ := make()
	for i := range all {
		dir, segs, h := make()
		if err := os.Remove(filepath.Join(dir, segs[i].name)); err != nil {
			t.Fatal(err)
		}
		want := Missing
		if i == len(segs)-1 {
			want = TailCut
		}
		if r := verify(t, dir, h); len(r.Findings) == 0 || r.Findings[0].Kind != want {
			t.Errorf("segment %d: %v", i, r.Findings)
		}
	}
	dir, segs, h := make()
	a, b := filepath.Join(dir, segs[0].name), filepath.Join(dir, segs[1].name)
	if err := errors.Join(os.Rename(a, a+"x"), os.Rename(b, a), os.Rename(a+"x", b)); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, dir, h); len(r.Findings) == 0 {
		t.Error("two segments changed places")
	}
	// Killed between the new segment and its first record.
	dir, _, h = make()
	write(t, dir, segmentName(h.Seq+1), nil)
	whole(t, dir, h.Seq, h)
	h = appendN(t, open(t, dir, quick), 0, 1)
	whole(t, dir, h.Seq, h)
}

func TestOneWriter(t *testing.T) {
	dir := t.TempDir()
	w := open(t, dir, quick)
	if _, err := Open(dir, quick); !errors.Is(err, ErrLocked) {
		t.Errorf("second writer: %v", err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 20 {
				if _, err := w.Append(entry(100*i + j)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	whole(t, dir, 161, w.Head())
}

// Killed with SIGKILL while it writes, a writer leaves a log that is continued and whole, with all
// records whose Append had returned.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	var atLeast uint64
	for range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), "REDOUBT_TEST_AUDIT="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// A line for each record; at the 50th it is killed.
		buf := make([]byte, 1)
		for n := 0; n < 50; {
			if _, err := out.Read(buf); err != nil {
				t.Fatal(err)
			}
			if buf[0] == '\n' {
				n++
				atLeast++
			}
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if r := verify(t, dir); r.Records < atLeast {
			t.Errorf("%d records, %d were acknowledged", r.Records, atLeast)
		}
		w := open(t, dir, quick)
		w.Close()
		r := verify(t, dir, w.Head())
		if len(r.Findings) > 0 {
			t.Error(r.Findings)
		}
	}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv("REDOUBT_TEST_AUDIT"); dir != "" {
		w, err := Open(dir, Options{NoSync: true, SegmentSize: 4000})
		for i := 0; err == nil; i++ {
			if _, err = w.Append(entry(i)); err == nil {
				_, err = os.Stdout.WriteString("\n")
			}
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// Whatever stands in a line, it is refused with a reason or is the one text of its record.
func FuzzParse(f *testing.F) {
	text, _ := logOf(f, 3)
	for l := range bytes.Lines(text) {
		f.Add(bytes.TrimSuffix(l, []byte("\n")))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := parse(line)
		if err != nil {
			return
		}
		b, err := r.encode()
		if err != nil || !bytes.Equal(b[:len(b)-1], line) {
			t.Fatalf("%q becomes %q, %v", line, b, err)
		}
	})
}

// Whatever stands in a log, checking it ends, with findings in their order of place.
func FuzzCheck(f *testing.F) {
	var text []byte // the same in every process, unlike a Writer's
	var head Head
	for i := range 3 {
		r := &Record{Seq: head.Seq + 1, Entry: entry(i), Prev: head.Hash}
		r.Hash = r.sum()
		b, err := r.encode()
		if err != nil {
			f.Fatal(err)
		}
		text, head = append(text, b...), Head{r.Seq, r.Hash}
	}
	f.Add(text)
	f.Add(text[:len(text)-5])
	f.Fuzz(func(t *testing.T, b []byte) {
		r := checkBytes(b, head)
		if len(r.Findings) == 0 && r.Head != head {
			t.Fatalf("head %v without a finding", r.Head)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, o := range []Options{{}, {NoSync: true}} {
		b.Run(fmt.Sprintf("sync=%v", !o.NoSync), func(b *testing.B) {
			w := open(b, b.TempDir(), o)
			for i := 0; b.Loop(); i++ {
				if _, err := w.Append(entry(i)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
