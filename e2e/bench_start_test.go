package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
)

// benchCmdline has the kernel say when it runs the first program, which a quiet one does not, and do all that it does by itself.
const benchCmdline = "loglevel=7 cryptomgr.notests=0"

// minRounds is how many pairs of starts a median is taken of, however few -benchtime asks for.
const minRounds = 3

// emulators are those that can run guests here.
func emulators() []string {
	if lab.KVM() {
		return []string{"native", "qemu"}
	}
	return []string{"qemu"}
}

// eachEmulator runs a benchmark of starts under every emulator of this machine, each with a
// Redoubt of its own. In the lab that is the native monitor alone: QEMU's figures come from the
// host, and a nested QEMU's would tell nobody anything.
func eachEmulator(b *testing.B, bench func(b *testing.B, s starter)) {
	all := emulators()
	if os.Getenv(lab.InLab) == "1" {
		all = []string{"native"}
	}
	for _, e := range all {
		b.Run(e, func(b *testing.B) { bench(b, starter{newHost(b), e}) })
	}
}

// starter starts guests that are all alike.
type starter struct {
	*host
	emulator string
}

var started int // names are not used twice

// until starts a guest, ends it when an event of the kind has come, and returns how long after
// the request each kind of event came.
func (s starter) until(kind string, args ...string) map[string]time.Duration {
	s.t.Helper()
	started++
	name := fmt.Sprintf("bench-%d", started)
	s.start(start{name: name, emulator: s.emulator, what: "deaf", cmdline: benchCmdline, args: args})
	at := s.follow(name, kind)
	s.must("stop", name, "--grace", "0s")
	s.must("rm", name)
	return at
}

// follow reads a guest's events until one of the kind has come.
func (s starter) follow(name, kind string) map[string]time.Duration {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*bootTime)
	defer cancel()
	out, end := s.stream(ctx, "events", name, "--follow", "--json")
	defer end()
	at := map[string]time.Duration{}
	var zero time.Time
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var e struct {
			Time time.Time `json:"time"`
			Kind string    `json:"kind"`
			Text string    `json:"text"`
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			s.t.Fatalf("events: %v in %q", err, lines.Text())
		}
		if e.Kind == "requested" {
			zero = e.Time
		}
		if _, ok := at[e.Kind]; !ok {
			at[e.Kind] = e.Time.Sub(zero)
		}
		switch e.Kind {
		case kind:
			return at
		case "ended":
			s.t.Fatalf("%s ended before %s: %s\n%s", name, kind, e.Text, lastLines(s.console(name), 20))
		}
	}
	s.t.Fatalf("%s: no event %s within %v; so far %v\n%s", name, kind, 2*bootTime, at, lastLines(s.console(name), 20))
	return nil
}

// paired measures two ways of doing one thing in turn, the order changing from round to round,
// so that what else the machine does meets both alike.
func paired(b *testing.B, ours, peer func() time.Duration) (our, their []time.Duration) {
	b.Helper()
	round := func() {
		if len(our)%2 == 0 {
			our = append(our, ours())
			their = append(their, peer())
		} else {
			their = append(their, peer())
			our = append(our, ours())
		}
	}
	for b.Loop() {
		round()
	}
	for len(our) < minRounds {
		round()
	}
	return our, their
}

func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[len(s)/2]
}

// reportRatio reports ours ÷ the peer's, medians. The figures behind it go to the log (-v).
func reportRatio(b *testing.B, ours, peer []time.Duration) {
	b.Helper()
	b.Logf("ours %v, peer %v", rounded(ours), rounded(peer))
	b.ReportMetric(float64(median(ours))/float64(median(peer)), "ratio")
	b.ReportMetric(0, "ns/op") // the loop's mean counts nothing here
}

func rounded(d []time.Duration) []time.Duration {
	out := make([]time.Duration, len(d))
	for i := range d {
		out[i] = d[i].Round(time.Millisecond)
	}
	return out
}
