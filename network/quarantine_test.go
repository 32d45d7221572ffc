package network

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Stations of the tests: the guest of macA is put into quarantine, macB is its neighbour, macG its gateway, macC is in
// another VLAN, macD in quarantine all the time, and macR, outside, has the remediation addresses ipB and ip6B.
var (
	macD, macG, macR = MAC{2, 0, 0, 0, 0, 0xd}, MAC{2, 0, 0, 0, 0, 0x10}, MAC{2, 0, 0, 0, 0, 0x12}
	ipD, ipN, ipFar  = netip.MustParseAddr("192.0.2.13"), netip.MustParseAddr("192.0.2.14"), netip.MustParseAddr("198.51.100.1")
	ip6N             = netip.MustParseAddr("2001:db8::e")
)

func quarantineConfig() Config {
	return Config{
		NICs: []NIC{
			{ID: 1, VLAN: 5, MAC: macA, Addresses: []netip.Addr{ipA, ip6A}},
			{ID: 2, VLAN: 5, MAC: macB},
			{ID: 3, VLAN: 6, MAC: macC},
			{ID: 4, VLAN: 7, MAC: macD, Addresses: []netip.Addr{ipD}, Quarantined: true},
			{ID: 5, VLAN: 5, MAC: macG},
			{ID: 6, VLAN: 6, MAC: macG},
		},
		Uplinks:    []Uplink{{VLAN: 66}},
		Quarantine: Quarantine{VLAN: 66, Remediation: []netip.Addr{ipB, ip6B}},
	}
}

// Who hears a frame.
const (
	nobody    = ""
	neighbour = "neighbour"
	oldVLAN   = "neighbour gateway"
	another   = "another" // guest in quarantine
	beyond    = "outside" // at the uplink of the quarantine's VLAN
)

// asks is a neighbour solicitation.
func asks(src MAC, from, target netip.Addr) []byte {
	t := target.As16()
	node := netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: t[13], 14: t[14], 15: t[15]})
	return ip6(MAC{0x33, 0x33, 0xff, t[13], t[14], t[15]}, src, from, node, 58, icmp6(135, target))
}

