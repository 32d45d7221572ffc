package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrUnsupported says that the host's kernel lacks what a plan needs.
var ErrUnsupported = errors.New("network: the kernel has no support")

const probeName = "rtprobe"

// maxDumps bounds how often a list is asked for that changes while the kernel gives it.
const maxDumps = 64

// whole is a list that did not change while it was given: a guest's tap may go at any moment.
func whole[T any](list func() (T, error)) (all T, err error) {
	for range maxDumps {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// VLANFiltering reports whether bridges of this kernel keep VLANs apart, by trying it in the
// calling thread's namespace, or by what [Apply] has made there before. A kernel that cannot refuses the setting, or takes it without a word.
func VLANFiltering() (_ bool, err error) {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return false, fmt.Errorf("network: %w", err)
	}
	for _, l := range links { // what another one found out
		if b, ok := l.(*netlink.Bridge); ok && b.Name != probeName {
			return b.VlanFiltering != nil && *b.VlanFiltering, nil
		}
	}
	on := true
	b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: probeName}, VlanFiltering: &on}
	err = netlink.LinkAdd(b)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("network: bridge: %w", err)
	}
	defer func() { err = errors.Join(err, netlink.LinkDel(b)) }()
	l, err := netlink.LinkByName(probeName)
	if err != nil {
		return false, err
	}
	made, ok := l.(*netlink.Bridge)
	return ok && made.VlanFiltering != nil && *made.VlanFiltering, nil
}

// Apply brings the calling thread's namespace, which must be Redoubt's own, into the state of the
// plan. Ports whose interface does not exist yet are left for a later call. The filter is in
// force before any port is. NICs whose ports move from one VLAN to another, into the quarantine or out of it are cut
// off meanwhile; where that fails, or the caller dies over it, they stay so until the next call.
func Apply(p *Plan) error {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	there := map[string]netlink.Link{}
	for _, l := range links {
		there[l.Attrs().Name] = l
	}
	moving, err := p.moving(there)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	chains := p.Chains
	if len(moving) > 0 {
		chains = cut(chains, moving)
	}
	if err := setFilter(chains); err != nil {
		return fmt.Errorf("network: filter: %w", err)
	}
	if err := p.settle(there); err != nil {
		return err
	}
	if len(moving) > 0 {
		if err := setFilter(p.Chains); err != nil {
			return fmt.Errorf("network: filter: %w", err)
		}
	}
	for name, l := range there { // bridges of VLANs that nobody is in any more
		if l.Type() == "bridge" && !slices.ContainsFunc(p.Bridges, func(b Bridge) bool { return b.Name == name }) {
			if err := netlink.LinkDel(l); err != nil {
				return fmt.Errorf("network: %s: %w", name, err)
			}
		}
	}
	return nil
}

// settle makes what is missing of bridges and trunks' parts, and brings all ports to their places.
func (p *Plan) settle(there map[string]netlink.Link) (err error) {
	for _, b := range p.Bridges {
		if there[b.Name], err = ensureBridge(there[b.Name], b); err != nil {
			return fmt.Errorf("network: %s: %w", b.Name, err)
		}
	}
	for _, l := range p.Links {
		if there[l.Parent] == nil || there[l.Name] != nil {
			continue
		}
		if there[l.Name], err = addVLANLink(there[l.Parent], l); err != nil {
			return fmt.Errorf("network: %s: %w", l.Name, err)
		}
	}
	for _, o := range p.Ports {
		if l := there[o.Name]; l != nil {
			if err := ensurePort(l, there[o.Bridge], o, p.filtering()); err != nil {
				return fmt.Errorf("network: %s: %w", o.Name, err)
			}
		}
	}
	return nil
}

