package monitor

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
)

// A module that drives a device has it write the kernel's data: it does without isolation, and nothing comes of it with, even where
// all is learnt that may be.
func TestFenceDMA(t *testing.T) {
	lab.NeedsKVM(t)
	built, err := attack.Build(t.Context(), cache(t), debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	const script = `for m in $(cat /mod/order); do insmod /mod/$m; done
insmod /mod/dma.ko target=0x$(awk '$3 == "core_pattern" {print $1}' /proc/kallsyms)
echo "CHECK pattern $(cat /proc/sys/kernel/core_pattern | grep -c '^core$')"
echo "CHECK driver $(ls /sys/bus/virtio/drivers/dma | grep -c ^virtio)"
echo LIVES
`
	virtio := []string{"virtio", "virtio_ring", "virtio_pci", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"}
	for name, m := range map[string]*isolate.Modules{"without": nil, "isolated": {Default: isolate.Isolate, Trusted: virtio, Mode: policy.Learn}} {
		said, r := scripts{modules: m, files: map[string]string{"mod/dma.ko": built["dma"]}, debian: []string{"virtio_pci"}, script: script, rng: true}.run(t)
		want := "1"
		if m == nil {
			want = "0"
		}
		if said["pattern"] != want {
			t.Errorf("%s: %v", name, said)
		}
		if m == nil {
			if said["driver"] != "1" {
				t.Errorf("%s: it drives nothing: %v", name, said)
			}
			continue
		}
		told := false
		for _, e := range r.Events {
			told = told || e.Module == "dma" && !e.Allowed && e.Kind == isolate.WriteData && e.Symbol == "core_pattern" && strings.Contains(e.Detail, "a device")
		}
		if !told {
			t.Errorf("it was not told: %v", r.Events)
		}
	}
}
