package builder

import (
	"context"
	"errors"
	"fmt"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// An assignment is the making of a guest's PCI bus by a PCIBack of its own, beside the rest of the
// guest's first start. Its answer is the guest's for all its reboots.
//
// A PCIBack may die at any moment: another is asked, which answers the same. What a PCIBack says
// goes on to its own guest's emulator only, which builds it or refuses it; here it was parsed (package
// topology), no more.
type assignment struct {
	cancel   context.CancelFunc
	done     chan struct{} // closed when the topology or err is there
	topology topology.Topology
	err      error
}

// maxPCIBacks are asked for one guest: then it is no accident that they die.
const maxPCIBacks = 5

// pcibacks is how PCIBacks are started and how long one may take to answer, then to leave.
type pcibacks struct {
	start func(guest string) (*process.Process, error)
	limit time.Duration
}

// pcibacks start in their sandbox.
func (b *Builder) pcibacks() pcibacks {
	return pcibacks{limit: 10 * time.Second, start: func(guest string) (*process.Process, error) {
		return b.procs.Start(services.PCIBack, launch.Order{Whose: guest})
	}}
}

// assign begins to have a guest's bus assigned.
func (b *Builder) assign(g *guest, from pcibacks) *assignment {
	ctx, cancel := context.WithCancel(context.Background())
	a := &assignment{cancel: cancel, done: make(chan struct{})}
	machine, msix := topology.Native, true
	if g.emulator == spec.QEMU {
		machine, msix = topology.QEMU, haveKVM()
	}
	s := &g.build.Spec
	ask := topology.Guest(machine, len(s.Disks), len(s.NICs), msix)
	name := s.Name
	b.wg.Go(func() {
		defer cancel()
		var err error
		for range maxPCIBacks {
			err = b.askPCIBack(ctx, name, ask, from, func(t topology.Topology) {
				a.topology = t
				close(a.done)
			})
			if err == nil {
				return
			}
			if !errors.Is(err, errPCIBackDied) || ctx.Err() != nil {
				break
			}
			b.log.Warn("PCIBack is replaced", "guest", name, "err", err)
		}
		a.err = err
		close(a.done)
	})
	return a
}

// errPCIBackDied says that a PCIBack ended before it answered.
var errPCIBackDied = errors.New("PCIBack ended before it answered")

// askPCIBack asks a PCIBack of its own and gives its answer on at once; when it returns, the process is
// gone.
func (b *Builder) askPCIBack(ctx context.Context, guest string, ask topology.Request, from pcibacks, answered func(topology.Topology)) (err error) {
	p, err := from.start(guest)
	if err != nil {
		return fmt.Errorf("PCIBack: %w", err)
	}
	is := audit.NewInstance(services.PCIBack, p.PID())
	peer := rpc.New(p.Control, calls.Watched(b.journal, services.PCIBack, guest, func(_ context.Context, r *rpc.Request) (any, error) {
		ipc.CloseAll(r.Files)
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from PCIBack", r.Method)
	}))
	heard := make(chan struct{})
	go func() { // ends with the process
		defer close(heard)
		_ = peer.Run(context.Background())
	}()
	defer func() {
		// Once it has answered it leaves; it may not stay, either.
		stop, cancel := context.WithTimeout(context.Background(), from.limit)
		defer cancel()
		if err != nil {
			p.Kill()
		}
		select {
		case <-p.Done():
		case <-stop.Done():
			p.Kill()
			<-p.Done()
		}
		<-heard
		b.journal.Note(b.journal.Ended(is, p.Err(), []string{guest}))
	}()
	if err := b.journal.Record(b.journal.Started(is, "guest", guest), b.journal.Linked(guest, is)); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, from.limit)
	defer cancel()
	var t topology.Topology
	_, err = peer.Call(limited, protocol.MethodAssign, ask, &t)
	if err == nil {
		answered(t)
		return nil
	}
	if errors.Is(err, rpc.ErrGone) || limited.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", errPCIBackDied, err)
	}
	return err
}

// wait is the guest's bus, once it is assigned.
func (a *assignment) wait(ctx context.Context) (topology.Topology, error) {
	select {
	case <-a.done:
		return a.topology, a.err
	case <-ctx.Done():
		return topology.Topology{}, ctx.Err()
	}
}

// end gives up what is not assigned yet, with its guest.
func (a *assignment) end() {
	if a != nil {
		a.cancel()
		<-a.done
	}
}
