package network

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
)

// A Chain is a list of rules; the first whose matches all hold decides. Packets that no rule
// of a hooked chain decides are dropped.
type Chain struct {
	Name  string
	Hook  string // "prerouting", "forward", "input", "output"; "" for a chain that is jumped to
	Rules []Rule
}

// A Rule decides on frames.
type Rule struct {
	Matches []Match
	Verdict string // "accept", "drop" or a chain to jump to
	Text    string // why, for readers
}

// A Match holds when the bytes at Offset of a header, masked, are Value (or, with Not, are there
// and are something else). On the pseudo headers Interface, OutInterface and Protocol it compares the name of
// the port that a frame came in by, that of the one it goes out by, and the transport protocol behind all extension headers.
type Match struct {
	Header      Header
	Offset      uint32
	Mask, Value []byte
	Not         bool
}

// A Header is what an offset counts from.
type Header int

// The headers.
const (
	Ethernet Header = iota
	Internet
	Transport // of the first fragment only
	Interface
	Protocol
	OutInterface // in forward only
)

func (h Header) String() string {
	return [...]string{"ethernet", "network", "transport", "iifname", "l4proto", "oifname"}[h]
}

func (m Match) String() string {
	op := "=="
	if m.Not {
		op = "!="
	}
	switch {
	case m.Header == Interface || m.Header == OutInterface:
		return fmt.Sprintf("%v %s %q", m.Header, op, m.Value)
	case m.Header == Protocol:
		return fmt.Sprintf("l4proto %s %d", op, m.Value[0])
	case m.Mask != nil:
		return fmt.Sprintf("%v+%d & %x %s %x", m.Header, m.Offset, m.Mask, op, m.Value)
	}
	return fmt.Sprintf("%v+%d %s %x", m.Header, m.Offset, op, m.Value)
}

func (r Rule) String() string {
	var b strings.Builder
	for _, m := range r.Matches {
		b.WriteString(m.String())
		b.WriteByte(' ')
	}
	b.WriteString(r.Verdict)
	if r.Text != "" {
		b.WriteString(" # " + r.Text)
	}
	return b.String()
}

// Verdicts.
const (
	accept = "accept"
	drop   = "drop"
)

// Numbers of protocols.
const (
	protoUDP, protoICMPv6 = 17, 58

	dhcpServer, dhcpClient = 67, 68
	dhcp6Server            = 547

	routerSolicit, routerAdvert, neighborSolicit, neighborAdvert, redirect = 133, 134, 135, 136, 137

	listenerReport, listenerDone, listenerReport2 = 131, 132, 143
)

var (
	etherARP  = []byte{0x08, 0x06}
	etherIPv4 = []byte{0x08, 0x00}
	etherIPv6 = []byte{0x86, 0xdd}
)

func at(h Header, offset uint32, value ...byte) Match {
	return Match{Header: h, Offset: offset, Value: value}
}

func (m Match) not() Match { m.Not = true; return m }

func etherType(t []byte) Match { return at(Ethernet, 12, t...) }
func protocol(p byte) Match    { return at(Protocol, 0, p) }

func port(offset uint32, p uint16) Match {
	return at(Transport, offset, binary.BigEndian.AppendUint16(nil, p)...)
}

func iif(name string) Match { return at(Interface, 0, []byte(name)...) }

// linkLocal is fe80::/10.
func linkLocal(h Header, offset uint32) Match {
	return Match{Header: h, Offset: offset, Mask: []byte{0xff, 0xc0}, Value: []byte{0xfe, 0x80}}
}

// hookedChain is the one in prerouting.
const hookedChain = "from"

// filter makes the chains. Only prerouting decides what passes: the host itself has no part in
// the guests' network, and so sends and takes nothing.
func filter(c Config, filtering bool) []Chain {
	from := Chain{Name: hookedChain, Hook: "prerouting"}
	places := c.places()
	var chains, shared []Chain
	for _, n := range c.NICs {
		verdict := n.TapName()
		switch {
		case n.Quarantined:
			cutOff := places[n.ID] == 0
			chains = append(chains, n.held(c.Quarantine, cutOff))
			if !cutOff {
				shared = c.Quarantine.chains()
			}
		case n.Unfiltered:
			verdict = accept
		default:
			chains = append(chains, n.chain())
		}
		from.Rules = append(from.Rules, Rule{Matches: []Match{iif(n.TapName())}, Verdict: verdict})
	}
	for _, u := range c.Uplinks {
		names := []string{u.LinkName()}
		if u.VLAN == 0 && !filtering {
			names = nil
			for _, v := range c.vlans() {
				names = append(names, u.part(v))
			}
		}
		for _, name := range names {
			from.Rules = append(from.Rules, Rule{Matches: []Match{iif(name)}, Verdict: accept})
		}
	}
	chains = append(chains, shared...)
	return append(chains, from, Chain{Name: "host-in", Hook: "input"}, Chain{Name: "host-out", Hook: "output"})
}

