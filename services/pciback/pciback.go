// Package pciback is the PCIBack service: it says what a guest's PCI bus looks like, which device has
// which slot, where its registers lie and which interrupt routes it uses (package topology), and leaves. It has no
// descriptor but its control connection, and knows of its guest what its one call says: how many
// devices of which kind, and what they need.
//
// One process assigns one guest's bus, once, and ends with its answer. A reboot asks nobody: the bus is
// the guest's, not an emulator's. Why not one process for a batch of starts: its input derives from
// tenants' specs, so that it would be shared by tenants, and it would need a clock to know that there is
// no next guest. The price, a process a start, is paid beside what a start does in any case (the copies of kernel
// and initrd, BlkBack, the emulator's process): docs/SERVICES.md has the figures.
package pciback

import (
	"context"
	"log/slog"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/services/protocol"
)

// Serve answers one call, whatever the answer is, and returns; it also returns when its control
// connection or ctx ends.
func Serve(ctx context.Context, _ *slog.Logger, control *ipc.Conn) error {
	var peer *rpc.Peer
	peer = rpc.New(control, func(_ context.Context, r *rpc.Request) (any, error) {
		defer peer.Drain() // the answer still goes out
		for _, f := range r.Files {
			f.Close()
		}
		if r.Method != protocol.MethodAssign {
			return nil, rpc.Errorf(rpc.Refused, "pciback: no call %q", r.Method)
		}
		var in topology.Request
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		t, err := topology.Assign(in)
		if err != nil {
			return nil, rpc.Errorf(rpc.Invalid, "%v", err)
		}
		return t, nil
	})
	return peer.Run(ctx)
}
