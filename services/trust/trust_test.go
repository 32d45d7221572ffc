package trust

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const (
	hers = "6a5e5b6c-0000-4000-8000-000000000001"
	his  = "6a5e5b6c-0000-4000-8000-000000000002"
)

// ledgerOf has two tenants with a guest each.
func ledgerOf(t *testing.T, dir string) *Ledger {
	t.Helper()
	l, err := Open(dir, "/")
	must(t, err)
	must(t, l.Set(Tenant{Name: "hers", Pool: dir}))
	must(t, l.Set(Tenant{Name: "his", Pool: dir}))
	must(t, l.Claim(hers, "hers"))
	must(t, l.Claim(his, "his"))
	return l
}

// The lists outlive the Builder, and a damaged file is refused and left as it is.
func TestLedger(t *testing.T) {
	dir := t.TempDir()
	ledgerOf(t, dir)
	l, err := Open(dir, "/")
	must(t, err)
	if l.Owner(hers) != "hers" || len(l.All()) != 3 {
		t.Errorf("%v, %v", l.guests, l.All())
	}
	if err := l.Remove("hers"); rpc.KindOf(err) != rpc.Exists {
		t.Errorf("a tenant with guests: %v", err)
	}
	must(t, l.Drop(hers))
	must(t, l.Remove("hers"))
	for _, name := range []string{"default", "hers"} {
		if l.Remove(name) == nil {
			t.Errorf("%s was removed", name)
		}
	}
	for _, bad := range []Tenant{{Name: "A", Pool: "/"}, {Name: "../x", Pool: "/"}, {Name: "a", Pool: "x"}, {}} {
		if l.Set(bad) == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	for _, name := range []string{TenantsFile, TrustFile} {
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		must(t, err)
		for _, bad := range [][]byte{good[:len(good)/2], []byte("{}"), bytes.Replace(good, []byte(`"version": 1`), []byte(`"version": 2`), 1), nil} {
			must(t, os.WriteFile(path, bad, 0o600))
			if _, err := Open(dir, "/"); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("%s with %q: %v", name, bad, err)
			}
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, bad) {
				t.Errorf("%s was changed", name)
			}
		}
		must(t, os.WriteFile(path, good, 0o600))
	}
}
