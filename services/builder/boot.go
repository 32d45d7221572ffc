package builder

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
)

// boot has the Bootstrapper ask for the services that it can be asked for, each once, and returns
// when all are ready and the Bootstrapper is gone.
func (b *Builder) boot(ctx context.Context, start map[string]func(context.Context) error) error {
	p, err := b.procs.Start(services.Bootstrapper, launch.Order{})
	if err != nil {
		return err
	}
	var in protocol.Boot
	for i := range services.Table {
		s := &services.Table[i]
		if start[s.Name] != nil {
			needs := slices.DeleteFunc(slices.Clone(s.DependsOn), func(n string) bool { return start[n] == nil })
			in.Services = append(in.Services, protocol.Bootable{Name: s.Name, Needs: needs})
		}
	}
	var mu sync.Mutex
	peer := rpc.New(p.Control, calls.Watched(b.journal, services.Bootstrapper, "", func(rctx context.Context, r *rpc.Request) (any, error) {
		ipc.CloseAll(r.Files)
		var q protocol.StartService
		if err := r.Decode(&q); err != nil {
			return nil, err
		}
		mu.Lock()
		f := start[q.Name]
		delete(start, q.Name)
		mu.Unlock()
		if r.Method != protocol.MethodStartService || f == nil {
			return nil, rpc.Errorf(rpc.Refused, "builder: no call %q of %q from the Bootstrapper", r.Method, q.Name)
		}
		return struct{}{}, f(ctx)
	}))
	is := audit.NewInstance(services.Bootstrapper, p.PID())
	if err := b.journal.Record(b.journal.Started(is)); err != nil {
		p.Kill()
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = peer.Run(context.Background()) })
	_, err = peer.Call(ctx, protocol.MethodBoot, in, nil)
	stop, cancel := context.WithTimeout(context.Background(), stopGrace)
	defer cancel()
	end := p.Stop(stop)
	wg.Wait()
	b.journal.Note(b.journal.Ended(is, end, nil))
	mu.Lock()
	defer mu.Unlock()
	switch {
	case errors.Is(err, rpc.ErrGone) && end != nil:
		return end
	case err == nil && len(start) > 0:
		return errors.New("the Bootstrapper left before all services were asked for")
	}
	return err
}

// openTenants starts every tenant's toolstack.
func (b *Builder) openTenants(ctx context.Context) error {
	for _, u := range b.cfg.Uplinks {
		if _, err := b.ledger.Tenant(cmp.Or(u.Tenant, services.DefaultTenant)); err != nil {
			b.log.Warn("an uplink waits for its tenant: make it with `redoubt tenant set`", "uplink", u.Name, "tenant", u.Tenant)
		}
	}
	for _, t := range b.ledger.All() {
		if err := b.openTenant(ctx, t.Name); err != nil {
			return err
		}
	}
	return nil
}

// awaitReady holds calls that come before all services are ready.
func (b *Builder) awaitReady(ctx context.Context) error {
	select {
	case <-b.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
