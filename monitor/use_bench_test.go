package monitor

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/workload"
)

// BenchmarkModuleInUse is what a module costs whose every operation crosses the border: a block of 4,096 bytes read of null_blk, as
// many hashed by crc32c. Crossings are round trips; mediated is what it wrote of the kernel's; the ratio is to the same module not
// isolated, guests of either kind taking turns; medians.
func BenchmarkModuleInUse(b *testing.B) {
	lab.NeedsKVM(b)
	for _, c := range []struct {
		name, kernel, module, load, work string
		others                           []string
	}{
		{"null_blk", "6.1-cloud", "null_blk", "memory_backed=1 gb=1 nr_devices=1 submit_queues=1", "block", nil},
		{"crc32c", "6.1", "crc32c_generic", "", "crc32c", []string{"af_alg", "algif_hash"}},
	} {
		b.Run(c.name, func(b *testing.B) {
			const operations = 300
			program, err := workload.Build(b.Context(), cache(b))
			if err != nil {
				b.Fatal(err)
			}
			run := func(m *isolate.Modules, n int) (ns float64, crossings, mediated uint64) {
				said, r := scripts{
					kernel: c.kernel, modules: m, files: map[string]string{"workload": program}, debian: append([]string{c.module}, c.others...), extra: "cryptomgr.notests=0",
					script: fmt.Sprintf("for m in $(cat /mod/order); do case $m in %s.ko*) set -- %s;; *) set --;; esac; insmod /mod/$m $*; done\n"+
						"echo CHECK took $(/workload %s %d)\necho LIVES\n", c.module, c.load, c.work, n),
				}.run(b)
				words := strings.Fields(said["took"])
				if len(words) != 3 {
					b.Fatalf("%s", said)
				}
				if ns, err = strconv.ParseFloat(words[2], 64); err != nil {
					b.Fatal(err)
				}
				for name, a := range r.Modules {
					if a.Refused > 0 {
						b.Fatalf("%s: %+v", name, a)
					}
					for _, k := range []map[string]uint64{a.Entries, a.Calls} {
						for _, times := range k {
							crossings += times
						}
					}
					for _, times := range a.Writes {
						mediated += times
					}
				}
				return ns, crossings, mediated
			}
			m := &isolate.Modules{Default: isolate.Isolate, Trusted: c.others, Mode: policy.Learn}
			if c.name == "null_blk" {
				m.Trusted = append(m.Trusted, "configfs")
			}
			var ratios, crossings, mediated []float64
			for b.Loop() {
				plain, _, _ := run(nil, operations)
				_, loadedC, loadedM := run(m, 0)
				isolated, allC, allM := run(m, operations)
				ratios = append(ratios, isolated/plain)
				crossings = append(crossings, float64(allC-loadedC)/operations)
				mediated = append(mediated, float64(allM-loadedM)/operations)
			}
			b.ReportMetric(median(crossings), "crossings/op")
			b.ReportMetric(median(mediated), "mediated/op")
			b.ReportMetric(median(ratios), "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkIsolateModule is what taking nine pages out of the guest's view costs it: how long it stands, and how much longer it then
// takes to touch 64 MiB of its memory, whose pages may have to be found again. Two ways: their slot is cut (absent), and they are made
// inaccessible where KVM looks for them (protnone). The pages are some that the guest was told to leave alone.
func BenchmarkIsolateModule(b *testing.B) {
	lab.NeedsKVM(b)
	const pages, reserved = 9, 128 << 20
	for _, c := range []struct {
		name string
		take func(m *Machine) error
	}{
		{"absent", func(m *Machine) error {
			var all []uint64
			for n := range uint64(pages) {
				all = append(all, reserved+n*pageSize)
			}
			return m.punch(all)
		}},
		{"protnone", func(m *Machine) error {
			return unix.Mprotect(m.mem.low[reserved:reserved+pages*pageSize], unix.PROT_NONE)
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			program, err := workload.Build(b.Context(), cache(b))
			if err != nil {
				b.Fatal(err)
			}
			var paused, refault []float64
			for b.Loop() {
				var g *guest
				var took time.Duration
				s := scripts{
					files:  map[string]string{"workload": program},
					extra:  fmt.Sprintf("memmap=%d$%d", pages*pageSize, reserved),
					script: "/workload refault 64\necho LIVES\n",
					watch: &eachLine{tell: func(l string) {
						if !strings.HasPrefix(l, "MARK ") {
							return
						}
						start := time.Now()
						if err := c.take(g.Machine); err != nil {
							b.Error(err)
						}
						took = time.Since(start)
					}},
				}
				g = s.build(b)
				s.finish(b, g)
				at := func(key string) float64 {
					words := strings.Fields(g.console.value(key))
					if len(words) != 2 {
						b.Fatalf("%s: %s", key, g.console)
					}
					ns, err := strconv.ParseFloat(words[1], 64)
					if err != nil {
						b.Fatal(err)
					}
					return ns / 1e6
				}
				paused = append(paused, float64(took.Nanoseconds())/1e6)
				refault = append(refault, at("after")-at("before"))
			}
			b.ReportMetric(median(paused), "ms-paused")
			b.ReportMetric(median(refault), "ms-refault")
			b.ReportMetric(0, "ns/op")
		})
	}
}
