package builder

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

const (
	hers = "6a5e5b6c-0000-4000-8000-000000000001"
	his  = "6a5e5b6c-0000-4000-8000-000000000002"
)

// ledgerOf has two tenants with a guest each.
func ledgerOf(t *testing.T, dir string) *ledger {
	t.Helper()
	l, err := openLedger(dir, "/")
	must(t, err)
	must(t, l.set(Tenant{Name: "hers", Pool: dir}))
	must(t, l.set(Tenant{Name: "his", Pool: dir}))
	must(t, l.claim(hers, "hers"))
	must(t, l.claim(his, "his"))
	return l
}

// A toolstack that was taken over asks for what it likes: whatever concerns another tenant's guest,
// or nobody's, is refused before anything is looked at.
func TestTrustLists(t *testing.T) {
	b := &Builder{ledger: ledgerOf(t, t.TempDir()), guests: map[string]*guest{}, log: quiet()}
	for _, uuid := range []string{hers, "6a5e5b6c-0000-4000-8000-000000000003", "", "../../etc"} {
		for method, in := range map[string]any{
			protocol.MethodStop:          protocol.Stop{UUID: uuid},
			protocol.MethodQuote:         protocol.Quote{UUID: uuid},
			protocol.MethodActivate:      protocol.Activate{UUID: uuid},
			protocol.MethodAttachConsole: protocol.AttachConsole{UUID: uuid},
		} {
			if err := callAs(t, b, "his", method, in); rpc.KindOf(err) != rpc.Refused {
				t.Errorf("%s of %q: %v", method, uuid, err)
			}
		}
	}
	if err := callAs(t, b, "his", protocol.MethodDestroy, protocol.Destroy{UUID: hers}); rpc.KindOf(err) != rpc.Refused {
		t.Errorf("destroy: %v", err)
	}
	build := protocol.Build{UUID: hers}
	build.Spec.Name, build.Spec.Boot.Kernel = "web", "/boot/vmlinuz"
	build.Spec.Memory, build.Spec.CPUs = 256<<20, 1
	if err := callAs(t, b, "his", protocol.MethodBuild, build); rpc.KindOf(err) == "" || err == nil || b.ledger.owner(hers) != "hers" {
		t.Errorf("build: %v, owner %s", err, b.ledger.owner(hers))
	}
	if err := b.ledger.claim(hers, "his"); rpc.KindOf(err) != rpc.Refused {
		t.Errorf("claim: %v", err)
	}
	// Without the lists being asked, the same call goes through to the guest.
	if err := callAs(t, b, "hers", protocol.MethodStop, protocol.Stop{UUID: hers}); err != nil {
		t.Errorf("its own: %v", err)
	}
}

func callAs(t *testing.T, b *Builder, tenant, method string, in any) error {
	t.Helper()
	return served(t, b.served(tenant))(method, in)
}

// served is a handler for a tenant's toolstack.
func (b *Builder) served(tenant string) rpc.Handler {
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		return b.fromToolstack(ctx, &tenancy{b: b, name: tenant}, r)
	}
}

// The lists outlive the Builder, and a damaged file is refused and left as it is.
func TestLedger(t *testing.T) {
	dir := t.TempDir()
	ledgerOf(t, dir)
	l, err := openLedger(dir, "/")
	must(t, err)
	if l.owner(hers) != "hers" || len(l.all()) != 3 {
		t.Errorf("%v, %v", l.guests, l.all())
	}
	if err := l.remove("hers"); rpc.KindOf(err) != rpc.Exists {
		t.Errorf("a tenant with guests: %v", err)
	}
	must(t, l.drop(hers))
	must(t, l.remove("hers"))
	for _, name := range []string{"default", "hers"} {
		if l.remove(name) == nil {
			t.Errorf("%s was removed", name)
		}
	}
	for _, bad := range []Tenant{{Name: "A", Pool: "/"}, {Name: "../x", Pool: "/"}, {Name: "a", Pool: "x"}, {}} {
		if l.set(bad) == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	for _, name := range []string{TenantsFile, TrustFile} {
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		must(t, err)
		for _, bad := range [][]byte{good[:len(good)/2], []byte("{}"), bytes.Replace(good, []byte(`"version": 1`), []byte(`"version": 2`), 1), nil} {
			must(t, os.WriteFile(path, bad, 0o600))
			if _, err := openLedger(dir, "/"); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("%s with %q: %v", name, bad, err)
			}
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, bad) {
				t.Errorf("%s was changed", name)
			}
		}
		must(t, os.WriteFile(path, good, 0o600))
	}
}

// Files are opened beneath the pool and by no link, whoever made it.
func TestPool(t *testing.T) {
	dir := t.TempDir()
	pool, outside := filepath.Join(dir, "pool"), filepath.Join(dir, "outside")
	for _, d := range []string{pool, pool + "/sub", outside} {
		must(t, os.Mkdir(d, 0o755))
	}
	for _, f := range []string{pool + "/disk", pool + "/sub/disk", outside + "/disk"} {
		must(t, os.WriteFile(f, nil, 0o600))
	}
	must(t, os.Symlink(outside, pool+"/way"))
	must(t, os.Symlink(outside+"/disk", pool+"/link"))
	must(t, os.Symlink("disk", pool+"/inside"))
	b := &Builder{}
	for path, want := range map[string]string{
		pool + "/disk": "", pool + "/sub/disk": "", pool + "/sub/../disk": "",
		outside + "/disk": "outside the pool", pool + "/../outside/disk": "outside the pool", "disk": "outside the pool",
		pool + "/way/disk": "symbolic link", pool + "/link": "symbolic link", pool + "/inside": "symbolic link",
		pool + "/sub": "not a regular file", pool + "/none": "no such file", pool: "not a regular file",
		"/proc/self/root" + pool + "/disk": "outside the pool",
	} {
		f, err := b.open(pool, protocol.Open{Field: "disks[0].path", Path: path})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
		if err == nil {
			f.Close()
		}
	}
}
