package builder

import (
	"context"
	"strconv"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	storesvc "redoubt.dev/redoubt/services/store"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/gate"
)

// openStore starts the store. What it cannot be saved from ends the Builder by fatal.
func (b *Builder) openStore(ctx context.Context, fatal func(error)) (*store, error) {
	return openStore(ctx, b.cfg.RunDir, &store{
		log: b.log, reset: b.cfg.StoreReset, seen: services.StateDir,
		workers: storesvc.NewSpawner(func() (*process.Process, error) {
			return b.procs.start(services.StoreLogic, "", "", 0)
		}),
		spawn: func(dir string, h rpc.Handler) (*process.Process, *rpc.Peer, <-chan struct{}, error) {
			b.procs.awaitEnd(services.StoreState)
			p, err := b.procs.start(services.StoreState, "", dir, 0)
			if err != nil {
				return nil, nil, nil, err
			}
			return b.storeRuns(p, h)
		},
		ended: func(err error) { b.serviceEnded(services.StoreState, err) },
		lost:  fatal,
	})
}

// storeRuns records a store that was started, and serves it.
func (b *Builder) storeRuns(p *process.Process, h rpc.Handler) (*process.Process, *rpc.Peer, <-chan struct{}, error) {
	if err := b.serviceStarted(services.StoreState, p, "reset", strconv.Itoa(b.cfg.StoreReset)); err != nil {
		p.Kill()
		<-p.Done()
		p.Control.Close()
		return nil, nil, nil, err
	}
	peer, heard := rpc.New(p.Control, b.refusals(services.StoreState, "", h)), make(chan struct{})
	b.wg.Go(func() {
		defer close(heard)
		if err := peer.Run(context.Background()); err != nil {
			b.log.Error("service", "service", p.Name, "err", err)
		}
	})
	return p, peer, heard, nil
}

// backends is the directory beneath which vTPM back ends are.
func backends() string { return server.DomainPath(server.Builder) + "/backend/vtpm" }

// layout makes the directories that others write beneath.
func (b *Builder) layout(ctx context.Context) error {
	return b.store.Set(ctx, []state.Node{{
		Path:  backends(),
		Perms: []tree.Perm{{Domain: server.Builder}, {Domain: server.VTPM, Access: tree.Read}},
	}})
}

// announce tells the store of a new domain (step 2), in one call: the front end's directory is
// the guest's, the back end's the vTPM manager's, the instance number the Builder's alone. The
// front end is Initialised: its ring is the TPM channel, which the Builder makes.
func (b *Builder) announce(ctx context.Context, d tree.Domain) error {
	front, back := server.FrontPath(d), server.BackPath(d)
	return b.store.Introduce(ctx, d, []state.Node{
		{Path: server.DomainPath(d), Perms: []tree.Perm{{Domain: server.Builder}, {Domain: d, Access: tree.Read}, {Domain: server.VTPM, Access: tree.Read}}},
		{Path: front, Perms: []tree.Perm{{Domain: d}, {Domain: server.VTPM, Access: tree.Read}}},
		{Path: front + "/backend", Value: back},
		{Path: front + "/backend-id", Value: strconv.Itoa(int(server.VTPM))},
		{Path: front + "/state", Value: strconv.Itoa(int(gate.Initialised))},
		{Path: back, Perms: []tree.Perm{{Domain: server.VTPM}, {Domain: d, Access: tree.Read}}},
		{Path: back + "/instance", Perms: []tree.Perm{{Domain: server.Builder}, {Domain: server.VTPM, Access: tree.Read}}},
		{Path: back + "/frontend", Value: front},
		{Path: back + "/frontend-id", Value: strconv.Itoa(int(d))},
		{Path: back + "/state", Value: strconv.Itoa(int(gate.Initialising))},
	})
}

// forget removes a domain from the store.
func (b *Builder) forget(d tree.Domain) {
	paths := []string{server.DomainPath(d), backends() + "/" + strconv.Itoa(int(d))}
	if err := b.store.Release(context.Background(), d, paths); err != nil {
		b.log.Warn("store", "err", err)
	}
}
