package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
)

// networking is the guests' network: the namespace, which holds all that must outlive NetBack, and
// the one NetBack that serves every guest's NICs and is replaced when it dies.
//
// NetBack is started for the first guest with a NIC: a host without any has neither the process
// nor its capability. It then stays.
//
// No call to an emulator is made beneath mu: an emulator faces its guest, and one that does not
// answer must not keep the others from their network.
type networking struct {
	b       *Builder
	uplinks []Uplink
	done    chan struct{} // closed with ending

	mu      sync.Mutex         // over one attachment or replacement, too
	ns      *network.Namespace // nil before it is needed
	plugged int                // uplinks that are in it
	now     *netback           // nil while there is none
	guests  []*nics            // in the order of their building
	next    int                // where the search for a free id goes on
	deaths  deaths
	ending  bool
}

// netback is one NetBack process.
type netback struct {
	proc *process.Process
	peer *rpc.Peer
	is   tenure
	// failed are the NICs of which it told that they are no more.
	failed chan protocol.NICFailed
}

// Bounds.
const (
	// maxNICs of all guests: what one message can say of them, and one process can have open.
	maxNICs = 64
	nicMTU  = 1500
	// netbackLimit bounds a call to NetBack, which then is sick and replaced.
	netbackLimit = 10 * time.Second
	// tellLimit bounds what an emulator may take to take a new NetBack; its guest is failed then.
	tellLimit = 20 * time.Second
	// settleLimit is how long a reset waits for starts that are under way.
	settleLimit = 10 * time.Second
)

// An Uplink is an interface of the host that is moved into the guests' network while Redoubt runs.
type Uplink struct {
	Name string // of the interface
	VLAN uint16 // the only one, untagged; 0: a trunk that carries all with tags
}

// maxUplinks bounds them.
const maxUplinks = 16

// ParseUplinks reads a list such as "eth1,eth2:10".
func ParseUplinks(text string) ([]Uplink, error) {
	var all []Uplink
	for item := range strings.SplitSeq(text, ",") {
		if item == "" {
			continue
		}
		name, vlan, tagged := strings.Cut(item, ":")
		u := Uplink{Name: name}
		if tagged {
			v, err := strconv.ParseUint(vlan, 10, 16)
			if err != nil || v < 1 || v > network.MaxVLAN {
				return nil, fmt.Errorf("%q: VLAN %q: use 1 to %d", item, vlan, network.MaxVLAN)
			}
			u.VLAN = uint16(v)
		}
		// dev_valid_name() of Linux; 15 bytes are IFNAMSIZ less its NUL.
		if name == "" || name == "." || name == ".." || len(name) > 15 || strings.ContainsAny(name, "/ \t\n\v\f\r") {
			return nil, fmt.Errorf("%q is not IFACE or IFACE:VLAN", item)
		}
		if slices.ContainsFunc(all, func(o Uplink) bool { return o.Name == name }) {
			return nil, fmt.Errorf("%s is there twice", name)
		}
		if all = append(all, u); len(all) > maxUplinks {
			return nil, fmt.Errorf("more than %d", maxUplinks)
		}
	}
	return all, nil
}

