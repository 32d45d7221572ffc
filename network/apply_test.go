package network

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
)

// A testNet is a namespace with a plan's taps.
type testNet struct {
	t    testing.TB
	ns   *Namespace
	taps map[int]*Tap
}

func newTestNet(t testing.TB) *testNet {
	t.Helper()
	ns, err := NewNamespace()
	if errors.Is(err, unix.EPERM) {
		t.Skipf("needs root, as `make test` is run by: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	n := &testNet{t, ns, map[int]*Tap{}}
	t.Cleanup(func() {
		for _, p := range n.taps {
			p.File.Close()
		}
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *testNet) do(f func() error) {
	n.t.Helper()
	if err := n.ns.Do(f); err != nil {
		n.t.Fatal(err)
	}
}

// apply makes the taps that are missing and applies the plan.
func (n *testNet) apply(c Config, filtering bool) {
	n.t.Helper()
	p, err := NewPlan(c, filtering)
	if err != nil {
		n.t.Fatal(err)
	}
	n.do(func() error {
		for _, nic := range c.NICs {
			if n.taps[nic.ID] != nil {
				continue
			}
			tun, err := OpenTun()
			if err != nil {
				return err
			}
			tap, err := NewTap(tun, nic.TapName())
			if err != nil {
				return err
			}
			n.taps[nic.ID] = tap
			if err := tap.Configure(0, testHeader); err != nil {
				return err
			}
		}
		return Apply(p)
	})
}

const testHeader = 12

// send makes the guest of a NIC say a frame.
func (n *testNet) send(id int, frame []byte) {
	n.t.Helper()
	if _, err := n.taps[id].File.Write(append(make([]byte, testHeader), frame...)); err != nil {
		n.t.Fatal(err)
	}
}

// until reads what the guest of a NIC hears up to a marker, and reports whether want was there.
func (n *testNet) until(id int, marker, want []byte) (heard bool) {
	n.t.Helper()
	f := n.taps[id].File
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		n.t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for {
		k, err := f.Read(buf)
		if err != nil {
			n.t.Fatalf("nic %d: %v", id, err)
		}
		switch got := string(buf[testHeader:k]); got {
		case string(marker):
			return heard
		case string(want):
			heard = true
		default:
			n.t.Fatalf("nic %d heard % x", id, got)
		}
	}
}

var (
	macA, macB, macC = MAC{2, 0, 0, 0, 0, 0xa}, MAC{2, 0, 0, 0, 0, 0xb}, MAC{2, 0, 0, 0, 0, 0xc}
	ipA, ipB         = netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("192.0.2.11")
	ip6A, ip6B       = netip.MustParseAddr("2001:db8::a"), netip.MustParseAddr("2001:db8::b")
	everybody        = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	zero4, zero6     = netip.IPv4Unspecified(), netip.IPv6Unspecified()
	local6           = netip.MustParseAddr("fe80::a")
)

func ether(dst, src MAC, kind uint16, payload ...[]byte) []byte {
	b := append(append(dst[:6:6], src[:]...), byte(kind>>8), byte(kind))
	for _, p := range payload {
		b = append(b, p...)
	}
	return b
}

func arp(dst, src, sender MAC, spa, tpa netip.Addr) []byte {
	return ether(dst, src, 0x806, []byte{0, 1, 8, 0, 6, 4, 0, 1}, sender[:], spa.AsSlice(), make([]byte, 6), tpa.AsSlice())
}

func ip4(dst, src MAC, from, to netip.Addr, proto byte, payload []byte) []byte {
	h := []byte{0x45, 0, 0, byte(20 + len(payload)), 0, 0, 0, 0, 64, proto, 0, 0}
	h = append(append(h, from.AsSlice()...), to.AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(h); i += 2 {
		sum += uint32(h[i])<<8 | uint32(h[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
	return ether(dst, src, 0x800, h, payload)
}

func ip6(dst, src MAC, from, to netip.Addr, proto byte, payload []byte) []byte {
	h := []byte{0x60, 0, 0, 0, 0, byte(len(payload)), proto, 255}
	return ether(dst, src, 0x86dd, h, from.AsSlice(), to.AsSlice(), payload)
}

func udp(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
	return append(b, 0, 12, 0, 0, 1, 2, 3, 4)
}

func icmp6(kind byte, target netip.Addr) []byte {
	return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
}

// behind puts a header of options that do nothing before an ICMPv6 message.
func behind(message []byte) []byte { return append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, message...) }

// frames that the guest of macA says.
var frames = []struct {
	name  string
	frame []byte
	// passes the filter of a NIC with fixed addresses, of one without
	fixed, free bool
}{
	{"its own IPv4", ip4(macB, macA, ipA, ipB, 17, udp(1000, 2000)), true, true},
	{"another's IPv4", ip4(macB, macA, ipB, ipA, 17, udp(1000, 2000)), false, true},
	{"another's MAC", ip4(macB, macC, ipA, ipB, 17, udp(1000, 2000)), false, false},
	{"DHCP request", ip4(everybody, macA, zero4, netip.AddrFrom4([4]byte{255, 255, 255, 255}), 17, udp(68, 67)), true, true},
	{"no address, not DHCP", ip4(everybody, macA, zero4, ipB, 17, udp(1000, 2000)), false, true},
	{"DHCP answer", ip4(macB, macA, ipA, ipB, 17, udp(67, 68)), false, false},
	{"ARP", arp(everybody, macA, macA, ipA, ipB), true, true},
	{"ARP probe", arp(everybody, macA, macA, zero4, ipA), true, true},
	{"ARP for another's IPv4", arp(everybody, macA, macA, ipB, ipA), false, true},
	{"ARP for another's MAC", arp(everybody, macA, macC, ipA, ipB), false, false},
	{"ARP from another's MAC", arp(everybody, macC, macA, ipA, ipB), false, false},
	{"its own IPv6", ip6(macB, macA, ip6A, ip6B, 17, udp(1000, 2000)), true, true},
	{"another's IPv6", ip6(macB, macA, ip6B, ip6A, 17, udp(1000, 2000)), false, true},
	{"link-local", ip6(macB, macA, local6, ip6B, 17, udp(1000, 2000)), true, true},
	{"duplicate address detection", ip6(macB, macA, zero6, ip6B, 58, icmp6(135, ip6A)), true, true},
	{"router solicitation", ip6(macB, macA, zero6, ip6B, 58, icmp6(133, zero6)), true, true},
	{"multicast report", ip6(macB, macA, zero6, ip6B, 0, behind(icmp6(143, zero6))), true, true},
	{"no address, not discovery", ip6(macB, macA, zero6, ip6B, 17, udp(1000, 2000)), false, true},
	{"neighbour advertisement", ip6(macB, macA, ip6A, ip6B, 58, icmp6(136, ip6A)), true, true},
	{"neighbour advertisement, link-local", ip6(macB, macA, local6, ip6B, 58, icmp6(136, local6)), true, true},
	{"neighbour advertisement of another's", ip6(macB, macA, ip6A, ip6B, 58, icmp6(136, ip6B)), false, true},
	{"the same behind options", ip6(macB, macA, ip6A, ip6B, 60, behind(icmp6(136, ip6B))), false, true},
	{"router advertisement", ip6(macB, macA, local6, ip6B, 58, icmp6(134, zero6)), false, false},
	{"the same behind options", ip6(macB, macA, local6, ip6B, 60, behind(icmp6(134, zero6))), false, false},
	{"redirect", ip6(macB, macA, local6, ip6B, 58, icmp6(137, ip6B)), false, false},
	{"DHCPv6 answer", ip6(macB, macA, local6, ip6B, 17, udp(547, 546)), false, false},
	{"DHCPv6 request", ip6(macB, macA, local6, ip6B, 17, udp(546, 547)), true, true},
	{"a VLAN tag", ether(macB, macA, 0x8100, []byte{0, 5, 8, 0}, make([]byte, 46)), false, false},
	{"a service tag", ether(macB, macA, 0x88a8, []byte{0, 5, 8, 0}, make([]byte, 46)), false, false},
	{"another protocol", ether(macB, macA, 0x88b5, make([]byte, 46)), false, false},
	{"spanning tree", ether(MAC{1, 0x80, 0xc2, 0, 0, 0}, macA, 0x26, []byte{0x42, 0x42, 3}, make([]byte, 35)), false, false},
}

// TestSpoofing says every frame through three filters: with fixed addresses, without, and off.
// With the filter off all arrive, so it is the filter that stops them.
func TestSpoofing(t *testing.T) { bothKinds(t, spoofing) }

func spoofing(t *testing.T, filtering bool) {
	n := newTestNet(t)
	marker := arp(everybody, macA, macA, ipA, ipA)
	for _, mode := range []string{"fixed", "free", "off", "fixed"} {
		a, b := NIC{ID: 1, VLAN: 5, MAC: macA}, NIC{ID: 2, VLAN: 5, MAC: macB}
		switch mode {
		case "fixed":
			a.Addresses = []netip.Addr{ipA, ip6A}
		case "off":
			a.Unfiltered = true
		}
		n.apply(Config{NICs: []NIC{a, b}}, filtering)
		for _, f := range frames {
			want := map[string]bool{"fixed": f.fixed, "free": f.free, "off": true}[mode]
			if mode == "off" && filtering && f.name == "a VLAN tag" {
				continue // the bridge itself may let it pass or not
			}
			n.send(1, f.frame)
			n.send(1, marker)
			if got := n.until(2, marker, f.frame); got != want {
				t.Errorf("%s: %s: arrived %v, want %v", mode, f.name, got, want)
			}
		}
	}
}

// TestVLANs: nothing of one VLAN is heard in another, nor unicast of others in one's own.
func TestVLANs(t *testing.T) { bothKinds(t, vlans) }

func vlans(t *testing.T, filtering bool) {
	n := newTestNet(t)
	macD := MAC{2, 0, 0, 0, 0, 0xd}
	c := Config{NICs: []NIC{{ID: 1, VLAN: 5, MAC: macA}, {ID: 2, VLAN: 5, MAC: macB}, {ID: 3, VLAN: 6, MAC: macC}, {ID: 4, VLAN: 6, MAC: macD}}}
	n.apply(c, filtering)
	five, six := arp(everybody, macA, macA, ipA, ipA), arp(everybody, macD, macD, ipB, ipB)
	other := ip4(macC, macA, ipA, ipB, 17, udp(1, 2))       // an address of the other VLAN
	nobody := ip4(MAC{2, 9}, macA, ipA, ipB, 17, udp(1, 2)) // an address that nobody has
	for range 2 {
		n.send(1, other)
		n.send(1, nobody)
		n.send(1, five)
		n.send(4, six)
		n.until(2, five, nil)
		n.until(3, six, nil)
		n.apply(c, filtering) // again: nothing changes
	}
	// The same address in two VLANs.
	c.NICs = append(c.NICs, NIC{ID: 5, VLAN: 6, MAC: macA})
	n.apply(c, filtering)
	from5 := arp(everybody, macA, macA, ipB, ipA)
	n.send(5, from5)
	n.until(3, from5, nil)
	n.until(4, from5, nil)
	n.send(1, five)
	n.until(2, five, nil)
	// A NIC that changes its VLAN.
	c.NICs[2].VLAN = 5
	n.apply(c, filtering)
	n.send(1, five)
	n.send(1, other)
	n.send(1, other)
	n.until(3, other, five)
	// One that is taken out of the plan says nothing any more.
	c.NICs = append(c.NICs[:3:3], c.NICs[4])
	n.apply(c, filtering)
	n.send(4, six)
	n.send(5, from5)
	n.send(1, five)
	n.until(3, five, other)
}

// TestTap: a descriptor whose tap is made is taken up again; another one is refused.
func TestTap(t *testing.T) {
	n := newTestNet(t)
	n.do(func() error {
		open := func() *os.File {
			f, err := OpenTun()
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
		copyOf := func(f *os.File) *os.File {
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			return os.NewFile(uintptr(fd), "tun")
		}
		f := open()
		for range 2 {
			tap, err := NewTap(copyOf(f), "rt7")
			if err != nil {
				t.Fatal(err)
			}
			tap.File.Close()
			if _, err := netlink.LinkByName("rt7"); err != nil {
				t.Errorf("the tap does not outlive its service: %v", err)
			}
		}
		if _, err := NewTap(copyOf(f), "rt8"); err == nil {
			t.Error("a tap was taken for another")
		}
		if _, err := NewTap(open(), "rt7"); err == nil {
			t.Error("a tap was made twice")
		}
		if _, err := NewTap(os.NewFile(uintptr(unix.Stdin+1<<20), "none"), "rt9"); err == nil {
			t.Error("a closed descriptor was taken")
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			return err
		}
		if _, err := NewTap(null, "rt9"); err == nil {
			t.Error("/dev/null was taken for a tap")
		}
		f.Close()
		if _, err := netlink.LinkByName("rt7"); err == nil {
			t.Error("the tap outlives its last descriptor")
		}
		return nil
	})
}

// TestUplink: a veth of the host's leads outside by one VLAN.
func TestUplink(t *testing.T) { bothKinds(t, uplink) }

func uplink(t *testing.T, filtering bool) {
	u := Uplink{ID: 0, VLAN: 5}
	c := Config{NICs: []NIC{{ID: 1, VLAN: 5, MAC: macA}, {ID: 2, VLAN: 6, MAC: macB}}, Uplinks: []Uplink{u}}
	n, outside := plugged(t, c, filtering)
	defer unix.Close(outside)
	out, in := arp(everybody, macA, macA, ipA, ipB), arp(macA, macC, macC, ipB, ipA)
	n.send(2, arp(everybody, macB, macB, ipB, ipB)) // another VLAN's: not heard outside
	n.send(1, out)
	buf := make([]byte, 2048)
	k, err := unix.Read(outside, buf)
	if err != nil || string(buf[:k]) != string(out) {
		t.Errorf("heard outside: % x, %v", buf[:max(k, 0)], err)
	}
	if _, err := unix.Write(outside, in); err != nil {
		t.Fatal(err)
	}
	n.until(1, in, nil)
}

// plugged is a network with one uplink, and a socket at the uplink's other end.
func plugged(t *testing.T, c Config, filtering bool) (n *testNet, outside int) {
	t.Helper()
	return pluggedTo(t, newTestNet(t), c, filtering)
}

// pluggedTo has the other end, out0, in host.
func pluggedTo(t *testing.T, host *testNet, c Config, filtering bool) (n *testNet, outside int) {
	t.Helper()
	n = newTestNet(t)
	u := c.Uplinks[0]
	host.do(func() error {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "out0"}, PeerName: "out1"}
		if err := netlink.LinkAdd(v); err != nil {
			return err
		}
		l, err := netlink.LinkByName("out0")
		if err != nil {
			return err
		}
		// No word of the host's own.
		if err := errors.Join(netlink.LinkSetIP6AddrGenMode(l, nl.IN6_ADDR_GEN_MODE_NONE), netlink.LinkSetUp(l)); err != nil {
			return err
		}
		outside, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(outside, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
			return err
		}
		if err := unix.Bind(outside, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: l.Attrs().Index}); err != nil {
			return err
		}
		return Plug(n.ns, "out1", u)
	})
	updates, stop := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	n.do(func() error { return netlink.LinkSubscribe(updates, stop) })
	n.apply(c, filtering)
	wires := map[string]bool{u.LinkName(): true}
	if u.VLAN == 0 && !filtering {
		for _, v := range c.vlans() {
			wires[u.part(v)] = true
		}
	}
	for l := range updates { // a wire's carrier comes later than the plan
		if a := l.Attrs(); a.OperState == netlink.OperUp {
			delete(wires, a.Name)
		}
		if len(wires) == 0 {
			close(stop)
			break
		}
	}
	for range updates { // until the subscription has ended
	}
	return n, outside
}

// trunk: an uplink carries all VLANs, each frame with its tag.
func trunk(t *testing.T, filtering bool) {
	c := Config{NICs: []NIC{{ID: 1, VLAN: 5, MAC: macA}, {ID: 2, VLAN: 6, MAC: macB}}, Uplinks: []Uplink{{}}}
	n, outside := plugged(t, c, filtering)
	defer unix.Close(outside)
	fromA, toB := arp(everybody, macA, macA, ipA, ipB), arp(everybody, macC, macC, ipB, ipA)
	if err := unix.SetsockoptInt(outside, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
		t.Fatal(err)
	}
	n.send(1, fromA)
	if frame, vlan := tagged(t, outside, macA); string(frame) != string(fromA) || vlan != 5 {
		t.Errorf("heard outside with tag %d: % x", vlan, frame)
	}
	other, own := withTag(5, toB), withTag(6, toB)
	for _, f := range [][]byte{other, own} {
		if _, err := unix.Write(outside, f); err != nil {
			t.Fatal(err)
		}
	}
	n.until(2, toB, nil)
	n.until(1, toB, nil)
}

// withTag is a frame with a VLAN's tag.
func withTag(vlan uint16, f []byte) []byte {
	return append(append(append([]byte(nil), f[:12]...), 0x81, 0, byte(vlan>>8), byte(vlan)), f[12:]...)
}

// tagged is what a socket with PACKET_AUXDATA hears next of a station, and its VLAN.
func tagged(t *testing.T, outside int, from MAC) (frame []byte, vlan uint16) {
	t.Helper()
	buf, oob := make([]byte, 2048), make([]byte, 256)
	var k, m int
	for k < 12 || string(buf[6:12]) != string(from[:]) { // the uplink's parts may have a word of their own
		var err error
		if k, m, _, _, err = unix.Recvmsg(outside, buf, oob, 0); err != nil {
			t.Fatal(err)
		}
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob[:m])
	if err != nil || len(cmsgs) != 1 || len(cmsgs[0].Data) < 20 {
		t.Fatalf("auxiliary data: %v, %v", cmsgs, err)
	}
	// The tag is beside the frame (struct tpacket_auxdata, tp_vlan_tci).
	return buf[:k], binary.LittleEndian.Uint16(cmsgs[0].Data[16:]) & 0xfff
}

func bothKinds(t *testing.T, test func(t *testing.T, filtering bool)) {
	t.Run("a bridge a VLAN", func(t *testing.T) { test(t, false) })
	t.Run("one bridge that filters", func(t *testing.T) {
		n := newTestNet(t)
		var can bool
		n.do(func() (err error) { can, err = VLANFiltering(); return err })
		if !can {
			t.Skip("needs a kernel with bridge VLAN filtering: TestFilteringBridge runs it in the lab (`make lab-tests`)")
		}
		test(t, true)
	})
}

// TestFilteringBridge: all of the above with one bridge that filters, and trunks of both kinds. It
// takes the lab for a host whose kernel has what that needs.
func TestFilteringBridge(t *testing.T) {
	lab.NeedsKVM(t)
	var can bool
	newTestNet(t).do(func() (err error) { can, err = VLANFiltering(); return err })
	if !can {
		t.Fatal("no VLAN filtering")
	}
	t.Run("spoofing", func(t *testing.T) { spoofing(t, true) })
	t.Run("segments", func(t *testing.T) { segments(t, true) })
	t.Run("vlans", func(t *testing.T) { vlans(t, true) })
	t.Run("uplink", func(t *testing.T) { uplink(t, true) })
	t.Run("trunk", func(t *testing.T) { trunk(t, true) })
	t.Run("trunk, a bridge a VLAN", func(t *testing.T) { trunk(t, false) })
	t.Run("quarantine", func(t *testing.T) { quarantine(t, true) })
	t.Run("remediation", func(t *testing.T) { remediation(t, true) })
	t.Run("cut off", func(t *testing.T) { cutOff(t, true) })
	t.Run("moves", func(t *testing.T) { moves(t, true) })
	t.Run("quarantine trunk", func(t *testing.T) { quarantineTrunk(t, true) })
	t.Run("quarantine trunk, a bridge a VLAN", func(t *testing.T) { quarantineTrunk(t, false) })
}
