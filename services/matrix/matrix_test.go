package matrix

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/sandbox/attack"
	"redoubt.dev/redoubt/services"
)

// TestNetworkReach: the capability of a service that is in Redoubt's network reaches no further, even
// if its list let every call pass; in that network it does count.
func TestNetworkReach(t *testing.T) {
	bin := probe(t)
	f, err := New(bin, t.TempDir())
	spec := netback(t, f, err)
	for _, name := range []string{
		"the host's network interfaces, seen", "the host's network interfaces, changed",
		"an interface put into the host's network", "requests to the host's network by its number",
		"another process's namespace", "new network namespace",
	} {
		a, err := attack.Find(name)
		if err != nil {
			t.Fatal(err)
		}
		if r := f.Outside(a); !r.Succeeded && !r.Unavailable {
			t.Errorf("%s is no attack: %s", name, r.Text)
		}
		r, err := f.inside(spec, "attack", name, f.victim)
		if err != nil || !strings.HasPrefix(r.Text, "denied") {
			t.Errorf("%s: %v, %s", name, err, r.Text)
		}
	}
	if r, err := f.inside(spec, "interface"); err != nil || r.Text != "<nil>" {
		t.Errorf("an interface in Redoubt's network: %v, %s", err, r.Text)
	}
	// On a thread of the host's network it does not start.
	g, err := f.host.Prepare(exec.Command(bin, "exit"), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err == nil || !strings.Contains(err.Error(), "was started in net:[") {
		t.Errorf("started in the host's network: %v", err)
	}
}

// TestTenantsNetworkReach: nor does it reach another tenant's network of Redoubt's, in which the victim
// is.
func TestTenantsNetworkReach(t *testing.T) {
	bin := probe(t)
	other, err := network.NewNamespace()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Close() })
	f, err := newField(bin, t.TempDir(), other.Do)
	spec := netback(t, f, err)
	for name, from := range map[string]func(func() error) error{
		"the host's network interfaces, seen":          other.Do,
		"the host's network interfaces, changed":       other.Do,
		"an interface put into the host's network":     f.network.Do,
		"requests to the host's network by its number": f.network.Do,
		"another process's namespace":                  f.network.Do,
	} {
		a, err := attack.Find(name)
		if err != nil {
			t.Fatal(err)
		}
		var control Result
		if err := from(func() error { control = f.Outside(a); return nil }); err != nil {
			t.Fatal(err)
		}
		if !control.Succeeded && !control.Unavailable {
			t.Errorf("%s is no attack: %s", name, control.Text)
		}
		r, err := f.inside(spec, "attack", name, f.victim)
		if err != nil || !strings.HasPrefix(r.Text, "denied") {
			t.Errorf("%s: %v, %s", name, err, r.Text)
		}
	}
}

// netback is NetBack's sandbox in a field that was just made, or not; all calls pass its filter. The
// field ends with the test.
func netback(t *testing.T, f *Field, err error) *sandbox.Spec {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	s, err := services.Find(services.NetBack)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := f.spec(s, "")
	if err != nil {
		t.Fatal(err)
	}
	spec.Learn = true
	return spec
}

// probe builds the attacking program.
func probe(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-o", bin, "../../sandbox/attack/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return bin
}
