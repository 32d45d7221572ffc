// Package asked is the Builder's side of PCIBack: it has a guest's PCI bus assigned, by a PCIBack of its own
// beside the rest of the guest's first start. The answer is the guest's for all its reboots.
//
// A PCIBack may die at any moment: another is asked, which answers the same. What a PCIBack says
// goes on to its own guest's emulator only, which builds it or refuses it; here it was parsed (package
// topology), no more.
package asked

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/job"
	"redoubt.dev/redoubt/services/protocol"
)

// An Asker asks PCIBacks, from New to Wait.
type Asker struct {
	Log     *slog.Logger
	Journal *audit.Journal
	Start   func(guest string) (*process.Process, error)
	Limit   time.Duration // how long one may take to answer, then to leave

	wg sync.WaitGroup
}

// Wait waits until all PCIBacks are gone.
func (a *Asker) Wait() { a.wg.Wait() }

// An Assignment is the making of a guest's PCI bus.
type Assignment struct {
	cancel   context.CancelFunc
	done     chan struct{} // closed when the topology or err is there
	topology topology.Topology
	err      error
}

// maxPCIBacks are asked for one guest: then it is no accident that they die.
const maxPCIBacks = 5

// Assign begins to have a guest's bus assigned.
func (a *Asker) Assign(guest string, ask topology.Request) *Assignment {
	ctx, cancel := context.WithCancel(context.Background())
	out := &Assignment{cancel: cancel, done: make(chan struct{})}
	a.wg.Go(func() {
		defer cancel()
		var err error
		for range maxPCIBacks {
			err = a.ask(ctx, guest, ask, func(t topology.Topology) {
				out.topology = t
				close(out.done)
			})
			if err == nil {
				return
			}
			if !errors.Is(err, errDied) || ctx.Err() != nil {
				break
			}
			a.Log.Warn("PCIBack is replaced", "guest", guest, "err", err)
		}
		out.err = err
		close(out.done)
	})
	return out
}

// Assigned is one that was made before.
func Assigned(t topology.Topology) *Assignment {
	a := &Assignment{cancel: func() {}, done: make(chan struct{}), topology: t}
	close(a.done)
	return a
}

// errDied says that a PCIBack ended before it answered.
var errDied = job.ErrDied

// ask asks a PCIBack of its own and gives its answer on at once; when it returns, the process is
// gone.
func (a *Asker) ask(ctx context.Context, guest string, ask topology.Request, answered func(topology.Topology)) error {
	r := job.Runner{Service: services.PCIBack, Journal: a.Journal, Start: a.Start, Limit: a.Limit}
	return r.Run(ctx, guest, func(ctx context.Context, peer *rpc.Peer) error {
		var t topology.Topology
		_, err := peer.Call(ctx, protocol.MethodAssign, ask, &t)
		if err == nil {
			answered(t)
		}
		return err
	})
}

// Wait is the guest's bus, once it is assigned.
func (a *Assignment) Wait(ctx context.Context) (topology.Topology, error) {
	select {
	case <-a.done:
		return a.topology, a.err
	case <-ctx.Done():
		return topology.Topology{}, ctx.Err()
	}
}

// End gives up what is not assigned yet, with its guest.
func (a *Assignment) End() {
	if a != nil {
		a.cancel()
		<-a.done
	}
}
