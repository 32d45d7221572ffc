package builder

import (
	"context"

	"redoubt.dev/redoubt/ipc/rpc"
	emulator "redoubt.dev/redoubt/services/emulator/asked"
	inspected "redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
)

// running is a guest that runs, and its emulator, which may be the last one of a guest that reboots.
func (b *Builder) running(uuid string) (*guest, *run, error) {
	g := b.guest(uuid)
	if g == nil {
		return nil, nil, rpc.Errorf(rpc.Unavailable, "the guest is down")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.run == nil {
		return nil, nil, rpc.Errorf(rpc.Unavailable, "the guest is being started: ask again")
	}
	return g, g.run, nil
}

// inspect has a question about a guest that runs answered from its memory.
func (b *Builder) inspect(ctx context.Context, in protocol.Inspect) (any, error) {
	g, run, err := b.running(in.UUID)
	if err != nil {
		return nil, err
	}
	g.keeping.Lock() // while the memory is there, so is the kernel
	m := inspected.Machine{Layout: string(g.Emulator), Size: g.memory(), Memory: run.memory, Kernel: g.Kernel}
	open, err := m.Open()
	g.keeping.Unlock()
	if err != nil {
		return nil, err
	}
	return b.inspectors.Ask(ctx, g.name(), &g.inspected, open, in.Question)
}

// modules has a guest's emulator tell what the guest's modules have done.
func (b *Builder) modules(ctx context.Context, in protocol.Modules) (any, error) {
	_, run, err := b.running(in.UUID)
	if err != nil {
		return nil, err
	}
	return emulator.Modules(ctx, run.peer)
}
