// Package pciback is the PCIBack service: it says what a guest's PCI bus looks like, which device has
// which slot, window for its registers and interrupt routes (package topology), and leaves. It has no
// descriptor but its control connection, and knows of its guest what its one call says: how many
// devices of which kind, and what they need.
//
// One process assigns one guest's bus, once, and ends with its answer: a reboot of the guest keeps it, since
// a bus is assigned to a guest and not to an emulator. What asks derives from a tenant's spec, so a
// process that were kept for the next guest would be shared by tenants, and would need a clock to know when
// there is no next one; the price, a process a start, is paid beside what a start does in any case (the
// copies of kernel and initrd, BlkBack, the emulator's process).
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
