package monitor

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/workload"
)

// BenchmarkCrossing is what a round trip over the border costs, by what two bare exits to the monitor cost in the same guest (reads
// of a port where nothing is, by a program). The module calls a small function of the kernel, which
// returns. Both take turns of some tenths of a second, as a machine's speed may change from one second to the next; the median of all turns'.
func BenchmarkCrossing(b *testing.B) {
	lab.NeedsKVM(b)
	const rounds, calls, ports = 15, 600, 1200
	built, err := attack.Build(b.Context(), cache(b), debian.Usual)
	if err != nil {
		b.Fatal(err)
	}
	files := map[string]string{}
	for _, m := range attack.Modules {
		files["mod/"+m+".ko"] = built[m]
	}
	if files["workload"], err = workload.Build(b.Context(), cache(b)); err != nil {
		b.Fatal(err)
	}
	script := attack.Script + fmt.Sprintf(`attack_load attack flood_calls=%d; attack none calls
now() { read t rest </proc/uptime; } # without a process of its own, whose start would count
for n in $(seq %d); do
	now; a=$t; echo flood >/proc/attack; now
	echo "CHECK $n $a $t $(/workload port %d)"
done
echo LIVES
`, calls, rounds, ports)
	var ratios []float64
	for b.Loop() {
		m := isolate.Modules{Default: isolate.Isolate, Mode: policy.Learn}
		said, _ := scripted(b, debian.Usual, &m, files, script)
		for round := range rounds { // when it began and ended, then: port, how many, nanoseconds
			line := said[strconv.Itoa(round+1)]
			words := strings.Fields(line)
			if len(words) != 5 {
				b.Fatalf("%q", line)
			}
			begin, err := strconv.ParseFloat(words[0], 64)
			end, eerr := strconv.ParseFloat(words[1], 64)
			took, terr := strconv.ParseFloat(words[4], 64)
			if err := errors.Join(err, eerr, terr); err != nil {
				b.Fatal(err)
			}
			trip, exit := (end-begin)/calls, took/1e9/ports
			ratios = append(ratios, trip/(2*exit))
			b.Logf("a round trip %.0f µs, an exit %.0f µs", trip*1e6, exit*1e6)
		}
	}
	b.ReportMetric(median(ratios), "ratio")
	b.ReportMetric(0, "ns/op")
}

func median(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[len(all)/2]
}
