package choice

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/spec"
)

// TestModulesNeedTheMonitor: a guest whose modules are to be isolated gets the emulator that does it, or none.
func TestModulesNeedTheMonitor(t *testing.T) {
	for _, e := range []spec.Emulator{spec.Auto, spec.Native} {
		got, err := Of(&spec.Guest{Emulator: e, Boot: spec.Boot{Kernel: "/k"}, Modules: &spec.Modules{}})
		if HaveKVM() {
			if got != spec.Native || err != nil {
				t.Errorf("%s: %s, %v", e, got, err)
			}
		} else if got != "" || rpc.KindOf(err) != rpc.Unavailable || !strings.HasPrefix(err.Error(), "modules: ") {
			t.Errorf("%s: %s, %v", e, got, err)
		}
	}
}