// newNetworking takes over the uplinks, if any.
func (b *Builder) newNetworking() (*networking, error) {
	n := &networking{b: b, uplinks: b.cfg.Uplinks, done: make(chan struct{})}
	if d := b.cfg.Resets[services.NetBack]; d > 0 {
		b.wg.Go(func() { every(d, n.done, func() { n.reset() }) })
	}
	if len(n.uplinks) == 0 {
		return n, nil
	}
	n.mu.Lock()
	err := n.open()
	n.mu.Unlock()
	if err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

// open makes the namespace and plugs the uplinks in. n.mu is held.
func (n *networking) open() (err error) {
	if n.ns != nil {
		return nil
	}
	if n.ns, err = network.NewNamespace(); err != nil {
		return err
	}
	for i, u := range n.uplinks {
		if err := network.Plug(n.ns, u.Name, network.Uplink{ID: i, VLAN: u.VLAN}); err != nil {
			return err
		}
		n.plugged++
	}
	return nil
}

// close ends NetBack and gives the uplinks back. No guest has a NIC any more.
func (n *networking) close() {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ending = true
	close(n.done)
	if p := n.now; p != nil {
		n.now = nil
		n.stop(p, stopGrace/2)
	}
	for i, u := range n.uplinks[:n.plugged] {
		if err := network.Unplug(n.ns, u.Name, network.Uplink{ID: i, VLAN: u.VLAN}); err != nil {
			n.b.log.Error("network", "err", err)
		}
	}
	if n.ns != nil {
		_ = n.ns.Close()
	}
}

// stop ends a NetBack in good order, within a limit.
func (n *networking) stop(p *netback, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := p.proc.Stop(ctx); err != nil {
		n.b.log.Warn("NetBack ended badly", "err", err)
	}
	n.b.journal.note(n.b.journal.ended(p.is, p.proc.Err(), n.names()))
}

// names are the guests that depend on NetBack.
func (n *networking) names() []string {
	var all []string
	for _, s := range n.guests {
		all = append(all, s.g.build.Spec.Name)
	}
	return all
}

// reset replaces a NetBack that runs well, for all guests. The next process is started before this
// one ends, and serves only when this one is gone: the kernel's own data path ends with its
// process. It reports whether it did.
func (n *networking) reset() bool {
	n.settle()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ending || n.now == nil {
		return false
	}
	next, err := n.spawn()
	if err != nil {
		n.b.log.Warn("NetBack is not replaced", "err", err)
		return false
	}
	last := n.now
	n.now = nil
	n.stop(last, drainLimit)
	_ = n.begin(next)
	return true
}

// settle waits, for a while, until no guest is being started: its emulator has the NICs' first
// connections and cannot be given others yet.
func (n *networking) settle() {
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	for {
		var wait chan struct{}
		n.mu.Lock()
		for _, s := range n.guests {
			if s.settled != nil {
				wait = s.settled
			}
		}
		n.mu.Unlock()
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

// spawn starts a NetBack that serves nothing yet. n.mu is held.
func (n *networking) spawn() (*netback, error) {
	p, err := n.b.procs.startIn(n.ns, services.NetBack, n.memory())
	if err != nil {
		return nil, err
	}
	next := &netback{proc: p, is: newTenure(services.NetBack, p), failed: make(chan protocol.NICFailed, maxNICs)}
	next.peer = rpc.New(p.Control, n.b.refusals(services.NetBack, "", next.heard))
	n.b.wg.Go(func() {
		defer close(next.failed)
		_ = next.peer.Run(context.Background())
	})
	n.b.wg.Go(func() {
		for f := range next.failed {
			n.nicFailed(f)
		}
	})
	n.b.wg.Go(func() {
		<-p.Done()
		next.peer.Close()
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.now == next {
			_ = n.replace(next)
		}
	})
	entries := []audit.Entry{n.b.journal.started(next.is)}
	for _, s := range n.guests {
		entries = append(entries, s.linked(next)...)
	}
	if err := n.b.journal.record(entries...); err != nil {
		p.Kill()
		<-p.Done()
		return nil, err
	}
	return next, nil
}

// memory is that of all guests with NICs: pages count as NetBack's where it is the first to write
// what a guest receives.
func (n *networking) memory() (sum uint64) {
	for _, s := range n.guests {
		sum += uint64(s.g.build.Spec.Memory)
	}
	return sum
}

// begin makes next the NetBack in force, or one after it if it dies, and has it serve all guests.
// n.mu is held; after an error there is none, and guests that run with NICs are failed.
func (n *networking) begin(next *netback) error {
	for {
		var err error
		if next == nil {
			if next, err = n.spawn(); err != nil {
				return n.fail(err)
			}
		}
		if err = n.tell(next); err == nil {
			n.now = next
			break
		}
		if !n.lost(next, err) {
			next.proc.Kill()
			<-next.proc.Done()
			n.b.journal.note(n.b.journal.ended(next.is, err, n.names()))
			return n.fail(err)
		}
		n.b.journal.note(n.b.journal.ended(next.is, next.proc.Err(), n.names()))
		if n.deaths.add(time.Now()) {
			return n.fail(fmt.Errorf("NetBack dies again and again: %w", err))
		}
		next = nil
	}
	for _, s := range n.guests {
		if s.run != nil {
			s.reattach()
		} else {
			s.stale = s.memory != nil
		}
	}
	return nil
}

// tell has a NetBack make the network what it is to be.
func (n *networking) tell(p *netback) error {
	return n.call(p, protocol.MethodNetwork, n.config(nil))
}

func (n *networking) call(p *netback, method string, in any, files ...*os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), netbackLimit)
	defer cancel()
	_, err := p.peer.Call(ctx, method, in, nil, files...)
	return err
}

// lost reports whether err, of a call to p, says that p is gone or sick; then it is ended. What p
// answers, it answers well.
func (n *networking) lost(p *netback, err error) bool {
	var answer *rpc.Error
	if err == nil || errors.As(err, &answer) {
		return false
	}
	p.proc.Kill()
	<-p.proc.Done()
	return true
}

// replace follows a NetBack's end. n.mu is held.
func (n *networking) replace(dead *netback) error {
	n.now = nil
	n.b.journal.note(n.b.journal.ended(dead.is, dead.proc.Err(), n.names()))
	reason := errors.New("NetBack ended without a word")
	if err := dead.proc.Err(); err != nil {
		reason = err
	}
	if n.ending || len(n.guests) == 0 {
		return reason // the next guest with a NIC has one started
	}
	n.b.log.Warn("NetBack is replaced", "err", reason)
	if n.deaths.add(time.Now()) {
		return n.fail(fmt.Errorf("NetBack dies again and again: %w", reason))
	}
	return n.begin(nil)
}

// fail ends all guests that run with NICs: there is no NetBack. n.mu is held.
func (n *networking) fail(err error) error {
	n.b.log.Error("network", "err", err)
	for _, s := range n.guests {
		if s.run != nil {
			s.run.fail(fmt.Sprintf("network: %v", err))
		}
	}
	return err
}

// serve has f make its calls to NetBack, and if that is lost meanwhile, to the next one. n.mu is
// held.
func (n *networking) serve(f func(*netback) error) error {
	for {
		if n.now == nil {
			if err := n.begin(nil); err != nil {
				return err
			}
		}
		p := n.now
		err := f(p)
		if !n.lost(p, err) {
			return err
		}
		if err := n.replace(p); err != nil {
			return err
		}
	}
}

// config is the network of all guests, and of more NICs.
func (n *networking) config(more []network.NIC) network.Config {
	c := network.Config{NICs: slices.Clone(more)}
	for _, s := range n.guests {
		c.NICs = append(c.NICs, s.config...)
	}
	for i, u := range n.uplinks {
		c.Uplinks = append(c.Uplinks, network.Uplink{ID: i, VLAN: u.VLAN})
	}
	return c
}

// heard takes NetBack's notices. It waits for nothing: answers come behind them.
func (p *netback) heard(_ context.Context, req *rpc.Request) (any, error) {
	if req.Method != protocol.NoticeNICFailed {
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from NetBack", req.Method)
	}
	var f protocol.NICFailed
	if err := req.Decode(&f); err != nil {
		return nil, err
	}
	select {
	case p.failed <- f:
	default: // more than there are NICs: it is mad
		p.proc.Kill()
	}
	return nil, nil
}

// nicFailed ends the guest whose NIC is no more.
func (n *networking) nicFailed(f protocol.NICFailed) {
	n.mu.Lock()
	defer n.mu.Unlock()
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
