package monitor

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/workload"
)

// A sample is one run of one kind of work in a guest.
type sample struct {
	nanoseconds float64
	exits       uint64 // to the monitor meanwhile
}

// stopwatch is a guest's console that notes how many exits there were when a line begins with a word.
type stopwatch struct {
	line  []byte
	exits func() uint64
	at    map[string]uint64
}

func (s *stopwatch) Write(p []byte) (int, error) {
	for _, c := range p {
		if c != '\n' {
			s.line = append(s.line, c)
			continue
		}
		if l := string(bytes.TrimSpace(s.line)); strings.HasPrefix(l, "MARK ") {
			s.at[l] = s.exits()
		}
		s.line = s.line[:0]
	}
	return len(p), nil
}

// worked boots a guest with dummy in it, lets it do all kinds of work so many times each, and returns the samples by kind.
func worked(t testing.TB, m *isolate.Modules, rounds int) map[string][]sample {
	t.Helper()
	program, err := workload.Build(t.Context(), cache(t))
	if err != nil {
		t.Fatal(err)
	}
	script := "insmod /mod/dummy.ko\ncd /\n"
	for n := range rounds {
		for _, w := range workload.Works {
			script += fmt.Sprintf("echo MARK %s %d a; echo CHECK %s-%d $(/workload %s %d); echo MARK %s %d b\n",
				w.Name, n, w.Name, n, w.Name, w.Operations, w.Name, n)
		}
	}
	var g *guest
	watch := &stopwatch{at: map[string]uint64{}}
	watch.exits = func() (n uint64) {
		for _, c := range g.vcpus { // not by Stats, which waits for the console
			for r := range c.exits {
				n += c.exits[r].Load()
			}
		}
		return n
	}
	said, _ := scripts{
		modules: m, files: map[string]string{"workload": program}, debian: []string{"dummy"}, script: script + "echo LIVES\n",
		watch: watch, built: func(b *guest) { g = b },
	}.run(t)
	all := map[string][]sample{}
	for n := range rounds {
		for _, w := range workload.Works {
			words := strings.Fields(said[fmt.Sprintf("%s-%d", w.Name, n)])
			if len(words) != 3 {
				t.Fatalf("%s: %q", w.Name, words)
			}
			ns, err := strconv.ParseFloat(words[2], 64)
			if err != nil {
				t.Fatal(err)
			}
			mark := fmt.Sprintf("MARK %s %d ", w.Name, n)
			all[w.Name] = append(all[w.Name], sample{ns, watch.at[mark+"b"] - watch.at[mark+"a"]})
		}
	}
	return all
}

// BenchmarkGuestOverhead is what an isolated module costs a guest that does not use it: the exits that each operation of a
// kind of work makes more, and how long it takes, by the same of a guest in which the module is not isolated. Guests of either kind
// take turns; medians.
func BenchmarkGuestOverhead(b *testing.B) {
	lab.NeedsKVM(b)
	guests, rounds := 2, 3
	if os.Getenv("REDOUBT_SOAK") != "" {
		guests, rounds = 5, 5
	}
	without, with := map[string][]sample{}, map[string][]sample{}
	add := func(to map[string][]sample, m *isolate.Modules) {
		for name, s := range worked(b, m, rounds) {
			to[name] = append(to[name], s...)
		}
	}
	for range guests {
		add(without, nil)
		add(with, &isolate.Modules{Default: isolate.Isolate, Mode: policy.Learn})
	}
	for _, w := range workload.Works {
		b.Run(w.Name, func(b *testing.B) {
			for b.Loop() { // measured above, with all others
			}
			time := func(all []sample) float64 {
				var ns []float64
				for _, s := range all {
					ns = append(ns, s.nanoseconds)
				}
				return median(ns)
			}
			exits := func(all []sample) float64 {
				var n []float64
				for _, s := range all {
					n = append(n, float64(s.exits))
				}
				return median(n)
			}
			b.ReportMetric((exits(with[w.Name])-exits(without[w.Name]))/float64(w.Operations), "added-exits/op")
			b.ReportMetric(time(with[w.Name])/time(without[w.Name]), "ratio")
			b.ReportMetric(0, "ns/op")
			b.Logf("with %v, without %v", with[w.Name], without[w.Name])
		})
	}
}
