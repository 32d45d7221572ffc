package main

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
)

// perform plays steps and returns the count and what was printed.
func perform(t *testing.T, ctx context.Context, all []step) (int, string) {
	t.Helper()
	var out strings.Builder
	d := &demo{host: &host{dir: t.TempDir()}, to: &out}
	return d.play(ctx, all), out.String()
}

func does(err error) func(*demo, context.Context) error {
	return func(*demo, context.Context) error { return err }
}

// TestPlay: a step that fails is counted as one, and so is what needs it, but nothing else.
func TestPlay(t *testing.T) {
	ok, out := perform(t, t.Context(), []step{
		{name: "a", do: does(nil)},
		{name: "b", do: does(errors.New("broken"))},
		{name: "c", needs: []string{"a", "b"}, do: func(*demo, context.Context) error { panic("not to be tried") }},
		{name: "d", needs: []string{"a"}, do: does(nil)},
	})
	if ok != 2 || !strings.Contains(out, "FAILED: broken") || !strings.Contains(out, "FAILED: "+errNotReached.Error()) {
		t.Errorf("%d ok:\n%s", ok, out)
	}
}

// TestPlayInterrupted: Ctrl-C ends the play at once and says so once.
func TestPlayInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	ok, out := perform(t, ctx, []step{
		{name: "a", do: does(nil)},
		{name: "b", do: func(_ *demo, ctx context.Context) error { cancel(errors.New("Ctrl-C")); return context.Cause(ctx) }},
		{name: "c", do: func(*demo, context.Context) error { panic("not to be tried") }},
	})
	if ok != 1 || strings.Count(out, "Ctrl-C") != 1 {
		t.Errorf("%d ok:\n%s", ok, out)
	}
}

// TestStepsNeedOnlyEarlierOnes: a name misspelt would make a step unreachable.
func TestStepsNeedOnlyEarlierOnes(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range steps() {
		for _, n := range s.needs {
			if !seen[n] {
				t.Errorf("step %s needs %s, which does not come before it", s.name, n)
			}
		}
		if seen[s.name] {
			t.Errorf("two steps %s", s.name)
		}
		seen[s.name] = true
	}
}

func TestListen(t *testing.T) {
	zeros := strings.Repeat("0", 64)
	for name, c := range map[string]struct {
		console           string
		bypassed, trusted bool
	}{
		"kept":          {"noise\nDEMO kernel Linux 6.1\r\nDEMO log tpm_crb: ok\nDEMO aggregate sha256:" + strings.Repeat("ab", 32) + "\nDEMO pcr 4 AB12\n", false, true},
		"bypassed":      {"DEMO log ima: No TPM chip found, activating TPM-bypass!\nDEMO aggregate sha256:" + zeros + "\n", true, false},
		"zeros":         {"DEMO aggregate sha256:" + zeros + "\n", false, false},
		"no aggregate":  {"DEMO aggregate \n", false, false},
		"nothing":       {"", false, false},
		"cut aggregate": {"DEMO aggregate sha256:abab\n", false, false},
	} {
		got := listen(c.console)
		if got.bypassed() != c.bypassed || got.trusted() != c.trusted {
			t.Errorf("%s: bypassed %v, trusted %v", name, got.bypassed(), got.trusted())
		}
		if name == "kept" && (got.kernel != "Linux 6.1" || got.pcrs["4"] != "ab12" || len(got.log) != 1) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestProcesses: this test's own process is found by stat, a number nobody has is not.
func TestProcesses(t *testing.T) {
	p, parent, ok := stat(os.Getpid())
	if !ok || parent != os.Getppid() || !p.lives() {
		t.Errorf("stat of this process: %+v, parent %d, %v", p, parent, ok)
	}
	p.start += "1"
	if p.lives() {
		t.Error("a process with another start time passes for this one")
	}
	if _, _, ok := stat(1 << 30); ok {
		t.Error("a process that cannot be lives")
	}
}