// chain is what a guest may say, by the header fields of Ethernet II, ARP (RFC 826), IPv4 (RFC
// 791) and IPv6 (RFC 8200). A frame with a VLAN tag is of no type that is let through.
func (n NIC) chain() Chain {
	c := Chain{Name: n.TapName()}
	add := func(verdict, text string, m ...Match) { c.Rules = append(c.Rules, Rule{m, verdict, text}) }

	add(drop, "another station's address", at(Ethernet, 6, n.MAC[:]...).not())
	add(drop, "bridges' own protocols", Match{
		Header: Ethernet, Mask: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xf0},
		Value: []byte{0x01, 0x80, 0xc2, 0, 0, 0},
	})
	v4, v6 := families(n.Addresses)
	fixed := len(n.Addresses) > 0
	n.arp(add, v4, fixed)
	ipv4(add, v4, fixed)
	ipv6(add, v6, fixed)
	add(drop, "everything else")
	return c
}

// families parts addresses by IPv4 and IPv6.
func families(all []netip.Addr) (v4, v6 []netip.Addr) {
	for _, a := range all {
		if a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	return v4, v6
}

// ownARP is ARP for IPv4 over Ethernet from the NIC's own station.
func (n NIC) ownARP() []Match {
	return []Match{etherType(etherARP), at(Internet, 0, 0, 1, 8, 0, 6, 4), at(Internet, 8, n.MAC[:]...)}
}

// foreignAdvert is a neighbour advertisement of an address that is neither link-local nor one of these.
func foreignAdvert(own []netip.Addr) []Match {
	all := []Match{etherType(etherIPv6), protocol(protoICMPv6), at(Transport, 0, neighborAdvert), linkLocal(Transport, 8).not()}
	for _, a := range own {
		all = append(all, at(Transport, 8, a.AsSlice()...).not())
	}
	return all
}

func (n NIC) arp(add func(string, string, ...Match), own []netip.Addr, fixed bool) {
	arp := n.ownARP()
	with := func(more ...Match) []Match { return append(append([]Match(nil), arp...), more...) }
	if !fixed {
		add(accept, "ARP in its own name", arp...)
		return
	}
	for _, a := range own {
		add(accept, "ARP for "+a.String(), with(at(Internet, 14, a.AsSlice()...))...)
	}
	add(accept, "ARP probe", with(at(Internet, 14, 0, 0, 0, 0))...)
}

func ipv4(add func(string, string, ...Match), own []netip.Addr, fixed bool) {
	ip := etherType(etherIPv4)
	udp := protocol(protoUDP)
	add(drop, "no guest is a DHCP server", ip, udp, port(0, dhcpServer))
	if !fixed {
		add(accept, "IPv4", ip)
		return
	}
	for _, a := range own {
		add(accept, a.String(), ip, at(Internet, 12, a.AsSlice()...))
	}
	add(accept, "DHCP", ip, at(Internet, 12, 0, 0, 0, 0), udp, port(0, dhcpClient), port(2, dhcpServer))
}

func ipv6(add func(string, string, ...Match), own []netip.Addr, fixed bool) {
	ip := etherType(etherIPv6)
	icmp := protocol(protoICMPv6)
	kind := func(t byte) Match { return at(Transport, 0, t) }
	add(drop, "no guest is a router", ip, icmp, kind(routerAdvert))
	add(drop, "no guest is a router", ip, icmp, kind(redirect))
	add(drop, "no guest is a DHCP server", ip, protocol(protoUDP), port(0, dhcp6Server))
	if !fixed {
		add(accept, "IPv6", ip)
		return
	}
	add(drop, "advertises another's address", foreignAdvert(own)...)
	for _, a := range own {
		add(accept, a.String(), ip, at(Internet, 8, a.AsSlice()...))
	}
	add(accept, "link-local", ip, linkLocal(Internet, 8))
	// Before it has an address (RFC 4862 §5.4.2, RFC 3590).
	for _, t := range []byte{neighborSolicit, routerSolicit, listenerReport2, listenerReport, listenerDone} {
		add(accept, "before it has an address", ip, at(Internet, 8, make([]byte, 16)...), icmp, kind(t))
	}
}

// String is the plan for readers.
func (p *Plan) String() string {
	var b bytes.Buffer
	for _, br := range p.Bridges {
		fmt.Fprintf(&b, "bridge %s vlan %d\n", br.Name, br.VLAN)
	}
	for _, l := range p.Links {
		fmt.Fprintf(&b, "link %s of %s vlan %d\n", l.Name, l.Parent, l.VLAN)
	}
	for _, o := range p.Ports {
		isolated := ""
		if o.Isolated {
			isolated = " isolated"
		}
		fmt.Fprintf(&b, "port %s of %s vlan %d tagged %v station %x%s\n", o.Name, o.Bridge, o.VLAN, o.Tagged, o.Station, isolated)
	}
	for _, c := range p.Chains {
		fmt.Fprintf(&b, "chain %s %s\n", c.Name, c.Hook)
		for _, r := range c.Rules {
			fmt.Fprintf(&b, "  %v\n", r)
		}
	}
	return b.String()
}
