package network

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestRemediation: the remediation host, a kernel of its own, is reached and answers, by IPv4 and IPv6; by its other
// addresses it is not.
func TestRemediation(t *testing.T) { bothKinds(t, remediation) }

func remediation(t *testing.T, filtering bool) {
	host := newTestNet(t)
	c := quarantineConfig()
	c.NICs[0].Quarantined = true
	n, out := pluggedTo(t, host, c, filtering)
	unix.Close(out)
	var mac MAC
	host.do(func() error {
		l, err := netlink.LinkByName("out0")
		if err != nil {
			return err
		}
		mac = MAC(l.Attrs().HardwareAddr)
		for _, a := range []netip.Addr{ipB, ip6B, ipN, ip6N} { // the last two are no remediation addresses
			bits := 24
			if a.Is6() {
				bits = 64
			}
			ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
			if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
				return err
			}
		}
		return nil
	})
	echo4 := func(to netip.Addr) []byte {
		m := []byte{8, 0, 0, 0, 0, 1, 0, 1}
		binary.BigEndian.PutUint16(m[2:], ^checksum(m))
		return ip4(mac, macA, ipA, to, 1, m)
	}
	echo6 := func(to netip.Addr) []byte {
		m := []byte{128, 0, 0, 0, 0, 1, 0, 1}
		binary.BigEndian.PutUint16(m[2:], ^checksum(ip6A.AsSlice(), to.AsSlice(), []byte{0, 0, 0, byte(len(m)), 0, 0, 0, 58}, m))
		return ip6(mac, macA, ip6A, to, 58, m)
	}
	soliciting := func(to netip.Addr) []byte { // with the source's MAC (RFC 4861 §4.3)
		t6 := to.As16()
		m := append(icmp6(135, to), append([]byte{1, 1}, macA[:]...)...)
		node := netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: t6[13], 14: t6[14], 15: t6[15]})
		binary.BigEndian.PutUint16(m[2:], ^checksum(ip6A.AsSlice(), node.AsSlice(), []byte{0, 0, 0, byte(len(m)), 0, 0, 0, 58}, m))
		return ip6(MAC{0x33, 0x33, 0xff, t6[13], t6[14], t6[15]}, macA, ip6A, node, 58, m)
	}
	isARP := func(f []byte) bool { return f[13] == 6 && f[21] == 2 && string(f[28:32]) == string(ipB.AsSlice()) }
	isPong4 := func(f []byte) bool { return f[12] == 8 && f[13] == 0 && f[23] == 1 && f[34] == 0 }
	isAdvert := func(f []byte) bool { return f[12] == 0x86 && f[20] == 58 && f[54] == 136 }
	isPong6 := func(f []byte) bool { return f[12] == 0x86 && f[20] == 58 && f[54] == 129 }
	for _, w := range []struct {
		name         string
		refused, say []byte
		answer       func([]byte) bool
	}{
		{"ARP", arp(everybody, macA, macA, ipA, ipN), arp(everybody, macA, macA, ipA, ipB), isARP},
		{"echo", echo4(ipN), echo4(ipB), isPong4},
		{"neighbour discovery", soliciting(ip6N), soliciting(ip6B), isAdvert},
		{"echo, IPv6", echo6(ip6N), echo6(ip6B), isPong6},
	} {
		n.send(1, w.refused)
		answer, err := n.answer(1, w.say, w.answer)
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		if from := answer[6:12]; string(from) != string(mac[:]) {
			t.Errorf("%s: answered by % x", w.name, from)
		}
		for _, not := range []netip.Addr{ipN, ip6N} {
			if strings.Contains(string(answer), string(not.AsSlice())) {
				t.Errorf("%s: %v answers: % x", w.name, not, answer)
			}
		}
	}
}

// answer is the first frame of a kind that a guest hears after it has said something; a kernel has words of its own
// besides. As a guest does, it asks again: the kernel listens for a new IPv6 address in its own time.
func (n *testNet) answer(id int, say []byte, is func(frame []byte) bool) (frame []byte, err error) {
	f := n.taps[id].File
	buf := make([]byte, 4096)
	for range 50 {
		n.send(id, say)
		if err := f.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return nil, err
		}
		for {
			clear(buf)
			k, err := f.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return nil, err
			}
			if is(buf[testHeader:]) {
				return buf[testHeader:k], nil
			}
		}
	}
	return nil, errors.New("no answer")
}

