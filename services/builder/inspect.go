package builder

import (
	"context"

	"redoubt.dev/redoubt/ipc/rpc"
	inspected "redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
)

// inspect has a question about a guest that runs answered from its memory.
func (b *Builder) inspect(ctx context.Context, in protocol.Inspect) (any, error) {
	g := b.guest(in.UUID)
	if g == nil {
		return nil, rpc.Errorf(rpc.Unavailable, "the guest is down")
	}
	m := inspected.Machine{Layout: string(g.Emulator), Size: g.memory(), Kernel: g.Kernel}
	g.keeping.Lock() // while the memory is there, so is the kernel
	g.mu.Lock()
	if g.run != nil {
		m.Memory = g.run.memory
	}
	g.mu.Unlock()
	open, err := m.Open()
	g.keeping.Unlock()
	if err != nil {
		return nil, err
	}
	return b.inspectors.Ask(ctx, g.name(), &g.inspected, open, in.Question)
}
