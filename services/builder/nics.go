package builder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/tree"
)

// nics are a guest's network devices, from its building to its end. networking's lock is over its
// fields.
type nics struct {
	n      *networking
	g      *guest
	config []network.NIC
	tuns   []*os.File // keep the taps; see network.OpenTun

	memory  *os.File      // of the emulator that has them or is being started; nil without one
	domain  tree.Domain   // its domain
	settled chan struct{} // closed when its start is over; nil without one under way
	run     *run          // once it runs
	stale   bool          // NetBack was replaced before the run could be told
	offered *offer        // what the emulator is to be told next
	telling bool          // a goroutine does
}

// add makes the network devices of a guest that is being built; nil for one that has none.
func (n *networking) add(g *guest) (_ *nics, err error) {
	if len(g.Build.Spec.NICs) == 0 {
		return nil, nil
	}
	n.Lock()
	defer n.Unlock()
	if n.Ending() {
		return nil, rpc.Errorf(rpc.Unavailable, "Redoubt is going down")
	}
	if err := n.open(); err != nil {
		return nil, rpc.Errorf(rpc.Unavailable, "nics: %v", err)
	}
	s := &nics{n: n, g: g}
	if s.config, err = n.choose(g); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ipc.CloseAll(s.tuns)
		}
	}()
	err = n.ns.Do(func() error {
		for range s.config {
			f, err := network.OpenTun()
			if err != nil {
				return rpc.Errorf(rpc.Unavailable, "nics: %v", err)
			}
			s.tuns = append(s.tuns, f)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := kept.KeepNICs(n.b.kept, g.Build.UUID, s.config, s.tuns); err != nil {
		return nil, err
	}
	n.guests = append(n.guests, s)
	defer func() {
		if err != nil {
			s.leave()
		}
	}()
	had := n.Now()
	err = n.Serve(func(i *keeper.Instance) error {
		if i != had { // it was told with its start
			return nil
		}
		if err := n.b.journal.Record(n.b.gives(g, i.Name)...); err != nil {
			return err
		}
		if p, ok := i.Process.(*process.Process); ok {
			if err := n.b.procs.GrowMemory(p, n.limit()); err != nil {
				return rpc.Errorf(rpc.Unavailable, "%v", err)
			}
		}
		return n.tell(i)
	})
	if err != nil {
		return nil, fmt.Errorf("nics: %w", err)
	}
	return s, nil
}

// limit is NetBack's limit of memory for the guests it serves.
func (n *networking) limit() uint64 {
	s, err := services.Find(services.NetBack)
	if err != nil {
		panic(err)
	}
	return s.Memory + n.memory()
}

// choose settles what a guest's NICs are. The lock is held.
func (n *networking) choose(g *guest) ([]network.NIC, error) {
	type station struct {
		mac  network.MAC
		vlan uint16
	}
	ids, stations := map[int]bool{}, map[station]bool{}
	for _, c := range n.config(nil).NICs {
		ids[c.ID], stations[station{c.MAC, c.VLAN}] = true, true
	}
	if len(ids)+len(g.Build.Spec.NICs) > maxNICs {
		return nil, rpc.Errorf(rpc.Unavailable, "nics: the tenant's guests together have %d already: the most is %d", len(ids), maxNICs)
	}
	var all []network.NIC
	for i, want := range g.Build.Spec.NICs {
		c, err := configure(want, g.Build.UUID, i)
		if err != nil {
			return nil, rpc.Errorf(rpc.Invalid, "nics[%d]: %v", i, err)
		}
		at := station{c.MAC, c.VLAN}
		if stations[at] {
			return nil, rpc.Errorf(rpc.Exists, "nics[%d].mac: %s is in VLAN %d already: give it another", i, net.HardwareAddr(c.MAC[:]), c.VLAN)
		}
		for ids[n.next] {
			n.next++
		}
		c.ID = n.next
		if n.next++; n.next > network.MaxID {
			n.next = 0
		}
		ids[c.ID], stations[at] = true, true
		all = append(all, c)
	}
	if _, err := network.NewPlan(n.config(all), true); err != nil { // the same whatever the kernel can
		return nil, rpc.Errorf(rpc.Invalid, "nics: %v", err)
	}
	return all, nil
}

// configure is a NIC of a spec that was checked.
func configure(want spec.NIC, uuid string, index int) (network.NIC, error) {
	mac := spec.DefaultMAC(uuid, index)
	if want.MAC != "" {
		var err error
		if mac, err = net.ParseMAC(want.MAC); err != nil {
			return network.NIC{}, err
		}
	}
	c := network.NIC{VLAN: uint16(want.VLAN), MAC: network.MAC(mac)}
	for _, a := range want.Addresses {
		ip, err := netip.ParseAddr(a)
		if err != nil {
			return c, err
		}
		c.Addresses = append(c.Addresses, ip)
	}
	return c, nil
}

// restricted are the guest's NICs as the ledger of responses has them now.
func (s *nics) restricted() []network.NIC {
	all := slices.Clone(s.config)
	r, _ := s.n.b.validations.Ledger.Get(s.g.Build.UUID)
	for i := range all {
		all[i].Quarantined, all[i].CutOff = r.Quarantined || r.DevicesDropped, r.DevicesDropped
	}
	return all
}

// restrict has NetBack make the network what the ledger says. A NetBack that is lost over it is followed by one that does.
func (s *nics) restrict() error {
	if s == nil {
		return nil
	}
	s.n.Lock()
	defer s.n.Unlock()
	return s.n.Serve(s.n.tell)
}

// attach gives a new emulator its NICs: what it needs for each is returned.
func (s *nics) attach(r *run, memory *os.File) (fronts []*os.File, err error) {
	if s == nil {
		return nil, nil
	}
	s.n.Lock()
	defer s.n.Unlock()
	own, err := ipc.Duplicate(memory)
	if err != nil {
		return nil, fmt.Errorf("nics: %w", err)
	}
	s.release()
	s.memory, s.domain, s.settled = own[0], r.domain, make(chan struct{})
	err = s.n.Serve(func(i *keeper.Instance) (err error) {
		fronts, err = s.connect(i)
		return err
	})
	s.stale = false
	if err != nil {
		s.release()
	}
	return fronts, err
}

// connect has NetBack serve the NICs and returns the front ends' ends. The lock is held.
func (s *nics) connect(p *keeper.Instance) (fronts []*os.File, err error) {
	defer func() {
		if err != nil {
			ipc.CloseAll(fronts)
			fronts = nil
		}
	}()
	for i := range s.config {
		f, err := s.connectOne(p, i)
		if err != nil {
			return fronts, fmt.Errorf("nics[%d]: %w", i, err)
		}
		fronts = append(fronts, f)
	}
	return fronts, nil
}

func (s *nics) connectOne(p *keeper.Instance, i int) (*os.File, error) {
	back, front, err := ipc.Streams("nic")
	if err != nil {
		return nil, err
	}
	defer back.Close()
	in := protocol.AttachNIC{
		ID: s.config[i].ID, MTU: nicMTU, Domain: s.domain,
		Files: protocol.Files{protocol.FileTun, protocol.FileMemory, protocol.FileNetwork},
	}
	files := []*os.File{s.tuns[i], s.memory, back}
	// Each process needs one of its own: the kernel ties it to the memory of who uses it.
	vhost, err := network.OpenVhost()
	switch {
	case err == nil:
		defer vhost.Close()
		in.Files, files = append(in.Files, protocol.FileVhostNet), append(files, vhost)
	case !errors.Is(err, network.ErrUnsupported):
		front.Close()
		return nil, rpc.Errorf(rpc.Unavailable, "%v", err)
	}
	if err := s.n.call(p, protocol.MethodAttachNIC, in, files...); err != nil {
		front.Close()
		return nil, err
	}
	return front, nil
}

// setRun tells that the emulator which attach was for runs.
func (s *nics) setRun(r *run) {
	if s == nil {
		return
	}
	s.n.Lock()
	defer s.n.Unlock()
	s.settle()
	s.run = r
	_ = s.n.Serve(func(i *keeper.Instance) error { // where there is none, the next one is brought to all
		if !s.stale {
			return nil
		}
		return s.reattach(i)
	})
}

// reattach connects a new NetBack with the running emulator, which is told in a goroutine. A NetBack
// that refuses is this guest's end only. The lock is held.
func (s *nics) reattach(p *keeper.Instance) error {
	r, start := s.run, time.Now()
	fronts, err := s.connect(p)
	if errors.Is(err, rpc.ErrGone) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	s.stale = false
	if err != nil {
		r.fail(fmt.Sprintf("network: %v", err))
		return nil
	}
	if s.offered != nil { // the emulator is slow: it need not hear of what is gone already
		ipc.CloseAll(s.offered.fronts)
	}
	s.offered = &offer{p, r, fronts, start}
	if !s.telling {
		s.telling = true
		s.n.b.wg.Go(s.tell)
	}
	return nil
}

// An offer is a NetBack that an emulator is to be told of.
type offer struct {
	from   *keeper.Instance
	to     *run
	fronts []*os.File
	made   time.Time
}

// tell tells the emulator of each NetBack, in order, until it knows the last.
func (s *nics) tell() {
	for {
		s.n.Lock()
		o := s.offered
		s.offered = nil
		s.telling = o != nil
		s.n.Unlock()
		if o == nil {
			return
		}
		err := tellNICs(o.to, o.fronts)
		ipc.CloseAll(o.fronts)
		if err != nil {
			s.untold(o, err)
			continue
		}
		s.n.b.event(s.g, protocol.Event{Kind: protocol.EventNetwork, Text: fmt.Sprintf("NetBack was replaced in %v", time.Since(o.made).Round(10*time.Microsecond))})
	}
}

func tellNICs(r *run, fronts []*os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), tellLimit)
	defer cancel()
	for i, f := range fronts {
		_, err := r.peer.Call(ctx, protocol.MethodNIC, protocol.NIC{Index: i, Files: protocol.Files{protocol.FileNetwork}}, nil, f)
		if err != nil {
			return fmt.Errorf("nics[%d]: %w", i, err)
		}
	}
	return nil
}

