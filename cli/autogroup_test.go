package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestAutogroup: turned back is what was turned off, once, and nothing else.
func TestAutogroup(t *testing.T) {
	dir := t.TempDir()
	g := autogroup{filepath.Join(dir, "setting"), filepath.Join(dir, "mark")}
	set := func(v string) {
		t.Helper()
		if err := os.WriteFile(g.setting, []byte(v), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	is := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(g.setting); err != nil || string(b) != want {
			t.Errorf("%q, %v; want %q", b, err, want)
		}
	}
	off := func(want bool) {
		t.Helper()
		if was, err := g.turnOff(); err != nil || was != want {
			t.Errorf("turned off: was %v, %v", was, err)
		}
	}
	back := func() {
		t.Helper()
		if err := g.turnBack(); err != nil {
			t.Error(err)
		}
	}
	off(false) // a kernel without it
	back()
	if _, err := os.Stat(g.setting); err == nil {
		t.Error("the setting was made")
	}
	set("0\n") // an operator's choice
	off(false)
	back()
	is("0\n")
	set("1\n")
	off(true)
	is("0\n")
	off(false) // up, once more
	back()
	is("1\n")
	set("0\n") // the operator's again
	back()
	is("0\n")
}

// TestAutogroupDenied: a setting that can't be changed is said, with what helps, and no more.
func TestAutogroupDenied(t *testing.T) {
	dir := t.TempDir()
	g := autogroup{filepath.Join(dir, "setting"), filepath.Join(dir, "no", "mark")}
	if err := os.WriteFile(g.setting, []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := g.turnOff(); err == nil {
		t.Error("turned off, though nothing would turn it back")
	}
	if on, err := g.on(); err != nil || !on {
		t.Errorf("on %v, %v", on, err)
	}
	// A file that is 1 and that even root cannot write: what a container has of /proc/sys.
	fixed := autogroup{"/sys/class/net/lo/ifindex", filepath.Join(dir, "fixed")}
	if was, err := fixed.turnOff(); err == nil || !was {
		t.Errorf("turned off: was %v, %v", was, err)
	}
	if err := fixed.turnBack(); err != nil {
		t.Errorf("turned back what was never off: %v", err)
	}
	var said bytes.Buffer
	(&app{err: &said}).scheduleApart(g)
	if !strings.Contains(said.String(), "mend: sysctl") {
		t.Errorf("said %q", said.String())
	}
	if f := scheduling(g); f.OK || f.Mend == "" {
		t.Errorf("%+v", f)
	}
}
