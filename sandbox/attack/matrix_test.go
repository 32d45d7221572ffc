package attack_test

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

	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/sandbox/attack"
)

// uid is of nobody on the machine.
const uid = 0x52450001

// open is a list that stops nothing, with Learn: it shows what stands without the filter.
var open = sandbox.MustParsePolicy("open", []byte("read\nwrite\nexit_group\n"))

// probe builds the program that tests run; a machine without Go is given it by name.
func probe(t *testing.T) string {
	t.Helper()
	if bin := os.Getenv("REDOUBT_TEST_PROBE"); bin != "" {
		return bin
	}
	bin := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-o", bin, "./probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return bin
}

// victim starts the attacked process.
func victim(t *testing.T, bin string) string {
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
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// TestMatrix runs every attack without a sandbox, in the sandbox without its filter, and in the
// whole sandbox.
func TestMatrix(t *testing.T) {
	bin := probe(t)
	v := victim(t, bin)
	list, err := sandbox.BasePolicy("go")
	if err != nil {
		t.Fatal(err)
	}
	host := &sandbox.Host{Launcher: bin}
	inside := func(t *testing.T, name string, s *sandbox.Spec) string {
		t.Helper()
		cmd := exec.Command(bin, "attack", name, v)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		g, err := host.Prepare(cmd, s)
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Start(); err != nil {
			t.Fatal(err)
		}
		if err := g.Wait(); err != nil {
			return "denied: " + err.Error()
		}
		return strings.TrimSpace(out.String())
	}
	table := &bytes.Buffer{}
	for _, a := range attack.All {
		t.Run(a.Name, func(t *testing.T) {
			b, err := exec.Command(bin, "attack", a.Name, v).CombinedOutput()
			off := strings.TrimSpace(string(b))
			if err != nil {
				t.Fatalf("without a sandbox: %v: %s", err, off)
			}
			walls := inside(t, a.Name, &sandbox.Spec{Name: "walls", UID: uid, GID: uid, Policy: open, Learn: true})
			whole := inside(t, a.Name, &sandbox.Spec{Name: "whole", UID: uid, GID: uid, Policy: list})
			fmt.Fprintf(table, "| %s | %s | %s | %s |\n", a.Name, off, walls, whole)
			if !strings.HasPrefix(whole, "denied: ") {
				t.Errorf("in the sandbox: %s", whole)
			}
			if strings.HasPrefix(off, "unavailable: ") {
				t.Skipf("denied in the sandbox; that it succeeds without one needs another kernel: %s", off)
			}
			if off != "allowed" {
				t.Errorf("without a sandbox: %s: the attack is not real", off)
			}
			if (walls == "allowed") != a.OnlyFilter {
				t.Errorf("without the filter: %s", walls)
			}
		})
	}
	t.Logf("\n| attack | without | without filter | sandbox |\n|---|---|---|---|\n%s", table)
}
