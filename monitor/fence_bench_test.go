package monitor

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
)

// BenchmarkCrossing is what a round trip over the border costs, by what two bare exits to the monitor cost in the same guest (reads
// of a port where nothing is, from a program: a system call each). The module calls a small function of the kernel, which
// returns.
func BenchmarkCrossing(b *testing.B) {
	lab.NeedsKVM(b)
	const calls, ports = 3000, 6000
	built, err := attack.Build(b.Context(), cache(b), "6.1-cloud")
	if err != nil {
		b.Fatal(err)
	}
	files := map[string]string{}
	for _, m := range attack.Modules {
		files["mod/"+m+".ko"] = built[m]
	}
	script := attack.Script + fmt.Sprintf(`attack_load attack flood_calls=%d; attack none calls
now() { cut -d' ' -f1 /proc/uptime; }
for n in 1 2 3; do
	a=$(now); echo flood >/proc/attack; b=$(now)
	dd if=/dev/port of=/dev/null bs=1 skip=4096 count=%d 2>/dev/null; c=$(now)
	echo "CHECK $n $a $b $c"
done
echo LIVES
`, calls, ports)
	var ratios []float64
	for b.Loop() {
		m := isolate.Modules{Default: isolate.Isolate, Mode: policy.Learn}
		said, _ := scripted(b, "6.1-cloud", &m, files, script)
		for _, line := range said {
			var at [3]float64
			for i, w := range strings.Fields(line) {
				if at[i], err = strconv.ParseFloat(w, 64); err != nil {
					b.Fatal(err)
				}
			}
			round, exit := (at[1]-at[0])/calls, (at[2]-at[1])/ports
			ratios = append(ratios, round/(2*exit))
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
