package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/services"
)

// TestModulesNative: a module of a guest's kernel works in a view of its own; what crossed the border is told; what it learnt
// is enough for it, and is measured.
func TestModulesNative(t *testing.T) {
	lab.NeedsKVM(t)
	h := newHost(t)
	boot := func(args ...string) string {
		t.Helper()
		h.start(start{emulator: "native", what: "modules", args: append([]string{"--wait", "--cpus", "2", "--modules", "isolate"}, args...)})
		return h.await("guest", "READY", bootTime)
	}
	report := func() (r isolate.Report) {
		t.Helper()
		if err := json.Unmarshal([]byte(h.must("modules", "guest", "--json")), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	works := func(console string, r isolate.Report) {
		t.Helper()
		if !strings.Contains(console, "DUMMY-UP") || strings.Contains(console, "SENT 0\n") || !strings.Contains(console, "SENT ") {
			t.Errorf("the module does not work:\n%s", lastLines(console, 20))
		}
		m := r.Modules["dummy"]
		if m == nil || len(r.Modules) != 1 {
			t.Fatalf("modules: %+v", r.Modules)
		}
		if m.Verdict != isolate.Isolate || m.Pages == 0 || m.Unloaded || len(m.Entries) < 3 || len(m.Calls) < 3 || m.Refused > 0 {
			t.Errorf("%+v", *m)
		}
		for _, e := range r.Events {
			if !e.Allowed {
				t.Errorf("refused: %v", e)
			}
		}
	}

	console := boot("--modules-mode", "learn")
	works(console, report())
	if out := h.must("modules", "guest"); !strings.Contains(out, "\ndummy ") || !strings.Contains(out, " isolate ") || !strings.Contains(out, "LAST EVENTS") {
		t.Errorf("%s", out)
	}
	told := false
	for _, e := range h.show("guest").Timeline {
		told = told || e.Kind == "module" && strings.HasPrefix(e.Text, "dummy: loaded: isolated")
	}
	if !told {
		t.Error("that the module was isolated is no event of its guest")
	}
	learned := h.path("profile.yaml")
	text := h.must("modules", "guest", "--learned")
	profiles, err := policy.Read(strings.NewReader(text))
	if err != nil || len(profiles) != 1 || profiles[0].Module != "dummy" || len(profiles[0].Calls) < 3 {
		t.Fatalf("%v\n%s", err, text)
	}
	if err := os.WriteFile(learned, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	good := h.path("good.yaml")
	h.must("attest", "guest", "--save-policy", good)
	h.must("stop", "guest", "--grace", "0s")
	h.fails(1, "is down: what its modules do is known while it runs", "modules", "guest")

	// The same guest, held to that.
	console = boot("--modules-profile", learned)
	works(console, report())
	if r := h.run("attest", "guest", "--policy", good); r.status != 1 || !strings.Contains(r.out, "PCR 1") || !strings.Contains(r.out, "failed") {
		t.Errorf("what isolates its modules has changed: exit status %d, want 1 and PCR 1 named\n%s%s", r.status, r.out, r.err)
	}
	h.must("stop", "guest", "--grace", "0s")

	// Without a profile it may do next to nothing; where that is to be seen, the guest stands still at its first refusal.
	h.start(start{emulator: "native", what: "modules", args: []string{"--modules", "isolate", "--modules-response", "pause"}})
	next := h.followEvents("guest")
	next("held", bootTime)
	if c := h.console("guest"); strings.Contains(c, "SENT ") {
		t.Errorf("the guest went on after what its module was refused\n%s", lastLines(c, 20))
	}
	h.must("resume", "guest")
	next("resumed", bootTime)
	h.must("stop", "guest", "--grace", "0s")

	// Files that are none, and guests that cannot be had.
	if err := os.WriteFile(learned, []byte("module: dummy\ncalls: [commit_creds]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := h.tryStart(start{name: "other", emulator: "native", what: "modules", args: []string{"--modules-profile", learned}})
	if r.status != 2 || !strings.Contains(r.err, "modules.profile: ") || !strings.Contains(r.err, "commit_creds is never allowed") {
		t.Errorf("a profile that allows everything: exit status %d: %s%s", r.status, r.out, r.err)
	}
	r = h.tryStart(start{name: "other", emulator: "qemu", what: "modules", args: []string{"--modules", "isolate"}})
	if r.status != 2 || !strings.Contains(r.err, "emulator: qemu isolates no modules") {
		t.Errorf("under QEMU: exit status %d: %s%s", r.status, r.out, r.err)
	}

	asked := 0
	for r, err := range audit.Records(h.path("state", audit.Dir)) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Act == "modules" && r.Object == "guest" && r.Outcome == audit.Done && r.Actor.Service == services.Toolstack {
			asked++
		}
	}
	if asked < 4 {
		t.Errorf("of the questions about modules %d are in the audit log", asked)
	}
}
