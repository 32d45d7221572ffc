package builder

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/spec"
)

// TestModulesNeedTheMonitor: a guest whose modules are to be isolated gets the emulator that does it, or none.
func TestModulesNeedTheMonitor(t *testing.T) {
	for _, e := range []spec.Emulator{spec.Auto, spec.Native} {
		got, err := choose(&spec.Guest{Emulator: e, Boot: spec.Boot{Kernel: "/k"}, Modules: &spec.Modules{}})
		if haveKVM() {
			if got != spec.Native || err != nil {
				t.Errorf("%s: %s, %v", e, got, err)
			}
		} else if got != "" || rpc.KindOf(err) != rpc.Unavailable || !strings.HasPrefix(err.Error(), "modules: ") {
			t.Errorf("%s: %s, %v", e, got, err)
		}
	}
}

// TestAskedOfNoGuest: who asks about the modules of a guest that is down, or is being started, is told that.
func TestAskedOfNoGuest(t *testing.T) {
	b := &Builder{guests: map[string]*guest{"starting": {}}}
	for uuid, want := range map[string]string{"down": "is down", "starting": "is being started"} {
		if _, _, err := b.running(uuid); rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", uuid, err)
		}
	}
}
