package builder

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/trust"
)

// maxAdmins bounds the connections of the admin socket.
const maxAdmins = 16

// serveAdmin answers root, and nobody else, on the admin socket until ctx ends.
func (b *Builder) serveAdmin(ctx context.Context) error {
	socket, err := b.kept.Listen(b.left, "listen/admin", func() (*os.File, error) {
		return ipc.ListenMessages(filepath.Join(b.cfg.RunDir, services.AdminSocket), 0o600)
	})
	if err != nil {
		return err
	}
	defer socket.Close()
	serve, err := rpc.Serve(socket, maxAdmins, b.fromAdmin)
	if err != nil {
		return err
	}
	b.wg.Go(func() { serve(ctx) })
	return nil
}

func (b *Builder) fromAdmin(ctx context.Context, r *rpc.Request) (any, error) {
	ipc.CloseAll(r.Files)
	switch r.Method {
	case protocol.MethodServices:
		all, err := json.Marshal(b.procs.List())
		if err != nil {
			return nil, err
		}
		return answer.Text(services.Builder, all) // many guests are more than a message holds
	case protocol.MethodReset:
		return rpc.Answer(r, func(in protocol.Reset) (any, error) { return b.reset(in) })
	case protocol.MethodTenants:
		return b.ledger.All(), nil
	case protocol.MethodSetTenant:
		return rpc.Answer(r, func(in trust.Tenant) (any, error) {
			return struct{}{}, calls.Act(b.journal, r.Method, in.Name, func() error { return b.setTenant(ctx, in) })
		})
	case protocol.MethodRemoveTenant:
		return rpc.Answer(r, func(in trust.Tenant) (any, error) {
			return struct{}{}, calls.Act(b.journal, r.Method, in.Name, func() error { return b.removeTenant(in.Name) })
		})
	}
	return nil, rpc.Errorf(rpc.Refused, "builder: no call %q", r.Method)
}
