package builder

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/trust"
)

// tenancy is a tenant's toolstack, which is started again whenever it has ended. Its guests run on
// meanwhile, also when it is given up: the Builder holds what connects a toolstack to them.
type tenancy struct {
	// Its lock is held over one change of the toolstack, so that no event is lost between an adoption
	// and the next notice. It is over ends, too.
	*keeper.Keeper
	b        *Builder
	name     string
	listener *os.File        // of its API; callers wait in its queue while there is no toolstack
	network  *networking     // of its guests
	denied   calls.Refusals  // callers turned away
	gone     context.Context // ends with close
	leave    context.CancelFunc
	ends     map[string]protocol.Ended // the last of each guest
}

// listenEntry is what the socket of a tenant's API is kept as.
func listenEntry(tenant string) string { return "listen/tenant/" + tenant }

// openTenant starts a tenant's toolstack, and takes over what its network has of the host's.
func (b *Builder) openTenant(ctx context.Context, name string) error {
	path := services.APIPath(b.cfg.RunDir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return err
	}
	// Whoever comes is judged by the toolstack, by who they are.
	l, err := b.kept.Listen(b.left, listenEntry(name), func() (*os.File, error) { return ipc.Listen(path, 0o666) })
	if err != nil {
		return err
	}
	dir, whose := filepath.Join(b.cfg.StateDir, "guests"), ""
	if name != services.DefaultTenant {
		dir, whose = filepath.Join(b.cfg.StateDir, services.TenantsDir, name), name
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		l.Close()
		return err
	}
	network, err := b.newNetworking(ctx, name)
	if err != nil {
		l.Close()
		return fmt.Errorf("network of %s: %w", name, err)
	}
	t := &tenancy{b: b, name: name, listener: l, network: network, ends: kept.TakeEnds(b.left, name)}
	t.gone, t.leave = context.WithCancel(context.Background())
	t.Keeper = keeper.New(keeper.Options{
		Service: services.Toolstack, About: name, Log: b.log, Journal: b.journal, Detail: []string{"tenant", name},
		Start: func() (keeper.Process, error) {
			return b.procs.Start(services.Toolstack, launch.Order{Whose: whose, StateDir: dir})
		},
		Handler: t.handler, Ready: t.ready,
		// Nobody is to wait for a toolstack that will not come.
		Lost:  func(error) { b.wg.Go(func() { _ = ipc.Refuse(t.gone, t.listener) }) },
		Final: true, Drain: stopGrace, Every: b.cfg.Resets[services.Toolstack],
	})
	t.Lock()
	err = t.Begin(ctx)
	t.Unlock()
	b.mu.Lock()
	if b.closing {
		err = errors.Join(err, rpc.Errorf(rpc.Unavailable, "Redoubt is going down"))
	}
	if err == nil {
		b.tenancies[name] = t
	}
	b.mu.Unlock()
	if err != nil {
		t.close()
		t.network.close()
		return fmt.Errorf("toolstack of %s: %w", name, err)
	}
	return nil
}

func (b *Builder) tenancy(name string) *tenancy {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.tenancies[name]
}

// readyLimit bounds what a toolstack may take to be told.
const readyLimit = time.Minute

// ready gives a toolstack the guests that run.
func (t *tenancy) ready(ctx context.Context, i *keeper.Instance) error {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	tenant, err := t.b.ledger.Tenant(t.name)
	if err == nil {
		_, err = i.Peer.Call(ctx, protocol.MethodConfigure, protocol.ConfigureToolstack{
			Tenant: t.name, StateDir: services.StateDir, Operators: tenant.Operators, Viewers: tenant.Viewers,
		}, nil)
	}
	for _, g := range t.b.guestsOf(t.name) {
		if err == nil {
			err = t.adopt(ctx, i, g)
		}
	}
	for _, e := range t.ends {
		if err == nil && t.b.guest(e.UUID) == nil { // else it was started again since
			_ = i.Peer.Notify(protocol.NoticeEnded, e)
		}
	}
	if err == nil { // callers find what there is, not what is still to be told
		_, err = i.Peer.Call(ctx, protocol.MethodServe, struct{}{}, nil, t.listener)
	}
	return err
}

// guestsOf are a tenant's guests that run.
func (b *Builder) guestsOf(tenant string) []*guest {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []*guest
	for _, g := range b.guests {
		if g.Tenant == tenant {
			out = append(out, g)
		}
	}
	return out
}

