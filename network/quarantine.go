package network

import (
	"fmt"
	"net/netip"
	"slices"
)

// MaxRemediation bounds the remediation addresses.
const MaxRemediation = 16

// A Quarantine is where NICs go that are not to reach anything any more but what mends their guests. With
// the zero value a quarantined NIC is in no VLAN at all.
type Quarantine struct {
	// VLAN is the one of all quarantined NICs, which are isolated from each other, and of nobody else:
	// 1 to MaxVLAN. Uplinks lead out of it; 0: there is none.
	VLAN uint16 `json:"vlan,omitempty"`
	// Remediation are the only addresses that are reached from it; with none nothing is. Whose they are
	// is outside, behind an uplink. An IPv6 neighbour that asks from its link-local address is answered
	// only if that one is named here, too. What such a host passes on is its own affair: it should not route.
	Remediation []netip.Addr `json:"remediation,omitempty"`
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func (q Quarantine) check() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("network: quarantine: %s", fmt.Sprintf(format, a...))
	}
	switch {
	case q.VLAN > MaxVLAN:
		return bad("VLAN %d: use 1 to %d, or 0 for none", q.VLAN, MaxVLAN)
	case q.VLAN == 0 && len(q.Remediation) > 0:
		return bad("remediation addresses without a VLAN: say in which they are")
	case len(q.Remediation) > MaxRemediation:
		return bad("%d remediation addresses, at most %d", len(q.Remediation), MaxRemediation)
	}
	for i, a := range q.Remediation {
		switch {
		case !stationAddress(a) || a.IsLoopback() || a == broadcast4:
			return bad("remediation[%d]: %v is no station's address", i, a)
		case slices.Contains(q.Remediation[:i], a):
			return bad("remediation[%d]: %v is there twice", i, a)
		}
	}
	return nil
}

func stationAddress(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsMulticast() && !a.IsUnspecified()
}

// places are the VLANs that the NICs are in, by their ids; 0: none. Of quarantined NICs with one MAC, which
// their own VLANs keep apart but the quarantine's cannot, the one with the lowest id is in it, the others are cut off
// as long as it is: sharing would mean hearing each other.
func (c Config) places() map[int]uint16 {
	all, stations := map[int]uint16{}, map[MAC]int{}
	for _, n := range c.NICs {
		if !n.Quarantined {
			all[n.ID] = n.VLAN
			continue
		}
		if first, ok := stations[n.MAC]; !n.CutOff && (!ok || n.ID < first) {
			stations[n.MAC] = n.ID
		}
	}
	for _, n := range c.NICs {
		if n.Quarantined {
			all[n.ID] = 0
			if first, ok := stations[n.MAC]; ok && first == n.ID && !n.CutOff {
				all[n.ID] = c.Quarantine.VLAN
			}
		}
	}
	return all
}

// Chains that those of all quarantined NICs jump to, after they have looked at the source. What they do not
// let through is dropped.
const (
	heldARP  = "quarantine-arp"
	heldIPv4 = "quarantine-ipv4"
	heldIPv6 = "quarantine-ipv6"
)

// held is what a quarantined guest may say, of the source's side: the rest is the shared chains'. cutOff is for
// one that is in no VLAN.
func (n NIC) held(q Quarantine, cutOff bool) (c Chain) {
	c.Name = n.TapName()
	add := func(verdict, text string, m ...Match) { c.Rules = append(c.Rules, Rule{m, verdict, text}) }
	defer func() { add(drop, "everything else") }()
	if cutOff {
		return c
	}
	add(drop, "another station's address", at(Ethernet, 6, n.MAC[:]...).not())
	own4, own6 := families(n.Addresses)
	to4, to6 := families(q.Remediation)
	fixed := len(n.Addresses) > 0
	if len(to4) > 0 {
		arp := n.ownARP()
		ip := etherType(etherIPv4)
		if !fixed {
			add(heldARP, "ARP in its own name", arp...)
			add(heldIPv4, "IPv4", ip)
		}
		for _, a := range own4 {
			add(heldARP, "ARP for "+a.String(), append(slices.Clone(arp), at(Internet, 14, a.AsSlice()...))...)
			add(heldIPv4, a.String(), ip, at(Internet, 12, a.AsSlice()...))
		}
	}
	if len(to6) > 0 {
		ip := etherType(etherIPv6)
		if !fixed {
			add(heldIPv6, "IPv6", ip)
			return c
		}
		add(drop, "advertises another's address", foreignAdvert(own6)...)
		for _, a := range own6 {
			add(heldIPv6, a.String(), ip, at(Internet, 8, a.AsSlice()...))
		}
		add(heldIPv6, "link-local", ip, linkLocal(Internet, 8))
	}
	return c
}

