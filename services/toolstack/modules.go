package toolstack

import (
	"context"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// Modules has the guest's emulator say what the guest's modules have done. The answer is passed on.
func (a *api) Modules(ctx context.Context, r *v1.ModulesRequest) (*v1.ModulesResponse, error) {
	g, err := a.t.find(r.Name)
	if err != nil {
		return nil, status(err)
	}
	g.mu.Lock()
	up, isolated := g.up(), g.saved.Spec.Modules != nil
	g.mu.Unlock()
	switch {
	case !isolated:
		return nil, status(rpc.Errorf(rpc.Unavailable, "guest %q: its modules are not isolated: give its spec a section modules (`redoubt run --modules`)", r.Name))
	case !up:
		return nil, status(rpc.Errorf(rpc.Unavailable, "guest %q is down: what its modules do is known while it runs (`redoubt run %s`)", r.Name, r.Name))
	}
	b, err := a.t.ask(ctx, protocol.MethodModules, protocol.Modules{UUID: g.saved.UUID, Name: g.saved.Spec.Name, Caller: caller(ctx)})
	return &v1.ModulesResponse{Report: b}, status(err)
}