// What the guest of macA says, and who hears it: before, with fixed addresses; in quarantine, with them and without.
var quarantined = []struct {
	name                string
	frame               []byte
	before, fixed, free string
}{
	{"its neighbour, IPv4", ip4(macB, macA, ipA, ipN, 17, udp(1, 2)), neighbour, nobody, nobody},
	{"its neighbour, IPv6", ip6(macB, macA, ip6A, ip6N, 17, udp(1, 2)), neighbour, nobody, nobody},
	{"its neighbour, link-local", ip6(macB, macA, local6, local6, 17, udp(1, 2)), neighbour, nobody, nobody},
	{"its neighbour's MAC, remediation's IPv4", ip4(macB, macA, ipA, ipB, 17, udp(1, 2)), neighbour, beyond, beyond}, // not in its VLAN
	{"its gateway", ip4(macG, macA, ipA, ipFar, 17, udp(1, 2)), "gateway", nobody, nobody},
	{"another VLAN", ip4(macC, macA, ipA, ipB, 17, udp(1, 2)), nobody, beyond, beyond}, // to the uplink
	{"another in quarantine", ip4(macD, macA, ipA, ipD, 17, udp(1, 2)), nobody, nobody, nobody},
	{"its MAC, remediation's IPv4", ip4(macD, macA, ipA, ipB, 17, udp(1, 2)), nobody, nobody, nobody},
	{"its MAC, remediation's IPv6", ip6(macD, macA, ip6A, ip6B, 17, udp(1, 2)), nobody, nobody, nobody},
	{"its MAC, ARP", arp(macD, macA, macA, ipA, ipB), nobody, nobody, nobody},
	{"broadcast", ip4(everybody, macA, ipA, broadcast4, 17, udp(1, 2)), oldVLAN, nobody, nobody},
	{"broadcast to remediation", ip4(everybody, macA, ipA, ipB, 17, udp(1, 2)), oldVLAN, nobody, nobody},
	{"multicast", ip4(MAC{1, 0, 0x5e, 0, 0, 1}, macA, ipA, netip.MustParseAddr("224.0.0.1"), 17, udp(1, 2)), oldVLAN, nobody, nobody},
	{"multicast to remediation, IPv6", ip6(MAC{0x33, 0x33, 0, 0, 0, 1}, macA, ip6A, ip6B, 17, udp(1, 2)), oldVLAN, nobody, nobody},
	{"DHCP", ip4(everybody, macA, zero4, broadcast4, 17, udp(68, 67)), oldVLAN, nobody, nobody},
	{"DHCPv6", ip6(MAC{0x33, 0x33, 0, 1, 0, 2}, macA, local6, netip.MustParseAddr("ff02::1:2"), 17, udp(546, 547)), oldVLAN, nobody, nobody},
	{"ARP for its neighbour", arp(everybody, macA, macA, ipA, ipN), oldVLAN, nobody, nobody},
	{"ARP for itself", arp(everybody, macA, macA, ipA, ipA), oldVLAN, nobody, nobody},
	{"solicits its neighbour", asks(macA, ip6A, ip6N), oldVLAN, nobody, nobody},
	{"detects duplicates", asks(macA, zero6, ip6A), oldVLAN, nobody, nobody},
	{"solicits a router", ip6(MAC{0x33, 0x33, 0, 0, 0, 2}, macA, local6, netip.MustParseAddr("ff02::2"), 58, icmp6(133, zero6)), oldVLAN, nobody, nobody},

	{"remediation, IPv4", ip4(macR, macA, ipA, ipB, 17, udp(1, 2)), nobody, beyond, beyond},
	{"remediation, IPv6", ip6(macR, macA, ip6A, ip6B, 17, udp(1, 2)), nobody, beyond, beyond},
	{"remediation, link-local", ip6(macR, macA, local6, ip6B, 17, udp(1, 2)), nobody, beyond, beyond},
	{"ARP for remediation", arp(everybody, macA, macA, ipA, ipB), oldVLAN, beyond, beyond},
	{"ARP to remediation", arp(macR, macA, macA, ipA, ipB), nobody, beyond, beyond},
	{"solicits remediation", asks(macA, ip6A, ip6B), oldVLAN, beyond, beyond},
	{"solicits remediation at its MAC", ip6(macR, macA, local6, ip6B, 58, icmp6(135, ip6B)), nobody, beyond, beyond},
	{"advertises itself", ip6(macR, macA, ip6A, ip6B, 58, icmp6(136, ip6A)), nobody, beyond, beyond},

	{"another's MAC", ip4(macR, macC, ipA, ipB, 17, udp(1, 2)), nobody, nobody, nobody},
	{"another's IPv4", ip4(macR, macA, ipN, ipB, 17, udp(1, 2)), nobody, nobody, beyond},
	{"another's IPv6", ip6(macR, macA, ip6N, ip6B, 17, udp(1, 2)), nobody, nobody, beyond},
	{"ARP for another's IPv4", arp(everybody, macA, macA, ipN, ipB), nobody, nobody, beyond},
	{"ARP for another's MAC", arp(everybody, macA, macC, ipA, ipB), nobody, nobody, nobody},
	{"advertises another", ip6(macR, macA, ip6A, ip6B, 58, icmp6(136, ip6N)), nobody, nobody, beyond},
	{"remediation's IPv4", ip4(macR, macA, ipB, ipB, 17, udp(1, 2)), nobody, nobody, nobody},
	{"remediation's IPv6", ip6(macR, macA, ip6B, ip6B, 17, udp(1, 2)), nobody, nobody, nobody},
	{"ARP for remediation's", arp(everybody, macA, macA, ipB, ipB), nobody, nobody, nobody},
	{"ARP probe", arp(everybody, macA, macA, zero4, ipB), oldVLAN, nobody, nobody},
	{"ARP to some", arp(MAC{1, 0, 0x5e, 0, 0, 1}, macA, macA, ipA, ipB), oldVLAN, nobody, nobody},
	{"no IPv4", ip4(macR, macA, zero4, ipB, 17, udp(1, 2)), nobody, nobody, nobody},
	{"no IPv6", asks(macA, zero6, ip6B), oldVLAN, nobody, nobody},
	{"advertises remediation's", ip6(macR, macA, ip6A, ip6B, 58, icmp6(136, ip6B)), nobody, nobody, nobody},
	{"the same behind options", ip6(macR, macA, ip6A, ip6B, 60, behind(icmp6(136, ip6B))), nobody, nobody, nobody},
	{"solicits others at remediation's group", ip6(MAC{0x33, 0x33, 0xff, 0, 0, 0xb}, macA, ip6A, netip.MustParseAddr("ff02::1:ff00:b"), 58, icmp6(135, ip6N)), oldVLAN, nobody, nobody},
	{"router", ip6(macR, macA, local6, ip6B, 58, icmp6(134, zero6)), nobody, nobody, nobody},
	{"redirect", ip6(macR, macA, local6, ip6B, 58, icmp6(137, ip6B)), nobody, nobody, nobody},
	{"DHCP server", ip4(macR, macA, ipA, ipB, 17, udp(67, 68)), nobody, nobody, nobody},
	{"DHCPv6 server", ip6(macR, macA, ip6A, ip6B, 17, udp(547, 546)), nobody, nobody, nobody},
	{"a VLAN tag", ether(macR, macA, 0x8100, []byte{0, 5, 8, 0}, make([]byte, 46)), nobody, nobody, nobody},
	{"another protocol", ether(macR, macA, 0x88b5, make([]byte, 46)), nobody, nobody, nobody},
	{"spanning tree", ether(MAC{1, 0x80, 0xc2, 0, 0, 0}, macA, 0x26, []byte{0x42, 0x42, 3}, make([]byte, 35)), nobody, nobody, nobody},
}

