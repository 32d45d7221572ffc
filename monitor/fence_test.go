package monitor

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/virtio"
)

// fenced boots a guest that loads modules, uses them and takes them away again, and returns what it found (its lines RESULT).
func fenced(t *testing.T, kernel string, m *isolate.Modules, modules ...string) (results []string, r isolate.Report) {
	t.Helper()
	tpm := startTPM(t)
	g := boot{
		kernel: kernel, what: "modules", modules: modules, extra: "quiet",
		change: func(cfg *Config) {
			cfg.TPM, cfg.Modules = tpm, m
			_, f, err := virtio.New(virtio.NewRNG())
			if err != nil {
				t.Fatal(err)
			}
			cfg.Devices = []pci.Placed{{Function: f, Place: topology.Place{Kind: topology.RNG, Slot: 1, BAR: barBase, Size: 0x8000, Route: topology.FirstRoute, Vectors: 2}}}
		},
	}.build(t)
	if o := g.run(t); o.Kind != PowerOff {
		t.Errorf("outcome %v", o)
	}
	for line := range strings.Lines(g.console.String()) {
		if r, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "RESULT "); ok {
			results = append(results, r)
		}
	}
	r, _ = g.Fenced()
	if t.Failed() || testing.Verbose() {
		t.Logf("%s", g.console)
	}
	return results, r
}

// Debian's own modules work in views of their own as they do without: first with everything allowed and learnt, then with
// what was learnt and nothing else.
func TestFence(t *testing.T) {
	lab.NeedsKVM(t)
	modules := []string{"dummy", "null_blk", "xor", "crc32c_generic", "xxhash_generic", "virtio_pci", "virtio_rng"}
	for _, kernel := range []string{"6.1-cloud"} {
		t.Run(kernel, func(t *testing.T) {
			want, _ := fenced(t, kernel, nil, modules...)
			if len(want) < 8 {
				t.Fatalf("without isolation: %q", want)
			}
			trusted := []string{"virtio", "virtio_ring", "virtio_pci", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"}
			policies := isolate.Modules{Default: isolate.Isolate, Trusted: trusted, Mode: policy.Learn}
			for _, mode := range []policy.Mode{policy.Learn, policy.Enforce} {
				policies.Mode = mode
				got, r := fenced(t, kernel, &policies, modules...)
				if !slices.Equal(got, want) {
					t.Errorf("%s: the guest found\n%s\nand without isolation\n%s", mode, strings.Join(got, "\n"), strings.Join(want, "\n"))
				}
				for name, a := range r.Modules {
					t.Logf("%s: %s: %s", mode, name, summary(a))
					if slices.Contains(trusted, name) {
						if a.Verdict != isolate.Trust || !a.Unloaded {
							t.Errorf("%s: %s: %+v", mode, name, a)
						}
						continue
					}
					if a.Verdict != isolate.Isolate || a.Refused > 0 || !a.Unloaded || len(a.Entries) == 0 {
						t.Errorf("%s: %s: %+v", mode, name, a)
					}
				}
				for _, e := range r.Events {
					if !e.Allowed {
						t.Errorf("%s: %v", mode, e)
					}
				}
				policies.Profiles = r.Profiles
			}
		})
	}
}

func summary(a *isolate.Account) string {
	sum := func(m map[string]uint64) (n uint64) {
		for _, c := range m {
			n += c
		}
		return n
	}
	return fmt.Sprintf("%d pages of code; %d functions entered %d times; %d functions called %d times; resumed %d times; %d pages read; %d writes to %d objects",
		a.Pages, len(a.Entries), sum(a.Entries), len(a.Calls), sum(a.Calls), a.Resumed, a.Reads, sum(a.Writes), len(a.Writes))
}
