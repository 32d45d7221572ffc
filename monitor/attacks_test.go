package monitor

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/pci"
)

// A module that attacks the kernel, another module and the flow of control wins nothing in a view, each attack is told
// with its name, and the guest lives on. (That each of them wins without is package attack's TestAttacksWin.) What the two
// modules do without an attack was learnt before, and they keep to it.
func TestAttacks(t *testing.T) {
	lab.NeedsKVM(t)
	for _, kernel := range []string{"6.1-cloud", "6.12"} {
		t.Run(kernel, func(t *testing.T) { attacked(t, kernel) })
	}
}

func attacked(t *testing.T, kernel string) {
	built, err := attack.Build(t.Context(), cache(t), kernel)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, m := range attack.Modules {
		files["mod/"+m+".ko"] = built[m]
	}
	start := attack.Script + "attack_load attack flood_calls=2000; attack none calls; cat /proc/victim >/dev/null\n"
	// A module under a trusted one's name, whose signature is none: it is isolated nevertheless.
	script := attack.Script + "attack_load dummy what=foreign-data; echo \"CHECK name ok $(sed -n 's/^data=//p' /proc/victim)\"; rmmod dummy\n" + start
	for _, a := range attack.All {
		script += "attack " + a.Name + " " + a.Check + "\n"
	}
	script += "echo LIVES; cat /proc/victim\n"

	m := isolate.Modules{Default: isolate.Isolate, Mode: policy.Learn}
	said, learnt := scripted(t, kernel, &m, files, start+"attack alias core\necho LIVES\n")
	if said["alias"] != "ok ok" { // also where all is allowed that may be
		t.Errorf("alias, learning: %s", said["alias"])
	}
	m = isolate.Modules{Default: isolate.Isolate, Trusted: []string{"dummy"}, Mode: policy.Enforce, Profiles: learnt.Profiles}
	for n := range m.Profiles {
		switch p := &m.Profiles[n]; p.Module {
		case "attack":
			p.LearnCall("memcpy") // what it may be used for is judged by where it writes
			dummy := *p
			dummy.Module = "dummy"
			m.Profiles = append(m.Profiles, dummy)
		case "victim":
			p.LearnRead("dummy") // it goes through the list of modules
		}
	}
	said, r := scripted(t, kernel, &m, files, script)
	for _, a := range attack.All {
		before, after, ok := strings.Cut(said[a.Name], " ")
		won := a.Won
		if a.Endured {
			won = "2000"
		}
		switch {
		case !ok || before == won:
			t.Errorf("%s: shows nothing: %q", a.Name, said[a.Name])
		case (after == won) != a.Endured:
			t.Errorf("%s: %s was %s and is %s", a.Name, a.Check, before, after)
		}
	}
	if a := r.Modules["dummy"]; said["name"] != "ok ok" || a == nil || a.Verdict != isolate.Isolate || a.Refused == 0 || !a.Unloaded {
		t.Errorf("under a trusted name: %s, %+v", said["name"], a)
	}
	kinds := map[string]int{}
	for _, e := range r.Events {
		if e.Allowed {
			continue
		}
		if e.Module == "victim" && e.Kind != isolate.Device { // the victim looks at the port that is attacked
			t.Errorf("%v", e)
		}
		kinds[fmt.Sprintf("%s %s from %s", e.Kind, e.Symbol, e.At)]++
	}
	for _, k := range slices.Sorted(maps.Keys(kinds)) {
		t.Logf("%3d %s", kinds[k], k)
	}
}

// scripts is a guest that runs a script; zero values have usable meanings.
type scripts struct {
	kernel  string
	vcpus   int
	modules *isolate.Modules
	files   map[string]string // of this host, by their names in the guest
	debian  []string          // the kernel's own modules, in /mod
	script  string
	extra   string        // more command line
	rng     bool          // it has the device
	input   <-chan []byte // typed on its console
	watch   io.Writer     // is told what the guest prints, too
}

func scripted(t testing.TB, kernel string, m *isolate.Modules, files map[string]string, script string) (map[string]string, isolate.Report) {
	t.Helper()
	return scripts{kernel: kernel, modules: m, files: files, script: script}.run(t)
}

// run returns the script's lines CHECK by name.
func (s scripts) run(t testing.TB) (map[string]string, isolate.Report) {
	t.Helper()
	return s.finish(t, s.build(t))
}

// finish runs the guest that was built.
func (s scripts) finish(t testing.TB, g *guest) (map[string]string, isolate.Report) {
	t.Helper()
	if o := g.run(t); o.Kind != PowerOff {
		t.Errorf("outcome %v", o)
	}
	return s.said(t, g)
}

// build makes the guest, which then is to be run.
func (s scripts) build(t testing.TB) *guest {
	t.Helper()
	tpm := startTPM(t)
	return boot{
		kernel: s.kernel, vcpus: s.vcpus, what: "script", files: s.files, modules: s.debian, script: s.script, extra: s.extra,
		change: func(cfg *Config) {
			cfg.TPM, cfg.Modules, cfg.ConsoleIn = tpm, s.modules, s.input
			if s.rng {
				cfg.Devices = []pci.Placed{rng(t)}
			}
			if s.watch != nil {
				cfg.ConsoleOut = io.MultiWriter(cfg.ConsoleOut, s.watch)
			}
			cfg.OnModule = func(e isolate.Event) {
				if !e.Allowed {
					t.Log(e)
				}
			}
		},
	}.build(t)
}

// said returns what a guest has said that was run.
func (s scripts) said(t testing.TB, g *guest) (map[string]string, isolate.Report) {
	t.Helper()
	said := map[string]string{}
	for line := range strings.Lines(g.console.String()) {
		if name, rest, ok := strings.Cut(strings.TrimRight(strings.TrimPrefix(line, "CHECK "), "\r\n"), " "); ok && strings.HasPrefix(line, "CHECK ") {
			said[name] = rest
		}
	}
	if t.Failed() || testing.Verbose() || !strings.Contains(g.console.String(), "LIVES") {
		t.Logf("%s", g.console)
	}
	if !strings.Contains(g.console.String(), "LIVES") {
		t.Error("the guest did not live on")
	}
	r, _ := g.Fenced()
	return said, r
}
