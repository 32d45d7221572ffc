package builder

import (
	"context"
	"log/slog"
	"os"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/pci/topology"
	blkback "redoubt.dev/redoubt/services/blkback/kept"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/tree"
)

// TestBackEndRefused: an emulator gets no connection but those of its own guest's devices, before that
// runs, and not without end.
func TestBackEndRefused(t *testing.T) {
	b := &Builder{log: slog.New(slog.DiscardHandler)}
	r := &run{domain: 7}
	made := kept.Guest{Emulator: spec.Native, Build: protocol.Build{Spec: spec.Guest{Name: "g", Disks: make([]spec.Disk, 1)}}, Disks: make([]*os.File, 1)}
	g := &guest{Guest: made}
	memory, err := os.Open(os.DevNull)
	must(t, err)
	defer memory.Close()
	// Both have a run already, and memory; the domain is this emulator's.
	lock := func() *keeper.Keeper { return keeper.New(keeper.Options{Log: b.log}) }
	g.storage = blkback.New(blkback.Options{Disks: make([]*os.File, 1), Log: b.log}) // of no emulator
	g.nics = &nics{n: &networking{Keeper: lock(), b: b}, g: g, config: make([]network.NIC, 1), memory: memory, domain: 7, run: r}
	ours, its, err := ipc.Pipe()
	must(t, err)
	builder, emulator := rpc.New(ours, b.fromEmulator(g, r)), rpc.New(its, nil)
	b.wg.Go(func() { _ = builder.Run(context.Background()) })
	b.wg.Go(func() { _ = emulator.Run(context.Background()) })
	defer b.wg.Wait()
	defer emulator.Close()
	ask := func(kind topology.Kind, index int) {
		t.Helper()
		files, err := emulator.Call(t.Context(), protocol.MethodBackEnd, protocol.BackEnd{Kind: kind, Index: index}, nil)
		if rpc.KindOf(err) != rpc.Refused || len(files) != 0 {
			t.Errorf("%s[%d]: %d descriptors, %v", kind, index, len(files), err)
		}
	}
	ask(topology.Disk, 0) // it runs
	ask(topology.NIC, 0)
	is := func(domain tree.Domain) {
		g.nics.n.Lock()
		defer g.nics.n.Unlock()
		g.nics.run, g.nics.domain = nil, domain
	}
	is(8) // another emulator is being started
	ask(topology.Disk, 0)
	ask(topology.NIC, 0)
	for _, i := range []int{-1, 1, 1 << 40} {
		ask(topology.Disk, i)
		ask(topology.NIC, i)
	}
	ask(topology.RNG, 0)
	is(7)
	r.mu.Lock()
	r.asked = maxBackEnds
	r.mu.Unlock()
	ask(topology.Disk, 0) // too often
}