// untold follows an emulator's failure to take a NetBack. One that does not answer is at fault, as a
// connection to a NetBack that is gone ends at once. For another failure the reason may be that
// NetBack is gone, or about to be; else it serves the others, and the fault is this guest's.
func (s *nics) untold(o *offer, err error) {
	if !errors.Is(err, context.DeadlineExceeded) {
		dying := time.NewTimer(tellLimit / 4)
		defer dying.Stop()
		select {
		case <-o.from.Done():
			return
		case <-o.to.proc.Done():
			return
		case <-dying.C:
		}
	}
	o.to.fail(fmt.Sprintf("network: the emulator takes no other NetBack: %v", err))
}

// settle ends the time in which a start is under way. The lock is held.
func (s *nics) settle() {
	if s.settled != nil {
		close(s.settled)
		s.settled = nil
	}
}

// detach tells that the emulator has ended, or does not start.
func (s *nics) detach() {
	if s == nil {
		return
	}
	s.n.Lock()
	defer s.n.Unlock()
	s.release()
}

func (s *nics) release() {
	s.settle()
	s.run, s.stale = nil, false
	if s.offered != nil {
		ipc.CloseAll(s.offered.fronts)
		s.offered = nil
	}
	if s.memory != nil {
		s.memory.Close()
		s.memory = nil
	}
}

// close ends the NICs with their guest.
func (s *nics) close() {
	if s == nil {
		return
	}
	s.n.Lock()
	defer s.n.Unlock()
	s.release()
	ipc.CloseAll(s.tuns)
	s.leave()
}

// leave takes the guest out of the network. The lock is held.
func (s *nics) leave() {
	n := s.n
	n.guests = slices.DeleteFunc(n.guests, func(o *nics) bool { return o == s })
	if i := n.Now(); i != nil { // one that is lost over it is followed in any case
		if err := n.tell(i); errors.Is(err, context.DeadlineExceeded) {
			i.Kill()
		} else if err != nil && !errors.Is(err, rpc.ErrGone) {
			n.b.log.Warn("network", "guest", s.g.name(), "err", err)
		}
	}
}