// TestCutOff: a quarantined guest that has no place in a VLAN reaches nobody and hears nobody: without a quarantine's
// VLAN, or where its MAC is another's there. Without remediation addresses none reaches anybody.
func TestCutOff(t *testing.T) { bothKinds(t, cutOff) }

func cutOff(t *testing.T, filtering bool) {
	c := quarantineConfig()
	c.NICs = append(c.NICs, NIC{ID: 7, VLAN: 6, MAC: macA, Addresses: []netip.Addr{ipA}, Quarantined: true})
	q := newQuarantineNet(t, c, filtering)
	word := ip4(macR, macA, ipA, ipB, 17, udp(1, 2))
	heard := func(id int) int {
		q.send(id, word)
		q.send(4, fromAnother)
		return q.untilOutside(fromAnother, word)
	}
	for _, both := range []bool{false, true, false} {
		q.set(both)
		place := 7
		if both {
			place = 1 // the lower id
			if heard(7) != 0 {
				t.Error("the higher id is heard")
			}
		}
		if heard(place) != 1 {
			t.Errorf("NIC %d is not heard", place)
		}
		q.drain(1)
		q.drain(7)
		q.fromOutside(toA)
		q.until(place, toA, nil)
		if n := q.drain(1) + q.drain(7); n != 0 {
			t.Errorf("the one in NIC %d's shadow heard %d frames", place, n)
		}
	}

	// No VLAN for it. The uplink's is one like others, with the guest of macD in it.
	another := &q.c.NICs[3]
	another.VLAN, another.Quarantined = 66, false
	was := q.c.Quarantine
	q.c.Quarantine = Quarantine{}
	q.set(true)
	q.drain(1)
	q.drain(7)
	free, answer := arp(everybody, macD, macD, ipD, ipD), arp(everybody, macR, macR, ipB, ipA)
	for _, id := range []int{1, 7} {
		q.send(id, word)
		q.send(id, arp(everybody, macA, macA, ipA, ipB))
	}
	for _, id := range []int{2, 5, 6} {
		q.send(id, arp(everybody, q.c.NICs[id-1].MAC, q.c.NICs[id-1].MAC, ipN, ipA))
	}
	q.send(2, ip4(macA, macB, ipN, ipA, 17, udp(1, 2)))
	q.send(4, ip4(macA, macD, ipD, ipA, 17, udp(1, 2)))
	q.send(4, free)
	q.untilOutside(free, ip4(macA, macD, ipD, ipA, 17, udp(1, 2)))
	q.fromOutside(toA)
	q.fromOutside(answer)
	q.until(4, answer, nil)
	if n := q.drain(1) + q.drain(7); n != 0 {
		t.Errorf("guests in no VLAN heard %d frames", n)
	}

	// A VLAN, but nothing to reach in it.
	another.VLAN, another.Quarantined = 7, true
	q.c.Quarantine = Quarantine{VLAN: 66}
	q.set(true)
	q.send(1, word)
	q.send(1, arp(everybody, macA, macA, ipA, ipB))
	q.send(1, asks(macA, ip6A, ip6B))
	q.c.Quarantine = was
	q.set(true)
	q.send(4, fromAnother)
	q.untilOutside(fromAnother, nil)
}

// TestMoves: while a guest is put into quarantine and taken out of it, again and again, nothing that its own VLAN lets
// it say is heard in the quarantine's, and nothing that another one says there is heard by it.
func TestMoves(t *testing.T) { bothKinds(t, moves) }

func moves(t *testing.T, filtering bool) {
	q := newQuarantineNet(t, quarantineConfig(), filtering)
	whileMoving := func(from int, word []byte) {
		t.Helper()
		var (
			stop   atomic.Bool
			sender sync.WaitGroup
			failed error
		)
		sender.Go(func() {
			for !stop.Load() && failed == nil {
				_, failed = q.taps[from].File.Write(append(make([]byte, testHeader), word...))
			}
		})
		for range 4 {
			q.set(true)
			q.set(false)
		}
		stop.Store(true)
		if sender.Wait(); failed != nil {
			t.Fatal(failed)
		}
	}
	whileMoving(1, arp(everybody, macA, macA, ipA, ipN))
	q.send(4, fromAnother)
	q.untilOutside(fromAnother, nil)

	q.drain(1)
	whileMoving(4, ip4(macA, macD, ipD, ipB, 17, udp(1, 2)))
	q.set(true)
	q.fromOutside(toA)
	q.until(1, toA, nil)
}