// chains are the shared ones, for the families that there are addresses of.
func (q Quarantine) chains() (all []Chain) {
	v4, v6 := families(q.Remediation)
	if len(v4) > 0 {
		all = append(all, heldARPChain(v4), heldIPv4Chain(v4))
	}
	if len(v6) > 0 {
		all = append(all, heldIPv6Chain(v6))
	}
	return all
}

// group says that a frame is for several stations (IEEE 802 §8.2.2).
func group() Match { return Match{Header: Ethernet, Mask: []byte{1}, Value: []byte{1}} }

func heldARPChain(to []netip.Addr) Chain {
	c := Chain{Name: heldARP}
	add := func(verdict, text string, m ...Match) { c.Rules = append(c.Rules, Rule{m, verdict, text}) }
	add(drop, "neither request nor reply", at(Internet, 6, 0, 1).not(), at(Internet, 6, 0, 2).not())
	add(drop, "for some stations", group(), at(Ethernet, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff).not())
	add(drop, "a probe", at(Internet, 14, 0, 0, 0, 0)) // which would keep its owner from it (RFC 5227 §2.1.1)
	for _, a := range to {
		add(drop, "in the name of "+a.String(), at(Internet, 14, a.AsSlice()...))
	}
	for _, a := range to {
		add(accept, "about "+a.String(), at(Internet, 24, a.AsSlice()...))
	}
	add(drop, "about another")
	return c
}

func heldIPv4Chain(to []netip.Addr) Chain {
	c := Chain{Name: heldIPv4}
	add := func(verdict, text string, m ...Match) { c.Rules = append(c.Rules, Rule{m, verdict, text}) }
	add(drop, "for several stations", group())
	add(drop, "no address", at(Internet, 12, 0, 0, 0, 0))
	add(drop, "no guest is a DHCP server", protocol(protoUDP), port(0, dhcpServer))
	for _, a := range to {
		add(drop, "from "+a.String(), at(Internet, 12, a.AsSlice()...))
	}
	for _, a := range to {
		add(accept, "to "+a.String(), at(Internet, 16, a.AsSlice()...))
	}
	add(drop, "to another")
	return c
}

func heldIPv6Chain(to []netip.Addr) Chain {
	c := Chain{Name: heldIPv6}
	add := func(verdict, text string, m ...Match) { c.Rules = append(c.Rules, Rule{m, verdict, text}) }
	icmp := protocol(protoICMPv6)
	kind := func(t byte) Match { return at(Transport, 0, t) }
	add(drop, "no address", at(Internet, 8, make([]byte, 16)...))
	add(drop, "no guest is a router", icmp, kind(routerAdvert))
	add(drop, "no guest is a router", icmp, kind(redirect))
	add(drop, "no guest is a DHCP server", protocol(protoUDP), port(0, dhcp6Server))
	for _, a := range to {
		add(drop, "from "+a.String(), at(Internet, 8, a.AsSlice()...))
		add(drop, "advertises "+a.String(), icmp, kind(neighborAdvert), at(Transport, 8, a.AsSlice()...))
	}
	for _, a := range to { // by its solicited-node address (RFC 4291 §2.7.1) and that one's MAC (RFC 2464 §7)
		low := a.AsSlice()[13:]
		node := append([]byte{0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff}, low...)
		add(accept, "asks for "+a.String(), at(Ethernet, 0, append([]byte{0x33, 0x33, 0xff}, low...)...), at(Internet, 24, node...),
			icmp, kind(neighborSolicit), at(Transport, 8, a.AsSlice()...))
	}
	add(drop, "for several stations", group())
	for _, a := range to {
		add(accept, "to "+a.String(), at(Internet, 24, a.AsSlice()...))
	}
	add(drop, "to another")
	return c
}

// cut is the filter while ports move from one VLAN to another: nothing is let in from them and nothing passed on to
// them, so neither the rules of before nor those of after are in force in the wrong place.
func cut(chains []Chain, ports []string) []Chain {
	to := Chain{Name: "to", Hook: "forward"}
	var in []Rule
	for _, name := range ports {
		in = append(in, Rule{[]Match{iif(name)}, drop, "while it moves"})
		to.Rules = append(to.Rules, Rule{[]Match{at(OutInterface, 0, []byte(name)...)}, drop, "while it moves"})
	}
	to.Rules = append(to.Rules, Rule{Verdict: accept})
	all := append(slices.Clone(chains), to)
	for i := range all {
		if all[i].Name == hookedChain {
			all[i].Rules = append(in, all[i].Rules...)
		}
	}
	return all
}