// moving are the guests' ports that leave another place for theirs, and isolated ones that are not there yet. A new
// one that is not isolated has nothing to leave: it finds its filter in force.
func (p *Plan) moving(there map[string]netlink.Link) (names []string, err error) {
	var vlans map[int32][]*nl.BridgeVlanInfo
	if p.filtering() {
		if vlans, err = whole(netlink.BridgeVlanList); err != nil {
			return nil, err
		}
	}
	for _, o := range p.Ports {
		l, b := there[o.Name], there[o.Bridge]
		if l == nil || o.Station == (MAC{}) || l.Attrs().MasterIndex == 0 && !o.Isolated {
			continue
		}
		right := b != nil && l.Attrs().MasterIndex == b.Attrs().Index && (!p.filtering() || o.untagged(vlans[int32(l.Attrs().Index)]))
		if right && o.Isolated {
			info, err := whole(func() (netlink.Protinfo, error) { return netlink.LinkGetProtinfo(l) })
			if err != nil {
				return nil, fmt.Errorf("%s: %w", o.Name, err)
			}
			right = info.Isolated
		}
		if !right {
			names = append(names, o.Name)
		}
	}
	return names, nil
}

// untagged reports whether a port's VLANs are its untagged one and no other.
func (o Port) untagged(has []*nl.BridgeVlanInfo) bool {
	if o.VLAN == 0 || len(has) != 1 {
		return o.VLAN == 0 && len(has) == 0
	}
	return has[0].Vid == o.VLAN && has[0].PortVID() && has[0].EngressUntag()
}

func (b Bridge) filters() bool { return b.Name == bridgeName }

func (p *Plan) filtering() bool { return len(p.Bridges) > 0 && p.Bridges[0].filters() }

// ensureBridge makes the bridge or goes on with it. It has no address, so the host is no station
// of the guests' network.
func ensureBridge(l netlink.Link, b Bridge) (netlink.Link, error) {
	if l == nil {
		on, off, none := true, false, uint16(0)
		n := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: b.Name}, MulticastSnooping: &off}
		if b.filters() {
			n.VlanFiltering, n.VlanDefaultPVID = &on, &none
		}
		if err := netlink.LinkAdd(n); err != nil {
			return nil, err
		}
		var err error
		if l, err = netlink.LinkByName(b.Name); err != nil {
			return nil, err
		}
	}
	made, ok := l.(*netlink.Bridge)
	if !ok {
		return nil, fmt.Errorf("is a %s, not a bridge", l.Type())
	}
	if b.filters() && (made.VlanFiltering == nil || !*made.VlanFiltering) {
		return nil, fmt.Errorf("%w: VLAN filtering", ErrUnsupported)
	}
	return l, up(l)
}

// up brings an interface up without an IPv6 address of its own.
func up(l netlink.Link) error {
	if l.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := netlink.LinkSetIP6AddrGenMode(l, nl.IN6_ADDR_GEN_MODE_NONE); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return err
	}
	return netlink.LinkSetUp(l)
}

func addVLANLink(parent netlink.Link, v VLANLink) (netlink.Link, error) {
	n := &netlink.Vlan{LinkAttrs: netlink.LinkAttrs{Name: v.Name, ParentIndex: parent.Attrs().Index}, VlanId: int(v.VLAN)}
	err := netlink.LinkAdd(n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("%w: 802.1Q links", ErrUnsupported)
	}
	if err == nil {
		err = up(parent)
	}
	return n, err
}

func ensurePort(l, bridge netlink.Link, o Port, filtering bool) error {
	if l.Attrs().MasterIndex != bridge.Attrs().Index {
		if err := netlink.LinkSetMaster(l, bridge); err != nil {
			return err
		}
	}
	if o.Isolated { // before it is in the VLAN of those it is isolated from
		if err := netlink.LinkSetIsolated(l, true); err != nil {
			return fmt.Errorf("isolation: %w", err)
		}
	}
	if filtering {
		if err := setVLANs(l, o); err != nil {
			return fmt.Errorf("VLANs: %w", err)
		}
	}
	if o.Station != (MAC{}) {
		if err := errors.Join(netlink.LinkSetLearning(l, false), netlink.LinkSetFlood(l, false)); err != nil {
			return fmt.Errorf("port: %w", err)
		}
		if o.VLAN != 0 {
			if err := netlink.NeighSet(o.station(l, o.vid(filtering))); err != nil {
				return fmt.Errorf("station: %w", err)
			}
		}
		if !o.Isolated { // once it has left them
			if err := netlink.LinkSetIsolated(l, false); err != nil {
				return fmt.Errorf("isolation: %w", err)
			}
		}
	}
	return up(l)
}

