package audit

import (
	"errors"
	"fmt"
	"iter"
	"strings"
	"testing"
	"time"
)

// script is a log of lines "minute act object service instance".
func script(text string) iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		for l := range strings.Lines(text) {
			f := strings.Fields(l)
			if len(f) == 0 {
				continue
			}
			var minute int
			_, err := fmt.Sscan(f[0], &minute)
			r := &Record{Entry: Entry{Time: t0.Add(time.Duration(minute) * time.Minute), Act: f[1], Object: f[2], Outcome: Done}}
			switch {
			case strings.HasPrefix(f[1], "instance-"):
				r.Detail = map[string]string{DetailInstance: f[3]}
			case strings.HasSuffix(f[1], "link"):
				r.Detail = map[string]string{DetailService: f[3], DetailInstance: f[4]}
			}
			if f[len(f)-1] == "refused" {
				r.Outcome = Refused
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

const history = `
	0  instance-start blkback 1
	1  link a blkback 1
	2  link b blkback 1
	3  link n netback 1
	4  unlink a blkback 1
	5  link c blkback 1
	6  instance-end blkback 1
	7  instance-start blkback 2
	8  link c blkback 2
	9  link d blkback 2
	10 link e blkback 2 refused
	11 guest-end d
	12 link f blkback 2
	9  unlink f blkback 2
	20 link g blkback 2
`

func TestExposed(t *testing.T) {
	for _, c := range []struct {
		from, to int
		want     string
	}{
		{-5, 0, ""},
		{0, 1, "a1"},         // begins exactly at to
		{4, 4, "a1 b1"},      // ends exactly at from
		{5, 5, "b1 c1"},      // b was linked before from
		{6, 7, "b1 c1"},      // all ended with the instance
		{7, 7, ""},           // a new instance, nobody yet
		{8, 8, "c2"},         // the same guest, the new instance
		{10, 11, "c2 d2 f2"}, // a clock set back spans both times
		{15, 19, "c2"},       // no end in the log: until now
		{100, 200, "c2 g2"},  // for ever
		{-100, 200, "a1 b1 c1 c2 d2 f2 g2"},
	} {
		got, err := Exposed(script(history), "blkback", t0.Add(time.Duration(c.from)*time.Minute), t0.Add(time.Duration(c.to)*time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		var s []string
		for _, e := range got {
			s = append(s, e.Guest+e.Instance)
		}
		if strings.Join(s, " ") != c.want {
			t.Errorf("%d to %d: %v, want %s", c.from, c.to, s, c.want)
		}
	}
	if got, err := Exposed(script(history), "netback", t0, t0.Add(time.Hour)); err != nil || len(got) != 1 || got[0].Guest != "n" || !got[0].Until.IsZero() {
		t.Errorf("%v, %v", got, err)
	}
	bad := func(yield func(*Record, error) bool) { yield(nil, errors.New("damaged")) }
	if _, err := Exposed(bad, "blkback", t0, t0); err == nil {
		t.Error("an answer from a damaged log")
	}
}

// The answer is that of a slow one that asks minute by minute whether a guest is linked.
func TestExposedIsPointwise(t *testing.T) {
	linked := func(minute int) map[string]bool {
		at := t0.Add(time.Duration(minute) * time.Minute)
		out := map[string]bool{}
		got, err := Exposed(script(history), "blkback", at, at)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range got {
			out[e.Guest+e.Instance] = true
		}
		return out
	}
	for from := -1; from < 23; from++ {
		union := map[string]bool{}
		for to := from; to < 23; to++ {
			for k := range linked(to) {
				union[k] = true
			}
			got, err := Exposed(script(history), "blkback", t0.Add(time.Duration(from)*time.Minute), t0.Add(time.Duration(to)*time.Minute))
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(union) {
				t.Errorf("%d to %d: %v, want %v", from, to, got, union)
			}
			for _, e := range got {
				if !union[e.Guest+e.Instance] {
					t.Errorf("%d to %d: %v is not among %v", from, to, e, union)
				}
			}
		}
	}
}
