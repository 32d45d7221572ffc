package kept

import (
	"context"
	"strconv"

	"redoubt.dev/redoubt/services/store"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/gate"
)

// Introduce is the call of that name.
func (s *Store) Introduce(ctx context.Context, d tree.Domain, nodes []state.Node) error {
	return s.call(ctx, store.MethodIntroduce, store.Introduce{Domain: d, Nodes: nodes})
}

// Set is the call of that name.
func (s *Store) Set(ctx context.Context, nodes []state.Node) error {
	return s.call(ctx, store.MethodSet, store.Set{Nodes: nodes})
}

// Release is the call of that name; who has a connection of the domain is given no other one.
func (s *Store) Release(ctx context.Context, d tree.Domain, paths []string) error {
	s.drop(d)
	return s.call(ctx, store.MethodRelease, store.Release{Domain: d, Paths: paths})
}

// backends is the directory beneath which vTPM back ends are.
func backends() string { return server.DomainPath(server.Builder) + "/backend/vtpm" }

// Layout makes the directories that others write beneath.
func (s *Store) Layout(ctx context.Context) error {
	return s.Set(ctx, []state.Node{{
		Path:  backends(),
		Perms: []tree.Perm{{Domain: server.Builder}, {Domain: server.VTPM, Access: tree.Read}},
	}})
}

// Announce tells the store of a new domain (step 2), in one call: the front end's directory is
// the guest's, the back end's the vTPM manager's, the instance number the Builder's alone. The
// front end is Initialised: its ring is the TPM channel, which the Builder makes.
func (s *Store) Announce(ctx context.Context, d tree.Domain) error {
	front, back := server.FrontPath(d), server.BackPath(d)
	return s.Introduce(ctx, d, []state.Node{
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

// Forget removes a domain from the store.
func (s *Store) Forget(d tree.Domain) {
	paths := []string{server.DomainPath(d), backends() + "/" + strconv.Itoa(int(d))}
	if err := s.Release(context.Background(), d, paths); err != nil {
		s.o.Log.Warn("store", "domain", d, "err", err)
	}
}
