package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

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
		write(t, dir, headFile, Head{last.Seq, last.Hash}.Line())
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
		"edited":         {bytes.Replace(text, []byte("guest-1"), []byte("guest-2"), 1), head.Line(), Edited},
		"cut":            {bytes.Join(lines[:2], nil), head.Line(), TailCut},
		"cut in between": {slices.Concat(lines[0], lines[2], lines[3]), head.Line(), Missing},
		"other head":     {text, Head{head.Seq, Hash{1}}.Line(), TailCut},
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
	write(t, dir, headFile, head.Line())
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
