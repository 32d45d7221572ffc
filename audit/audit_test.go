package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	text, head := logOf(t, 3)
	if r := checkBytes(text, head); len(r.Findings) > 0 || r.Head != head {
		t.Fatal(r)
	}
	line := 1
	for i := range text {
		for _, v := range []byte{text[i] ^ 1, text[i] ^ 2, text[i] ^ 4, text[i] ^ 32, text[i] ^ 128, ' ', '\n', '"'} {
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
