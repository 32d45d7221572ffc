package e2e

import (
	"fmt"
	"testing"
	"time"

	"redoubt.dev/redoubt/api"
	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/inspect"
	"redoubt.dev/redoubt/services"
)

// measuredFiles is how many files the guest of BenchmarkInspect has measured.
const measuredFiles = 10_000

// BenchmarkInspect: how long it takes, from the API's call to its answer, to read the modules and the IMA list, of 10,000
// entries and more, of a guest that runs on meanwhile, again and again: the process that waits finds the kernel, reads and leaves, and another one is started beside
// it. modules-ms is the same for the modules alone, most of which is that start; first-ms is the first time, when the kernel's image is unpacked and its layout is made.
func BenchmarkInspect(b *testing.B) {
	eachEmulator(b, func(b *testing.B, s starter) {
		s.start(start{emulator: s.emulator, kernel: "6.12", what: "many", cmdline: fmt.Sprintf("many=%d", measuredFiles)})
		s.await("guest", "READY", 4*bootTime)
		c := api.Dial(services.APIPath(s.path("run"), services.DefaultTenant))
		timed := func(what ...string) (*inspect.Answer, time.Duration) {
			from := time.Now()
			r, err := c.Inspect(b.Context(), &v1.InspectRequest{Name: "guest", What: what})
			took := time.Since(from)
			if err != nil {
				b.Fatal(err)
			}
			answer, err := inspect.Decode(r.Answer, r.ImaList)
			if err != nil {
				b.Fatal(err)
			}
			return answer, took
		}
		ask := func() time.Duration {
			answer, took := timed(inspect.Modules, inspect.IMA)
			all, err := ima.Parse(answer.IMA.List)
			if err != nil || len(all) < measuredFiles || len(answer.Modules.Modules) < 3 || !answer.Sound() {
				b.Fatalf("%d entries, %v, %+v", len(all), err, answer.Modules)
			}
			return took
		}
		first := ask()
		var all, modules []time.Duration
		for b.Loop() {
			all = append(all, ask())
		}
		for range all {
			_, took := timed(inspect.Modules)
			modules = append(modules, took)
		}
		b.ReportMetric(float64(median(all))/1e6, "ms")
		b.ReportMetric(float64(median(modules))/1e6, "modules-ms")
		b.ReportMetric(float64(first)/1e6, "first-ms")
		b.ReportMetric(0, "ns/op")
	})
}
