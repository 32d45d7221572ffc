package protocol

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/spec"
)

// TestModulesTravel: what a spec says of modules comes to the emulator as it is, and that it says nothing, too.
func TestModulesTravel(t *testing.T) {
	pci, err := topology.Assign(topology.Guest(topology.Native, 0, 0, true))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*spec.Modules{nil, {Default: spec.Isolate, Mode: spec.Enforce}, {Default: spec.Refuse, Trusted: []string{"ext4"}, Mode: spec.Learn, Profile: "/p"}} {
		b, err := json.Marshal(Start{PCI: pci, Modules: m.Policy()})
		if err != nil {
			t.Fatal(err)
		}
		var got Start
		if err := json.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(got.Modules, m.Policy()) {
			t.Errorf("%s: %+v, %v", b, got.Modules, err)
		}
		if strings.Contains(string(b), "modules") != (m != nil) || strings.Contains(string(b), "/p") {
			t.Errorf("%s", b)
		}
		b, err = json.Marshal(Build{Spec: spec.Guest{Name: "web", Modules: m}})
		if err != nil {
			t.Fatal(err)
		}
		var build Build
		if err := json.Unmarshal(b, &build); err != nil || !reflect.DeepEqual(build.Spec.Modules, m) {
			t.Errorf("%s: %+v, %v", b, build.Spec.Modules, err)
		}
	}
}
