package audit

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func openJournal(t *testing.T, dir string) *Journal {
	t.Helper()
	j, err := OpenJournal(dir, Actor{Service: "builder"}, slog.New(slog.DiscardHandler), Alive{})
	must(t, err)
	t.Cleanup(j.Close)
	return j
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// records are what the log holds, as text: act, object, outcome.
func records(t *testing.T, dir string) (all []string) {
	t.Helper()
	for r, err := range Records(filepath.Join(dir, Dir)) {
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
		names, err := filepath.Glob(filepath.Join(dir, Dir, "*.log"))
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
			b, err := os.ReadFile(filepath.Join(old, AnchorFile))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, AnchorFile), b, 0o600))
		}, true},
		"edit":    {edit(func(b []byte) []byte { return bytes.Replace(b, []byte("web-1"), []byte("web-2"), 1) }), false},
		"missing": {lines(func(l [][]byte) [][]byte { return slices.Delete(l, 1, 2) }), false},
		"order":   {lines(func(l [][]byte) [][]byte { l[1], l[2] = l[2], l[1]; return l }), false},
		"cut":     {lines(func(l [][]byte) [][]byte { return l[:len(l)-2] }), false},
		// A whole older log with its own head: only the head that is kept apart tells.
		"rolled back": {func(t *testing.T, dir, old string) {
			must(t, os.RemoveAll(filepath.Join(dir, Dir)))
			must(t, os.CopyFS(filepath.Join(dir, Dir), os.DirFS(filepath.Join(old, Dir))))
		}, false},
		"log removed":  {func(t *testing.T, dir, _ string) { must(t, os.RemoveAll(filepath.Join(dir, Dir))) }, false},
		"head removed": {func(t *testing.T, dir, _ string) { must(t, os.Remove(filepath.Join(dir, AnchorFile))) }, false},
		"head edited": {func(t *testing.T, dir, _ string) {
			must(t, os.WriteFile(filepath.Join(dir, AnchorFile), []byte("x"), 0o600))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir, old := t.TempDir(), t.TempDir()
			j := openJournal(t, dir)
			must(t, j.Record(j.Entry("build", "web-1", Asked), j.Entry("build", "web-1", Done)))
			must(t, os.CopyFS(old, os.DirFS(dir)))
			must(t, j.Record(j.Entry("stop", "web-1", Asked)))
			j.Close()
			c.do(t, dir, old)
			was := map[string]string{}
			if b, err := os.ReadFile(filepath.Join(dir, Dir, "00000000000000000001.log")); err == nil {
				was["log"] = string(b)
			}
			j = openJournal(t, dir)
			must(t, j.Record(j.Entry("build", "web-9", Asked)))
			j.Close()
			aside, err := filepath.Glob(filepath.Join(dir, DamagedPrefix+"*"))
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
			if damage, err := Check(dir); damage != "" || err != nil {
				t.Errorf("afterwards: %s %v", damage, err)
			}
		})
	}
}

// TestJournalEndsWhatWasLeft: what a killed Builder left open ended with it.
func TestJournalEndsWhatWasLeft(t *testing.T) {
	dir := t.TempDir()
	j := openJournal(t, dir)
	i := Instance{"blkback", "7.1", 7}
	must(t, j.Record(j.Started(i), j.Linked("web-1", i), j.Linked("web-2", i), j.Entry(ActGuestEnd, "web-2", Done)))
	j.Close()
	before := time.Now()
	openJournal(t, dir).Close()
	openJournal(t, dir).Close()
	ends := records(t, dir)[5:]
	if want := []string{ActGuestEnd + " web-1 done", ActInstanceEnd + " blkback done"}; !slices.Equal(ends, want) {
		t.Errorf("%q, want %q", ends, want)
	}
	later, err := Exposed(Records(filepath.Join(dir, Dir)), "blkback", time.Now(), time.Now())
	if err != nil || len(later) != 0 {
		t.Errorf("exposed afterwards: %v %v", later, err)
	}
	then, err := Exposed(Records(filepath.Join(dir, Dir)), "blkback", before, before)
	if err != nil || len(then) != 1 || then[0].Guest != "web-1" {
		t.Errorf("exposed before: %v %v", then, err)
	}
}