// Words that are heard in any case, after the frame that a test is about.
var (
	fromNeighbour = arp(everybody, macB, macB, ipN, ipN)
	fromGateway   = arp(everybody, macG, macG, ipFar, ipFar)
	fromAnother   = arp(everybody, macD, macD, ipD, ipB)
	toAnother     = arp(macD, macR, macR, ipB, ipD)
	toA           = arp(macA, macR, macR, ipB, ipA)
)

// A quarantineNet is the network of quarantineConfig.
type quarantineNet struct {
	*testNet
	c         Config
	filtering bool
	out       int // the socket outside
}

func newQuarantineNet(t *testing.T, c Config, filtering bool) *quarantineNet {
	n, out := plugged(t, c, filtering)
	t.Cleanup(func() { unix.Close(out) })
	return &quarantineNet{n, c, filtering, out}
}

// set puts the guest of macA into quarantine or takes it out.
func (q *quarantineNet) set(quarantined bool) {
	q.t.Helper()
	q.c.NICs[0].Quarantined = quarantined
	q.apply(q.c, q.filtering)
}

func (q *quarantineNet) fromOutside(frame []byte) {
	q.t.Helper()
	if _, err := unix.Write(q.out, frame); err != nil {
		q.t.Fatal(err)
	}
}

// untilOutside reads what is heard outside up to a marker, and counts want.
func (q *quarantineNet) untilOutside(marker, want []byte) (heard int) {
	q.t.Helper()
	buf := make([]byte, 1<<17)
	for {
		k, err := unix.Read(q.out, buf)
		if err != nil {
			q.t.Fatalf("outside: %v", err)
		}
		switch got := string(buf[:k]); got {
		case string(marker):
			return heard
		case string(want):
			heard++
		default:
			q.t.Fatalf("heard outside: % x", got)
		}
	}
}

// hears has the guest of macA say a frame and reports who hears it.
func (q *quarantineNet) hears(frame []byte) string {
	q.t.Helper()
	q.send(1, frame)
	q.send(5, fromGateway)
	q.send(2, fromNeighbour)
	q.send(6, fromGateway)
	q.send(4, fromAnother)
	q.fromOutside(toAnother)
	var who []string
	for _, l := range []struct {
		name   string
		id     int
		marker []byte
	}{{neighbour, 2, fromGateway}, {"gateway", 5, fromNeighbour}, {"other VLAN", 3, fromGateway}, {another, 4, toAnother}} {
		if q.until(l.id, l.marker, frame) {
			who = append(who, l.name)
		}
	}
	if q.untilOutside(fromAnother, frame) > 0 {
		who = append(who, beyond)
	}
	return strings.Join(who, " ")
}

// TestQuarantine says every frame before a guest is quarantined, in quarantine, and after it.
func TestQuarantine(t *testing.T) { bothKinds(t, quarantine) }