// station is the entry that says for good where the guest's address is. Sticky: no frame from elsewhere moves it.
func (o Port) station(l netlink.Link, vid uint16) *netlink.Neigh {
	return &netlink.Neigh{
		LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP,
		Flags: netlink.NTF_MASTER | netlink.NTF_STICKY, HardwareAddr: o.Station[:], Vlan: int(vid),
	}
}

// vid is the VLAN of the port's entries, which only a bridge that filters keeps apart.
func (o Port) vid(filtering bool) uint16 {
	if filtering {
		return o.VLAN
	}
	return 0
}

// setVLANs gives the port its VLANs and takes others away, each with the station's entry in it: the kernel keeps
// entries that were made for good, and takes none out of a VLAN that the port has left.
func setVLANs(l netlink.Link, o Port) error {
	all, err := whole(netlink.BridgeVlanList)
	if err != nil {
		return err
	}
	want := append([]uint16(nil), o.Tagged...)
	if o.VLAN != 0 {
		want = append(want, o.VLAN)
	}
	for _, v := range all[int32(l.Attrs().Index)] {
		if !slices.Contains(want, v.Vid) {
			if o.Station != (MAC{}) {
				if err := netlink.NeighDel(o.station(l, v.Vid)); err != nil && !errors.Is(err, unix.ENOENT) {
					return err
				}
			}
			if err := netlink.BridgeVlanDel(l, v.Vid, false, false, false, true); err != nil {
				return err
			}
		}
	}
	for _, v := range want {
		untagged := v == o.VLAN
		if err := netlink.BridgeVlanAdd(l, v, untagged, untagged, false, true); err != nil {
			return err
		}
	}
	return nil
}

// Plug moves an interface of the calling thread's namespace into n and gives it the uplink's name;
// with the next [Apply] of a plan that has the uplink it leads outside. One that is there already stays;
// one that has the uplink's name only is of who died over this.
func Plug(n *Namespace, name string, u Uplink) error {
	if n.Do(func() error { _, err := netlink.LinkByName(u.LinkName()); return err }) == nil {
		return nil
	}
	l, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		var renamed error
		if l, renamed = netlink.LinkByName(u.LinkName()); renamed == nil {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("network: uplink %s: %w", name, err)
	}
	if err := netlink.LinkSetDown(l); err != nil {
		return fmt.Errorf("network: uplink %s: %w", name, err)
	}
	if err := netlink.LinkSetName(l, u.LinkName()); err != nil {
		return fmt.Errorf("network: uplink %s: %w", name, err)
	}
	if err := netlink.LinkSetNsFd(l, int(n.f.Fd())); err != nil {
		return fmt.Errorf("network: uplink %s: %w", name, errors.Join(err, netlink.LinkSetName(l, name)))
	}
	return nil
}

// Unplug gives an interface that [Plug] moved into n back to the calling thread's namespace, by its
// own name. It is down there and without addresses.
func Unplug(n *Namespace, name string, u Uplink) error {
	to, err := os.Open(threadNamespace)
	if err != nil {
		return err
	}
	defer to.Close()
	return n.Do(func() error {
		l, err := netlink.LinkByName(u.LinkName())
		if err == nil {
			err = netlink.LinkSetDown(l)
		}
		if err == nil && l.Attrs().MasterIndex != 0 {
			err = netlink.LinkSetNoMaster(l)
		}
		if err == nil {
			err = netlink.LinkSetName(l, name)
		}
		if err == nil {
			err = netlink.LinkSetNsFd(l, int(to.Fd()))
		}
		if err != nil {
			return fmt.Errorf("network: uplink %s: %w", name, err)
		}
		return nil
	})
}