// quarantineTrunk: an uplink with tags carries the quarantine's VLAN while somebody is in it.
func quarantineTrunk(t *testing.T, filtering bool) {
	c := quarantineConfig()
	c.NICs, c.Uplinks = c.NICs[:2], []Uplink{{}}
	c.NICs[0].Quarantined = true
	q := newQuarantineNet(t, c, filtering)
	if err := unix.SetsockoptInt(q.out, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
		t.Fatal(err)
	}
	word := arp(everybody, macA, macA, ipA, ipB)
	for _, c := range []struct {
		in       bool
		own, old uint16
	}{{true, 66, 5}, {false, 5, 66}} {
		q.set(c.in)
		q.drain(1)
		q.send(1, word)
		if frame, vlan := tagged(t, q.out, macA); string(frame) != string(word) || vlan != c.own {
			t.Errorf("quarantined %v: heard outside with tag %d: % x", c.in, vlan, frame)
		}
		q.fromOutside(withTag(c.old, arp(macA, macR, macR, ipN, ipA)))
		q.fromOutside(withTag(c.own, toA))
		q.until(1, toA, nil)
	}
}

// TestManyNICs: the filter of as many NICs as a tenant may have, with as many addresses as they may have, is put in force
// in one transaction; one of them is quarantined.
func TestManyNICs(t *testing.T) {
	n := newTestNet(t)
	c := Config{Quarantine: Quarantine{VLAN: 66}}
	for i := range MaxRemediation {
		c.Quarantine.Remediation = append(c.Quarantine.Remediation, netip.AddrFrom16([16]byte{0: 0xfd, 14: 1, 15: byte(i)}))
	}
	for i := range 64 {
		nic := NIC{ID: i, VLAN: 5, MAC: MAC{2, 1: byte(i)}}
		for k := range MaxAddresses {
			nic.Addresses = append(nic.Addresses, netip.AddrFrom16([16]byte{0: 0xfd, 13: byte(i), 15: byte(k)}))
		}
		c.NICs = append(c.NICs, nic)
	}
	a, b := c.NICs[0], c.NICs[1]
	word, marker := ip6(b.MAC, a.MAC, a.Addresses[15], b.Addresses[15], 17, udp(1, 2)), ip6(b.MAC, c.NICs[2].MAC, c.NICs[2].Addresses[0], b.Addresses[0], 17, udp(1, 2))
	for _, c.NICs[0].Quarantined = range []bool{false, true} {
		n.apply(c, false)
		n.send(a.ID, word)
		n.send(2, marker)
		if heard := n.until(b.ID, marker, word); heard == c.NICs[0].Quarantined {
			t.Errorf("quarantined %v: heard %v", c.NICs[0].Quarantined, heard)
		}
	}
}

// BenchmarkQuarantine: how long it takes to put one of 64 NICs, all with fixed addresses, into quarantine and out of it. Its
// peer is to apply the plan that is in force already.
func BenchmarkQuarantine(b *testing.B) {
	n := newTestNet(b)
	c := Config{Quarantine: Quarantine{VLAN: 66, Remediation: []netip.Addr{ipB, ip6B}}}
	for i := range 64 {
		c.NICs = append(c.NICs, NIC{ID: i, VLAN: uint16(1 + i%8), MAC: MAC{2, 1: byte(i)}, Addresses: []netip.Addr{ipA, ip6A}, Quarantined: i >= 48})
	}
	n.apply(c, false)
	var in, out, again []time.Duration
	timed := func(to *[]time.Duration, quarantined bool) {
		c.NICs[0].Quarantined = quarantined
		p, err := NewPlan(c, false)
		if err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		n.do(func() error { return Apply(p) })
		*to = append(*to, time.Since(start))
	}
	for b.Loop() {
		timed(&in, true)
		timed(&again, true)
		timed(&out, false)
	}
	median := func(all []time.Duration) float64 {
		slices.Sort(all)
		return float64(all[len(all)/2].Microseconds()) / 1000
	}
	b.ReportMetric(median(in), "quarantine-ms")
	b.ReportMetric(median(out), "release-ms")
	b.ReportMetric(median(again), "unchanged-ms")
	b.ReportMetric(median(in)/median(again), "quarantine/unchanged")
}
