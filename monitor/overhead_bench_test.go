package monitor

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

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

// eachLine is a guest's console that is told line by line.
type eachLine struct {
	line []byte
	tell func(string)
}

func (e *eachLine) Write(p []byte) (int, error) {
	for _, c := range p {
		if c != '\n' {
			e.line = append(e.line, c)
			continue
		}
		e.tell(string(bytes.TrimSpace(e.line)))
		e.line = e.line[:0]
	}
	return len(p), nil
}

// A worker is a guest with dummy in it that does what kind of work it is told to on its console, and waits.
type worker struct {
	*guest
	does  scripts
	input chan []byte
	ready <-chan struct{}
	ended chan sample
	over  chan Outcome
}

func newWorker(t testing.TB, m *isolate.Modules) *worker {
	t.Helper()
	program, err := workload.Build(t.Context(), cache(t))
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{input: make(chan []byte), over: make(chan Outcome, 1), ended: make(chan sample, 1)}
	exits := func() (n uint64) {
		for _, c := range w.vcpus { // not by Stats, which waits for the console
			for r := range c.exits {
				n += c.exits[r].Load()
			}
		}
		return n
	}
	var begun uint64
	var took string // as the program says
	w.does = scripts{
		modules: m, files: map[string]string{"workload": program}, debian: []string{"dummy"}, input: w.input,
		script: `insmod /mod/dummy.ko; cd /; stty -echo; echo READY
while read work && [ "$work" != off ]; do echo MARK a; took="$(/workload $work)"; echo TOOK $took; echo MARK b; done
echo LIVES
`,
		watch: &eachLine{tell: func(l string) {
			switch {
			case l == "MARK a":
				begun = exits()
			case strings.HasPrefix(l, "TOOK "):
				took = l[strings.LastIndexByte(l, ' ')+1:]
			case l == "MARK b":
				ns, _ := strconv.ParseFloat(took, 64)  // 0: it said nothing
				w.ended <- sample{ns, exits() - begun} // one is waited for at a time
			}
		}},
	}
	w.guest = w.does.build(t)
	w.ready = w.console.saw("READY")
	return w
}

// run runs the guest until it is told to end, or ctx ends.
func (w *worker) run(ctx context.Context) {
	go func() {
		o, err := w.Run(ctx)
		if err != nil {
			o = Outcome{Stopped, err.Error()}
		}
		w.over <- o
	}()
}

// await waits for something of the guest.
func await[T any](t testing.TB, w *worker, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case o := <-w.over:
		t.Fatalf("outcome %v\n%s", o, w.console)
	}
	return v
}

// work has the guest work once.
func (w *worker) work(t testing.TB, kind string, operations int) sample {
	t.Helper()
	w.types(t, fmt.Sprintf("%s %d", kind, operations))
	s := await(t, w, w.ended)
	if s.nanoseconds <= 0 {
		t.Fatalf("%s: no time\n%s", kind, w.console)
	}
	return s
}

func (w *worker) types(t testing.TB, line string) {
	t.Helper()
	select {
	case w.input <- []byte(line + "\n"):
	case o := <-w.over:
		t.Fatalf("outcome %v\n%s", o, w.console)
	}
}

// A turn is the same work, one guest's after the other's.
type turn struct{ without, with sample }

// turns has two guests, of which one isolates its module, do all kinds of work in turns, and returns these by kind.
func turns(t testing.TB, rounds int) map[string][]turn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+rounds)*time.Minute)
	defer cancel()
	without, with := newWorker(t, nil), newWorker(t, &isolate.Modules{Default: isolate.Isolate, Mode: policy.Learn})
	both := []*worker{without, with}
	for _, w := range both {
		w.run(ctx)
		await(t, w, w.ready)
	}
	all := map[string][]turn{}
	for n := range rounds {
		for _, w := range workload.Works {
			var x turn
			for _, second := range []bool{n%2 == 1, n%2 == 0} { // who begins
				if second {
					x.with = with.work(t, w.Name, w.Operations)
				} else {
					x.without = without.work(t, w.Name, w.Operations)
				}
			}
			all[w.Name] = append(all[w.Name], x)
		}
	}
	for _, w := range both {
		w.types(t, "off")
		if o := <-w.over; o.Kind != PowerOff {
			t.Errorf("outcome %v", o)
		}
		w.does.said(t, w.guest)
	}
	return all
}

// BenchmarkGuestOverhead is what an isolated module costs a guest that does not use it: the exits that each operation of a
// kind of work makes more, and how long it takes, by the same of a guest in which the module is not isolated. Both guests are there
// and work in turns, one kind of work at a time, as a machine's speed may change from one second to the next: the ratio is the
// median of all turns'.
func BenchmarkGuestOverhead(b *testing.B) {
	lab.NeedsKVM(b)
	pairs, rounds := 2, 8
	if os.Getenv("REDOUBT_SOAK") != "" {
		pairs, rounds = 5, 12
	}
	all := map[string][]turn{}
	for range pairs {
		for name, x := range turns(b, rounds) {
			all[name] = append(all[name], x...)
		}
	}
	for _, w := range workload.Works {
		b.Run(w.Name, func(b *testing.B) {
			for b.Loop() { // measured above, with all others
			}
			var ratios, more []float64
			for _, x := range all[w.Name] {
				ratios = append(ratios, x.with.nanoseconds/x.without.nanoseconds)
				more = append(more, float64(x.with.exits)-float64(x.without.exits))
			}
			b.ReportMetric(median(more)/float64(w.Operations), "added-exits/op")
			b.ReportMetric(median(ratios), "ratio")
			b.ReportMetric(0, "ns/op")
			b.Logf("%v", all[w.Name])
		})
	}
}
