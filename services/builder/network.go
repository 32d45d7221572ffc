package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
)

// networking is the network of a tenant's guests: the namespace, which holds all that must outlive
// NetBack, and the one NetBack that serves all their NICs and is replaced when it dies. Nothing leads from
// one tenant's to another's: a VLAN's number means something within its tenant only.
//
// NetBack is started for the first guest with a NIC: a tenant without any has neither the process
// nor its capability. It then stays.
//
// No call to an emulator is made beneath the lock: an emulator faces its guest, and one that does not
// answer must not keep the others from their network.
type networking struct {
	*keeper.Keeper // its lock is over one attachment, too, and over what follows
	b              *Builder
	tenant         string
	uplinks        []network.HostLink // the tenant's

	ns      *network.Namespace // nil before it is needed
	plugged int                // uplinks that are in it
	guests  []*nics            // in the order of their building
	next    int                // where the search for a free id goes on
}

// Bounds.
const (
	// maxNICs of all a tenant's guests: what one message can say of them, and one process can have open.
	maxNICs = 64
	nicMTU  = 1500
	// drainLimit is how long requests may take to end in a back end that is replaced.
	drainLimit = 2 * time.Second
	// netbackLimit bounds a call to NetBack, which then is sick and replaced.
	netbackLimit = 10 * time.Second
	// tellLimit bounds what an emulator may take to take a new NetBack; its guest is failed then.
	tellLimit = 20 * time.Second
	// settleLimit is how long a reset waits for starts that are under way.
	settleLimit = 10 * time.Second
)

// newNetworking takes over the tenant's uplinks, if any.
func (b *Builder) newNetworking(ctx context.Context, tenant string) (*networking, error) {
	n := &networking{b: b, tenant: tenant}
	for _, u := range b.cfg.Uplinks {
		if cmp.Or(u.Tenant, services.DefaultTenant) == tenant {
			n.uplinks = append(n.uplinks, u)
		}
	}
	whose := tenant
	if tenant == services.DefaultTenant {
		whose = ""
	}
	n.Keeper = keeper.New(keeper.Options{
		Service: services.NetBack, About: tenant, Log: b.log, Journal: b.journal, Detail: []string{"tenant", tenant},
		Start: func() (keeper.Process, error) {
			return b.procs.Start(services.NetBack, launch.Order{Whose: whose, Network: n.ns, Memory: n.memory()})
		},
		Handler: n.handler,
		Ready:   n.ready,
		Record: func(i *keeper.Instance) (all []audit.Entry) {
			for _, s := range n.guests {
				all = append(all, b.gives(s.g, i.Name)...)
			}
			return all
		},
		Guests: n.names,
		Wanted: func() bool { return len(n.guests) > 0 }, // the next guest with a NIC has one started
		Lost: func(err error) {
			for _, s := range n.guests {
				if s.run != nil {
					s.run.fail(fmt.Sprintf("network: %v", err))
				}
			}
		},
		// The next process serves only when the last one is gone: the kernel's own data path ends
		// with its process.
		Overlap: true, Drain: drainLimit, Settle: n.settle, Every: b.cfg.Resets[services.NetBack],
	})
	n.Lock()
	err := n.inherit()
	if err == nil && (len(n.uplinks) > 0 || n.ns != nil) {
		err = n.open()
	}
	if err == nil && len(n.guests) > 0 {
		if err := n.Begin(ctx); err != nil { // the guests are failed by Lost
			b.log.Error("network", "tenant", tenant, "err", err)
		}
	}
	n.Unlock()
	if err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

// open makes the namespace and plugs the uplinks in. The lock is held.
func (n *networking) open() (err error) {
	if n.ns == nil {
		if n.ns, err = network.NewNamespace(); err != nil {
			return err
		}
		if err := n.b.kept.Put(networkEntry(n.tenant), "", n.ns.File()); err != nil {
			return err
		}
	}
	for n.plugged < len(n.uplinks) {
		u := n.uplinks[n.plugged]
		if err := network.Plug(n.ns, u.Name, u.Uplink()); err != nil {
			return err
		}
		n.plugged++
	}
	return nil
}

// closeNetworks ends all tenants' networks.
func (b *Builder) closeNetworks() {
	b.mu.Lock()
	all := maps.Clone(b.tenancies)
	b.mu.Unlock()
	var wg sync.WaitGroup
	for _, t := range all {
		wg.Go(t.network.close)
	}
	wg.Wait()
}

// close ends NetBack and gives the uplinks back. No guest has a NIC any more.
func (n *networking) close() {
	n.Close(stopGrace / 2)
	for _, u := range n.uplinks[:n.plugged] {
		if err := network.Unplug(n.ns, u.Name, u.Uplink()); err != nil {
			n.b.log.Error("network", "err", err)
		}
	}
	n.b.kept.Drop(networkEntry(n.tenant))
	if n.ns != nil {
		_ = n.ns.Close()
	}
}

// names are the guests that depend on NetBack.
func (n *networking) names() []string {
	var all []string
	for _, s := range n.guests {
		all = append(all, s.g.name())
	}
	return all
}

// settle waits, for a while, until no guest is being started: its emulator has the NICs' first
// connections and cannot be given others yet.
func (n *networking) settle() {
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	for {
		var wait chan struct{}
		n.Lock()
		for _, s := range n.guests {
			if s.settled != nil {
				wait = s.settled
			}
		}
		n.Unlock()
		if wait == nil {
			return
		}
		select {
		case <-wait:
		case <-limit.C:
			return
		}
	}
}

// memory is that of all guests with NICs: pages count as NetBack's where it is the first to write
// what a guest receives.
func (n *networking) memory() (sum uint64) {
	for _, s := range n.guests {
		sum += s.g.memory()
	}
	return sum
}

// ready has a new NetBack make the network what it is to be, and serve all guests.
func (n *networking) ready(_ context.Context, i *keeper.Instance) error {
	if err := n.tell(i); err != nil {
		return err
	}
	for _, s := range n.guests {
		if s.run == nil {
			s.stale = s.memory != nil
		} else if err := s.reattach(i); err != nil {
			return err
		}
	}
	return nil
}

// tell has a NetBack make the network what it is to be.
func (n *networking) tell(i *keeper.Instance) error {
	return n.call(i, protocol.MethodNetwork, n.config(nil))
}

func (n *networking) call(i *keeper.Instance, method string, in any, files ...*os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), netbackLimit)
	defer cancel()
	_, err := i.Peer.Call(ctx, method, in, nil, files...)
	return err
}

