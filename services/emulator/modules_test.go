package emulator

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// profile is a sealed file of profiles, as the Builder hands it over.
func profile(t *testing.T, text string) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "profile")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sealed, err := memfd.Sealed("modules.profile", f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sealed.Close() })
	return sealed
}

// TestModules: the monitor is told what the spec says, the same at each start of a guest from the same open file; a file
// that holds no profiles is refused with its field.
func TestModules(t *testing.T) {
	load := func(m *spec.Modules, f *os.File) (*isolate.Modules, error) {
		t.Helper()
		g := &guest{in: protocol.Start{Modules: m}, files: map[string][]*os.File{}}
		if f != nil {
			its, err := ipc.Duplicate(f) // what comes over a socket shares where it stands
			if err != nil {
				t.Fatal(err)
			}
			g.files[protocol.FileProfile] = its
		}
		return g.modules()
	}
	if m, err := load(nil, nil); m != nil || err != nil {
		t.Errorf("%+v, %v", m, err)
	}
	in := &spec.Modules{Default: spec.Refuse, Trusted: []string{"ext4"}, Mode: spec.Enforce}
	want := isolate.Modules{Default: isolate.Refuse, Trusted: []string{"ext4"}, Mode: policy.Enforce}
	if m, err := load(in, nil); err != nil || !reflect.DeepEqual(*m, want) {
		t.Errorf("%+v, %v", m, err)
	}
	f := profile(t, "module: dummy\ncalls: [ether_setup]\n---\nmodule: other\n")
	want.Profiles = []policy.Profile{{Module: "dummy", Calls: []string{"ether_setup"}}, {Module: "other"}}
	for range 2 {
		if m, err := load(in, f); err != nil || !reflect.DeepEqual(*m, want) {
			t.Errorf("%+v, %v", m, err)
		}
	}
	_, err := load(in, profile(t, "module: dummy\ncalls: [commit_creds]\n"))
	if rpc.KindOf(err) != rpc.Invalid || !strings.HasPrefix(err.Error(), "modules.profile: ") || !strings.Contains(err.Error(), "commit_creds") {
		t.Error(err)
	}
}

// TestVerdictsAndModes: what a spec calls them is what package isolate does.
func TestVerdictsAndModes(t *testing.T) {
	for s, i := range map[spec.Verdict]isolate.Verdict{spec.Isolate: isolate.Isolate, spec.Trust: isolate.Trust, spec.Refuse: isolate.Refuse} {
		if string(s) != string(i) {
			t.Errorf("%q is %q", s, i)
		}
	}
	for s, p := range map[spec.ModuleMode]policy.Mode{spec.Monitor: policy.Monitor, spec.Learn: policy.Learn, spec.Enforce: policy.Enforce} {
		if string(s) != string(p) {
			t.Errorf("%q is %q", s, p)
		}
	}
}

// TestModuleEvents: what modules do is told in one printable line each, and a flood of it in few; what is refused is told
// however much was allowed before.
func TestModuleEvents(t *testing.T) {
	var told []string
	m := moduleEvents{tell: func(text string) { told = append(told, text) }}
	last := func() string { return told[len(told)-1] }
	m.event(isolate.Event{Kind: isolate.Loaded, Module: "dummy", Detail: "isolated: 2 pages of code", Allowed: true})
	if last() != "dummy: loaded: isolated: 2 pages of code" {
		t.Errorf("%q", last())
	}
	for range 1 << 20 {
		m.event(isolate.Event{Kind: isolate.WriteData, Module: "dummy", Symbol: "init_net", Allowed: true})
	}
	if want := maxModuleEvents + 20 - 5; len(told) != want {
		t.Errorf("%d of a flood are told, not %d", len(told), want)
	}
	if last() != fmt.Sprintf("dummy: write init_net: allowed (%d such so far)", 1<<20) {
		t.Errorf("%q", last())
	}
	m.event(isolate.Event{Kind: isolate.Call, Module: "evil\n\x1b[2J", Symbol: "commit_creds", At: "evil+0x7"})
	if last() != "evil\ufffd\ufffd[2J: call commit_creds from evil+0x7: refused" {
		t.Errorf("%q", last())
	}
	told = nil
	for range 1 << 20 {
		m.event(isolate.Event{Kind: isolate.Call, Module: "evil", Symbol: "commit_creds"})
	}
	if len(told) > 64 {
		t.Errorf("%d of a flood are told", len(told))
	}
}
