package services_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/sandbox/attack"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/matrix"
)

// TestAttacks runs every attack in the sandbox of every service, where it must fail. That it
// succeeds without a sandbox is shown by package attack's own test, for each.
func TestAttacks(t *testing.T) {
	tools, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("REDOUBT_TOOLS", tools.Tools())
	bin := filepath.Join(t.TempDir(), "probe")
	if b := os.Getenv("REDOUBT_TEST_PROBE"); b != "" { // of a machine without Go
		bin = b
	} else {
		cmd := exec.Command("go", "build", "-o", bin, "../sandbox/attack/probe")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	field, err := matrix.New(bin, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := field.Close(); err != nil {
			t.Errorf("victim: %v", err)
		}
	})
	for i := range services.Table {
		s := &services.Table[i]
		t.Run(s.Name, func(t *testing.T) {
			state := t.TempDir()
			for _, a := range append([]attack.Attack{attack.Nothing}, attack.All...) {
				want := a.Name == attack.Nothing.Name || matrix.Declared(s.Name, a.Name) != ""
				r, err := field.Inside(s, state, a)
				if err != nil {
					t.Fatal(err)
				}
				if r.Succeeded != want {
					t.Errorf("%s: succeeds: %v, declared: %v (%s)", a.Name, r.Succeeded, want, r.Text)
				}
			}
		})
	}
}

// The matrix is a page of the documentation.
func TestAttackPage(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# What a service that was taken over cannot do

Made by ` + "`go test ./services -rewrite`" + `; do not edit. Each of these is tried in the sandbox of every service by
TestAttacks of package services, where it must fail, and without a sandbox by TestMatrix of package
sandbox/attack, where it must succeed (some need what a kernel may lack; the test then says so). "Two walls" means that
namespaces, root, capabilities, limits or Landlock stop it even where the list of system calls would let it
pass, which TestMatrix tries, too.

| attack | stopped by |
|---|---|
`)
	for _, a := range attack.All {
		by := "two walls"
		if a.OnlyFilter {
			by = "the list of system calls"
		}
		for i := range services.Table {
			if why := matrix.Declared(services.Table[i].Name, a.Name); why != "" {
				by += "; declared for " + services.Table[i].Name + ": " + why
			}
		}
		fmt.Fprintf(&b, "| %s | %s |\n", a.Name, by)
	}
	samePage(t, "../docs/ATTACKS.md", b.String())
}