func quarantine(t *testing.T, filtering bool) {
	q := newQuarantineNet(t, quarantineConfig(), filtering)
	toOld := ip4(macA, macB, ipN, ipA, 17, udp(1, 2))
	for _, mode := range []string{"before", "fixed", "fixed, again", "free", "fixed", "after", "fixed"} {
		q.c.NICs[0].Addresses = []netip.Addr{ipA, ip6A}
		if mode == "free" {
			q.c.NICs[0].Addresses = nil
		}
		in := mode != "before" && mode != "after"
		q.set(in)
		for _, f := range quarantined {
			want := f.before
			if mode == "free" {
				want = f.free
			} else if in {
				want = f.fixed
			}
			if got := q.hears(f.frame); got != want {
				t.Errorf("%s: %s: heard by %q, want %q", mode, f.name, got, want)
			}
		}
		q.checkEntries(map[bool]uint16{false: 5, true: 66}[in])
		// What the guest itself hears: of its old VLAN, or from outside of the quarantine's.
		q.drain(1)
		q.send(2, toOld)
		q.fromOutside(toA)
		if in {
			q.until(1, toA, nil)
		} else {
			q.send(2, fromNeighbour)
			if !q.until(1, fromNeighbour, toOld) {
				t.Errorf("%s: its neighbour does not reach it", mode)
			}
			q.until(5, fromNeighbour, nil)
		}
	}
	q.checkUnharmed()
	// It is isolation that keeps the quarantined from each other.
	p, err := NewPlan(q.c, filtering)
	if err != nil {
		t.Fatal(err)
	}
	for i := range p.Ports {
		p.Ports[i].Isolated = false
	}
	q.do(func() error { return Apply(p) })
	if got := q.hears(ip4(macD, macA, ipA, ipB, 17, udp(1, 2))); got != another {
		t.Errorf("without isolation: heard by %q", got)
	}
	q.set(true)
	// A segment that nobody has cut passes as its pieces would.
	for _, c := range []struct {
		from  netip.Addr
		times int
	}{{ipA, 1}, {ipN, 0}} {
		if _, err := q.taps[1].File.Write(segment(c.from)); err != nil {
			t.Fatal(err)
		}
		q.send(4, fromAnother)
		if got := q.untilOutside(fromAnother, segment(c.from)[testHeader:]); got != c.times {
			t.Errorf("a segment of %v was heard %d times, want %d", c.from, got, c.times)
		}
	}
	// Two that are released reach each other.
	q.c.NICs[3].VLAN, q.c.NICs[3].Quarantined = 5, false
	q.set(false)
	word := ip4(macD, macA, ipA, ipD, 17, udp(1, 2))
	q.send(1, word)
	q.send(5, fromGateway)
	if !q.until(4, fromGateway, word) {
		t.Error("two that were released do not reach each other")
	}
}

// drain throws away what a guest has heard, and counts it.
func (q *quarantineNet) drain(id int) (frames int) {
	q.t.Helper()
	raw, err := q.taps[id].File.SyscallConn()
	if err != nil {
		q.t.Fatal(err)
	}
	buf := make([]byte, 4096)
	if cerr := raw.Control(func(fd uintptr) {
		for err == nil {
			if _, err = unix.Read(int(fd), buf); err == nil {
				frames++
			}
		}
	}); cerr != nil || !errors.Is(err, unix.EAGAIN) {
		q.t.Fatal(cerr, err)
	}
	return frames
}

// checkEntries holds the bridges' entries for macA against its only place.
func (q *quarantineNet) checkEntries(vlan uint16) {
	q.t.Helper()
	q.do(func() error {
		l, err := netlink.LinkByName("rt1")
		if err != nil {
			return err
		}
		all, err := whole(func() ([]netlink.Neigh, error) { return netlink.NeighList(l.Attrs().Index, unix.AF_BRIDGE) })
		if err != nil {
			return err
		}
		var at []int
		for _, e := range all {
			if string(e.HardwareAddr) == string(macA[:]) {
				at = append(at, e.Vlan)
			}
		}
		if want := []int{int(Port{VLAN: vlan}.vid(q.filtering))}; !slices.Equal(at, want) {
			q.t.Errorf("its address is in VLANs %v, want %v", at, want)
		}
		return nil
	})
}

// checkUnharmed: who is in quarantine loses nothing while the same plan is applied again and again.
func (q *quarantineNet) checkUnharmed() {
	q.t.Helper()
	p, err := NewPlan(q.c, q.filtering)
	if err != nil {
		q.t.Fatal(err)
	}
	const frames = 300
	said, applied := make(chan struct{}), make(chan error)
	go func() {
		for n := 0; ; n++ {
			if err := q.ns.Do(func() error { return Apply(p) }); err != nil {
				applied <- err
				return
			}
			select {
			case <-said:
				if n >= 3 {
					applied <- nil
					return
				}
			default:
			}
		}
	}()
	word, last := ip4(macR, macA, ipA, ipB, 17, udp(1, 2)), arp(macR, macA, macA, ipA, ipB)
	heard := 0
	for range frames { // one by one: the socket outside does not hold them all
		q.send(1, word)
		q.send(1, last)
		heard += q.untilOutside(last, word)
	}
	close(said)
	if err := <-applied; err != nil {
		q.t.Fatal(err)
	}
	if heard != frames {
		q.t.Errorf("%d frames of %d were heard while the plan was applied again", heard, frames)
	}
}
