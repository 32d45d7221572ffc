package builder

import (
	"context"
	"log/slog"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/ipc/rpc/rpctest"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/trust"
)

const (
	hers = "6a5e5b6c-0000-4000-8000-000000000001"
	his  = "6a5e5b6c-0000-4000-8000-000000000002"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ledgerOf has two tenants with a guest each.
func ledgerOf(t *testing.T, dir string) *trust.Ledger {
	t.Helper()
	l, err := trust.Open(dir, "/")
	must(t, err)
	must(t, l.Set(trust.Tenant{Name: "hers", Pool: dir}))
	must(t, l.Set(trust.Tenant{Name: "his", Pool: dir}))
	must(t, l.Claim(hers, "hers"))
	must(t, l.Claim(his, "his"))
	return l
}

// A toolstack that was taken over asks for what it likes: whatever concerns another tenant's guest,
// or nobody's, is refused before anything is looked at.
func TestTrustLists(t *testing.T) {
	b := &Builder{ledger: ledgerOf(t, t.TempDir()), guests: map[string]*guest{}, log: slog.New(slog.DiscardHandler)}
	for _, uuid := range []string{hers, "6a5e5b6c-0000-4000-8000-000000000003", "", "../../etc"} {
		for method, in := range map[string]any{
			protocol.MethodStop:          protocol.Stop{UUID: uuid},
			protocol.MethodQuote:         protocol.Quote{UUID: uuid},
			protocol.MethodActivate:      protocol.Activate{UUID: uuid},
			protocol.MethodInspect:       protocol.Inspect{UUID: uuid},
			protocol.MethodModules:       protocol.Modules{UUID: uuid},
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
	if err := callAs(t, b, "his", protocol.MethodBuild, build); rpc.KindOf(err) == "" || err == nil || b.ledger.Owner(hers) != "hers" {
		t.Errorf("build: %v, owner %s", err, b.ledger.Owner(hers))
	}
	if err := b.ledger.Claim(hers, "his"); rpc.KindOf(err) != rpc.Refused {
		t.Errorf("claim: %v", err)
	}
	// Without the lists being asked, the same call goes through to the guest.
	if err := callAs(t, b, "hers", protocol.MethodStop, protocol.Stop{UUID: hers}); err != nil {
		t.Errorf("its own: %v", err)
	}
}

func callAs(t *testing.T, b *Builder, tenant, method string, in any) error {
	t.Helper()
	return rpctest.Serve(t, b.served(tenant))(method, in)
}

// served is a handler for a tenant's toolstack.
func (b *Builder) served(tenant string) rpc.Handler {
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		return b.fromToolstack(ctx, &tenancy{b: b, name: tenant}, r)
	}
}