// adopt gives a toolstack a guest that it did not start. One that is not quite started yet follows
// when it is.
func (t *tenancy) adopt(ctx context.Context, i *keeper.Instance, g *guest) error {
	g.mu.Lock()
	in := protocol.Adopt{UUID: g.Build.UUID, Emulator: g.Emulator, Stopping: g.asked, Events: append([]protocol.Event(nil), g.timeline...)}
	run := g.run
	g.mu.Unlock()
	if run == nil {
		return nil
	}
	in.Domain = run.domain
	_, err := i.Peer.Call(ctx, protocol.MethodAdopt, in, nil, g.Ends...)
	if errors.Is(err, os.ErrClosed) {
		return nil // it has ended: that is told
	}
	return err
}

// close ends it for good: nothing is asked for any more when it returns.
func (t *tenancy) close() {
	t.Close(stopGrace)
	t.leave()
	t.listener.Close()
}

// notify has the toolstack told, if there is one. Nobody waits for it: what is told of one tenant's guests is no other's affair.
func (t *tenancy) notify(method string, v any) {
	e, last := v.(protocol.Ended)
	t.Post(last, func(i *keeper.Instance) {
		if last {
			t.ends[e.UUID] = e
		}
		if i != nil {
			_ = i.Peer.Notify(method, v) // one that is gone is told by the next adoption
		}
	})
}

// forget drops what is kept of a guest that is destroyed.
func (t *tenancy) forget(uuid string) {
	t.Lock()
	defer t.Unlock()
	delete(t.ends, uuid)
	kept.DropEnd(t.b.kept, t.name, uuid)
}

// handler serves a toolstack.
func (t *tenancy) handler(i *keeper.Instance) rpc.Handler {
	recorded := calls.Recorded(t.b.journal, t.name, t.b.nameOf, func(ctx context.Context, r *rpc.Request) (any, error) {
		if err := t.b.awaitReady(ctx); err != nil {
			ipc.CloseAll(r.Files)
			return nil, err
		}
		v, err := t.b.fromToolstack(ctx, t, r)
		if built, ok := v.(rpc.WithFiles); ok && err == nil && r.Method == protocol.MethodBuild {
			t.late(i, built)
		}
		return v, err
	})
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		if r.Method != protocol.NoticeDenied {
			return recorded(ctx, r)
		}
		var in protocol.Denied // a caller whom the toolstack turned away
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		t.denied.Note(t.b.journal, audit.Actor{Service: services.Toolstack, UID: in.Caller.UID, PID: in.Caller.PID},
			"method", clip(in.Method, 128), "tenant", t.name)
		return nil, nil
	}
}

// late gives a guest to the present toolstack if the one that asked for it is gone.
func (t *tenancy) late(asked *keeper.Instance, built rpc.WithFiles) {
	out, ok := built.Value.(protocol.Built)
	if !ok {
		return
	}
	g := t.b.guest(out.UUID)
	t.Lock()
	defer t.Unlock()
	if i := t.Now(); i != nil && i != asked && g != nil {
		if err := t.adopt(context.Background(), i, g); err != nil {
			t.b.log.Warn("toolstack", "tenant", t.name, "err", err)
		}
	}
}

// setTenant makes a tenant or changes it; its toolstack is replaced.
func (b *Builder) setTenant(ctx context.Context, in trust.Tenant) error {
	b.tenantChange.Lock()
	defer b.tenantChange.Unlock()
	if err := b.ledger.Set(in); err != nil {
		return err
	}
	if t := b.tenancy(in.Name); t != nil {
		if !t.Reset() {
			return rpc.Errorf(rpc.Unavailable, "tenant %s is changed, but its toolstack could not be replaced: see the services' log", in.Name)
		}
		return nil
	}
	return b.openTenant(ctx, in.Name)
}

// removeTenant forgets a tenant without guests and ends its toolstack.
func (b *Builder) removeTenant(name string) error {
	b.tenantChange.Lock()
	defer b.tenantChange.Unlock()
	if err := b.ledger.Remove(name); err != nil {
		return err
	}
	b.mu.Lock()
	t := b.tenancies[name]
	delete(b.tenancies, name)
	b.mu.Unlock()
	if t != nil {
		t.close()
		t.network.close()
	}
	b.kept.Drop(listenEntry(name))
	err := os.Remove(services.APIPath(b.cfg.RunDir, name))
	return errors.Join(err, os.RemoveAll(filepath.Join(b.cfg.StateDir, services.TenantsDir, name)))
}

// closeTenants ends every toolstack, so that nothing new is asked for.
func (b *Builder) closeTenants() {
	b.mu.Lock()
	b.closing = true
	all := maps.Clone(b.tenancies)
	b.mu.Unlock()
	var wg sync.WaitGroup
	for _, t := range all {
		wg.Go(t.close)
	}
	wg.Wait()
}