// config is the network of all guests, and of more NICs.
func (n *networking) config(more []network.NIC) network.Config {
	c := network.Config{NICs: slices.Clone(more), Quarantine: n.b.cfg.Quarantine}
	for _, s := range n.guests {
		c.NICs = append(c.NICs, s.restricted()...)
	}
	for _, u := range n.uplinks {
		c.Uplinks = append(c.Uplinks, u.Uplink())
	}
	return c
}

// handler takes a NetBack's notices. It waits for nothing: answers come behind them.
func (n *networking) handler(i *keeper.Instance) rpc.Handler {
	failed := make(chan protocol.NICFailed, maxNICs)
	n.b.wg.Go(func() {
		for {
			select {
			case f := <-failed:
				n.nicFailed(f)
			case <-i.Heard(): // no more come
				for len(failed) > 0 {
					n.nicFailed(<-failed)
				}
				return
			}
		}
	})
	return calls.Watched(n.b.journal, services.NetBack, "", func(_ context.Context, req *rpc.Request) (any, error) {
		if req.Method != protocol.NoticeNICFailed {
			return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from NetBack", req.Method)
		}
		var f protocol.NICFailed
		if err := req.Decode(&f); err != nil {
			return nil, err
		}
		select {
		case failed <- f:
		default: // more than there are NICs: it is mad
			i.Kill()
		}
		return nil, nil
	})
}

// nicFailed ends the guest whose NIC is no more.
func (n *networking) nicFailed(f protocol.NICFailed) {
	n.Lock()
	defer n.Unlock()
	for _, s := range n.guests {
		i := slices.IndexFunc(s.config, func(c network.NIC) bool { return c.ID == f.ID })
		if i >= 0 && s.run != nil && s.run.domain == f.Domain {
			s.run.fail(fmt.Sprintf("nics[%d]: %s", i, clip(f.Reason, 512)))
		}
	}
}

// doors is the directory, in the run directory, in which doors are made; it is root's alone.
const doors = "doors"

// door makes QEMU's way to the relay of one NIC, and the listener that it leads to.
func (b *Builder) door() (door, entrance *os.File, err error) {
	dir := filepath.Join(b.cfg.RunDir, doors)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, nil, err
	}
	l, door, err := vhostuser.Door(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("nics: %w", err)
	}
	entrance, err = l.File()
	if err = errors.Join(err, l.Close()); err != nil {
		door.Close()
		return nil, nil, fmt.Errorf("nics: %w", err)
	}
	return door, entrance, nil
}
