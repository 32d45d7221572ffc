package services_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/sandbox/attack"
	"redoubt.dev/redoubt/services"
)

// uid is of nobody on the machine.
const uid = 0x52450020

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
	victim := startVictim(t, bin)
	host := &sandbox.Host{Launcher: bin}
	for i := range services.Table {
		s := &services.Table[i]
		t.Run(s.Name, func(t *testing.T) {
			in := services.Instance{Label: s.Name, UID: uid, Memory: 64 << 20}
			if s.State == services.ReadWrite {
				in.StateDir = t.TempDir()
				if err := os.Chown(in.StateDir, uid, uid); err != nil {
					t.Fatal(err)
				}
			}
			spec, err := s.Sandbox(in)
			if err != nil {
				t.Fatal(err)
			}
			if s.Foreign() {
				// The probe is in Go: it has the calls of the program and its own runtime's.
				spec.Policy = sandbox.MustParsePolicy(s.Name, []byte("include "+s.Policy.Name+"\ninclude go\n"))
			}
			for _, a := range append([]attack.Attack{attack.Nothing}, attack.All...) {
				want := a.Name == attack.Nothing.Name || declared(s.Name, a.Name) != ""
				cmd := exec.Command(bin, "attack", a.Name, victim)
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				g, err := host.Prepare(cmd, spec)
				if err != nil {
					t.Fatal(err)
				}
				if err := g.Start(); err != nil {
					t.Fatal(err)
				}
				err = g.Wait()
				if got := err == nil && strings.HasPrefix(out.String(), "allowed"); got != want {
					t.Errorf("%s: succeeds: %v, declared: %v (%v, %s)", a.Name, got, want, err, out.String())
				}
			}
		})
	}
}

// declared says why an attack is none for a service: what it does is declared for it.
func declared(service, name string) string {
	if service == services.QEMU && name == "executable memory" {
		return "with TCG it executes what it writes; on KVM it may not"
	}
	return ""
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
			if why := declared(services.Table[i].Name, a.Name); why != "" {
				by += "; declared for " + services.Table[i].Name + ": " + why
			}
		}
		fmt.Fprintf(&b, "| %s | %s |\n", a.Name, by)
	}
	samePage(t, "../docs/ATTACKS.md", b.String())
}

func startVictim(t *testing.T, bin string) string {
	t.Helper()
	cmd := exec.Command(bin, "victim", t.TempDir())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("victim: %v", err)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(line), &attack.Victim{}); err != nil {
		t.Fatal(fmt.Errorf("victim: %w", err))
	}
	return strings.TrimSpace(line)
}
