package builder

import (
	"context"
	"os"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/pci/topology"
	blkback "redoubt.dev/redoubt/services/blkback/kept"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
)

// Back ends that die while a guest is started: before one has taken a device the next is asked, and when the
// emulator finds one dead that had taken its device it asks for another connection. Once the guest runs it
// is the Builder that tells the emulator of the next back end.

// maxBackEnds bounds how often an emulator may ask.
const maxBackEnds = 32

// backEnd gives an emulator that is being started another connection of one of its devices.
func (b *Builder) backEnd(ctx context.Context, g *guest, r *run, req *rpc.Request) (any, error) {
	ipc.CloseAll(req.Files)
	var in protocol.BackEnd
	if err := req.Decode(&in); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.asked++
	n := r.asked
	r.mu.Unlock()
	if n > maxBackEnds {
		return nil, rpc.Errorf(rpc.Refused, "builder: an emulator asked for %d back ends", n)
	}
	var f *os.File
	var err error
	switch {
	case in.Kind == topology.Disk && g.storage != nil && in.Index >= 0 && in.Index < len(g.Disks):
		f, err = g.storage.Again(ctx, r.domain, in.Index)
	case in.Kind == topology.NIC && g.nics != nil && in.Index >= 0 && in.Index < len(g.nics.config):
		f, err = g.nics.again(r, in.Index)
	default:
		err = rpc.Errorf(rpc.Refused, "builder: the guest has no %s[%d]", in.Kind, in.Index)
	}
	if err != nil {
		return nil, err
	}
	return rpc.WithFiles{Value: struct{}{}, Files: []*os.File{f}}, nil
}

// again has the NetBack that there is serve a NIC of the emulator that is being started, or the next one.
func (s *nics) again(r *run, d int) (f *os.File, err error) {
	s.n.Lock()
	defer s.n.Unlock()
	if s.memory == nil || s.run != nil || s.domain != r.domain {
		return nil, blkback.ErrRuns
	}
	err = s.n.Serve(func(i *keeper.Instance) (err error) {
		f, err = s.connectOne(i, d)
		return err
	})
	return f, err
}
