package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// Limits.
const (
	MaxVLAN      = 4094
	MaxID        = 9999999 // so that names stay within 15 bytes
	MaxAddresses = 16      // of one NIC
)

// A NIC is one network device of a guest.
type NIC struct {
	ID   int    `json:"id"`   // unique in the namespace, 0 to MaxID
	VLAN uint16 `json:"vlan"` // 1 to MaxVLAN
	MAC  MAC    `json:"mac"`
	// Addresses are the ones that the guest may send from. With any, every other one is dropped,
	// IPv6 link-local ones excepted; with none, all are let through.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// Quarantined puts it into the quarantine: its port is there and not in its VLAN, and its filter lets it
	// reach remediation addresses only. It goes before Unfiltered.
	Quarantined bool `json:"quarantined,omitempty"`
	// CutOff, of one that is Quarantined, puts it in no VLAN at all: it reaches nothing.
	CutOff bool `json:"cutOff,omitempty"`
	// Unfiltered turns the filter off, for comparison in tests.
	Unfiltered bool `json:"unfiltered,omitempty"`
}

// MAC is a station's address.
type MAC [6]byte

// TapName is the interface of the NIC.
func (n NIC) TapName() string { return "rt" + strconv.Itoa(n.ID) }

// An Uplink is an interface of the namespace that leads outside; see [Plug].
type Uplink struct {
	ID   int    `json:"id"`   // 0 to MaxID
	VLAN uint16 `json:"vlan"` // the only one, untagged; 0: a trunk that carries all with tags
}

// LinkName is the interface of the uplink.
func (u Uplink) LinkName() string { return "rtup" + strconv.Itoa(u.ID) }

// A Config is what the network is for.
type Config struct {
	NICs       []NIC      `json:"nics"`
	Uplinks    []Uplink   `json:"uplinks"`
	Quarantine Quarantine `json:"quarantine,omitzero"`
}

// A Plan is the state that the namespace is to be in.
type Plan struct {
	Bridges []Bridge
	Links   []VLANLink // of trunks, where each VLAN has a bridge of its own
	Ports   []Port
	Chains  []Chain // of the one table of the filter
}

// A Bridge is one switch.
type Bridge struct {
	Name string
	VLAN uint16 // the only one; 0: the ports' VLANs are kept apart by filtering, or they are in none
}

// A VLANLink is the part of an uplink that has one tag.
type VLANLink struct {
	Name, Parent string
	VLAN         uint16
}

// A Port is an interface in a bridge.
type Port struct {
	Name, Bridge string
	VLAN         uint16   // untagged; 0: none
	Tagged       []uint16 // beside or instead of it; only in a filtering bridge
	// Station is the only address behind the port: frames for others are not flooded to it, and
	// nobody else takes its place. Zero: the bridge learns.
	Station MAC
	// Isolated ports reach none that is isolated, too (IFLA_BRPORT_ISOLATED).
	Isolated bool
}

const bridgeName = "rtbr"

// NewPlan makes the plan for c: with filtering one bridge for all VLANs, else one for each.
func NewPlan(c Config, filtering bool) (*Plan, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	p := &Plan{Chains: filter(c, filtering)}
	vlans, places := c.vlans(), c.places()
	if filtering {
		p.Bridges = []Bridge{{Name: bridgeName}}
	} else {
		for _, v := range vlans {
			p.Bridges = append(p.Bridges, Bridge{bridgeFor(v, false), v})
		}
		if slices.ContainsFunc(c.NICs, func(n NIC) bool { return places[n.ID] == 0 }) {
			p.Bridges = append(p.Bridges, Bridge{Name: bridgeFor(0, false)}) // nothing leads out of it
		}
	}
	for _, n := range c.NICs {
		v := places[n.ID]
		p.Ports = append(p.Ports, Port{Name: n.TapName(), Bridge: bridgeFor(v, filtering), VLAN: v, Station: n.MAC, Isolated: n.Quarantined})
	}
	for _, u := range c.Uplinks {
		switch {
		case u.VLAN != 0:
			p.Ports = append(p.Ports, Port{Name: u.LinkName(), Bridge: bridgeFor(u.VLAN, filtering), VLAN: u.VLAN})
		case filtering:
			p.Ports = append(p.Ports, Port{Name: u.LinkName(), Bridge: bridgeName, Tagged: vlans})
		default:
			for _, v := range vlans {
				l := VLANLink{u.part(v), u.LinkName(), v}
				p.Links = append(p.Links, l)
				p.Ports = append(p.Ports, Port{Name: l.Name, Bridge: bridgeFor(v, false), VLAN: v})
			}
		}
	}
	return p, nil
}

// part is the interface of one VLAN of a trunk.
func (u Uplink) part(vlan uint16) string { return fmt.Sprintf("rtv%d.%d", vlan, u.ID) }

func bridgeFor(vlan uint16, filtering bool) string {
	if filtering {
		return bridgeName
	}
	return bridgeName + strconv.Itoa(int(vlan))
}

// vlans are those in use, in order.
func (c Config) vlans() (all []uint16) {
	for _, v := range c.places() {
		if v != 0 {
			all = append(all, v)
		}
	}
	for _, u := range c.Uplinks {
		if u.VLAN != 0 {
			all = append(all, u.VLAN)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func (c Config) check() error {
	type station struct {
		mac  MAC
		vlan uint16
	}
	if err := c.Quarantine.check(); err != nil {
		return err
	}
	ids, stations := map[int]bool{}, map[station]bool{}
	for i, n := range c.NICs {
		bad := func(format string, a ...any) error {
			return fmt.Errorf("network: nics[%d]: %s", i, fmt.Sprintf(format, a...))
		}
		s := station{n.MAC, n.VLAN}
		switch {
		case n.ID < 0 || n.ID > MaxID || ids[n.ID]:
			return bad("id %d is taken or not within 0 to %d", n.ID, MaxID)
		case n.VLAN < 1 || n.VLAN > MaxVLAN:
			return bad("VLAN %d: use 1 to %d", n.VLAN, MaxVLAN)
		case n.CutOff && !n.Quarantined:
			return bad("cut off, but not quarantined")
		case n.VLAN == c.Quarantine.VLAN && !n.Quarantined:
			return bad("VLAN %d is the quarantine's: give the NIC another, or the quarantine", n.VLAN)
		case n.MAC[0]&1 != 0 || n.MAC == MAC{}:
			return bad("% x is no station's address", n.MAC)
		case stations[s]:
			return bad("% x is in VLAN %d already", n.MAC, n.VLAN)
		case len(n.Addresses) > MaxAddresses:
			return bad("%d addresses, at most %d", len(n.Addresses), MaxAddresses)
		}
		for _, a := range n.Addresses {
			if !stationAddress(a) {
				return bad("%v is no station's address", a)
			}
		}
		ids[n.ID], stations[s] = true, true
	}
	uplinks := map[int]bool{}
	for i, u := range c.Uplinks {
		if u.ID < 0 || u.ID > MaxID || uplinks[u.ID] || u.VLAN > MaxVLAN {
			return fmt.Errorf("network: uplinks[%d]: id %d is taken or VLAN %d is none", i, u.ID, u.VLAN)
		}
		uplinks[u.ID] = true
	}
	return nil
}
