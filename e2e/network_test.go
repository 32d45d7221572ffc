package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/network"
)

func TestNetworkQEMU(t *testing.T) { guestsNetwork(t, "qemu") }

func TestNetworkNative(t *testing.T) {
	lab.NeedsKVM(t)
	guestsNetwork(t, "native")
}

// guestsNetwork has two guests of a VLAN exchange data, which is compared, while NetBack is killed
// and replaced; one of them reboots before. A third guest of the VLAN is not heard when it speaks
// with another's addresses, and hears nothing in another VLAN.
func guestsNetwork(t *testing.T, emulator string) {
	name, outside := newUplink(t)
	h := newHost(t, "--uplink", name+":10")
	guest := func(name string, nics ...string) {
		s := start{name: name, emulator: emulator, what: "net", cmdline: "net=" + name, args: []string{"--no-tpm"}}
		for _, n := range nics {
			s.args = append(s.args, "--nic", n)
		}
		h.start(s)
	}
	guest("server", "vlan=10,mac=02:00:00:00:00:01,address=192.0.2.1")
	h.await("server", "READY", bootTime)
	ping(t, outside)
	r := h.tryStart(start{name: "twin", emulator: emulator, what: "net", args: []string{"--no-tpm", "--nic", "vlan=10,mac=02:00:00:00:00:01"}})
	if r.status == 0 || !strings.Contains(r.err, "nics[0].mac") {
		t.Errorf("a second guest has the first one's address: %d, %s", r.status, r.err)
	}
	guest("liar", "vlan=10,mac=02:00:00:00:00:03,address=192.0.2.3", "vlan=20,mac=02:00:00:00:00:04")
	h.await("liar", "LIED", 2*bootTime)
	// An emulator that does not answer keeps nobody else from the next NetBack.
	all := map[string]func(string, time.Duration){"server": h.followEvents("server"), "liar": h.followEvents("liar")}
	deaf := h.process("emulator-liar")
	if err := unix.Kill(deaf, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	h.kill("NetBack", "redoubt-netback")
	all["server"]("network", 10*time.Second)
	if err := unix.Kill(deaf, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	all["liar"]("network", 10*time.Second)
	guest("client", "vlan=10,mac=02:00:00:00:00:02,address=192.0.2.2")
	next := h.followEvents("client")
	replaced := func() { t.Helper(); next("network", time.Minute) }
	for _, round := range []string{"ROUND 1", "ROUND 2", "ROUND 3", "ROUND 4"} {
		h.await("client", round, 2*bootTime)
		h.kill("NetBack", "redoubt-netback")
		replaced()
		h.must("reset", "netback")
		replaced()
		h.kill("NetBack", "redoubt-netback")
		replaced()
	}
	h.await("client", "SAME 4", bootTime)
	enough(t, outside, "192.0.2.2")
	g := h.awaitDown("client", bootTime)
	c := h.console("client")
	for _, want := range []string{"BOOT 2", "SAME 1", "SAME 2", "SAME 3", "SAME 4", "E2E-DONE"} {
		if !strings.Contains(c, want) {
			t.Errorf("no %q on the console; client is %s: %s\n%s", want, g.State, g.Reason, lastLines(c, 20))
		}
	}
	if strings.Contains(c, "DIFFERENT") || g.Starts != 2 {
		t.Errorf("data were lost, or it did not reboot once but was started %d times\n%s", g.Starts, lastLines(c, 20))
	}
	enough(t, outside, "192.0.2.3")
	liar := h.await("liar", "E2E-DONE", bootTime)
	for _, want := range []string{"WRONG-IP unanswered", "WRONG-MAC unanswered", "HONEST answered", "ECHOS 2\n", "ELSEWHERE 0\n"} {
		if !strings.Contains(liar, want) {
			t.Errorf("no %q:\n%s", want, lastLines(liar, 20))
		}
	}
	for _, name := range []string{"server", "client", "liar"} {
		if n := h.instances(name, "netback"); n < 9 && name != "client" || n < 1 {
			t.Errorf("the audit log has %s depend on %d NetBacks", name, n)
		}
	}
	ping(t, outside)
	h.fails(1, `no guest "nobody" with a netback runs`, "reset", "netback", "nobody")
}

// process is the running process of a label.
func (h *host) process(label string) int {
	h.t.Helper()
	var all []struct {
		Label string `json:"label"`
		PID   int    `json:"pid"`
	}
	r := h.run("services", "--json")
	if err := json.Unmarshal([]byte(r.out), &all); err != nil {
		h.t.Fatalf("%v: %s%s", err, r.out, r.err)
	}
	for _, p := range all {
		if p.Label == label {
			return p.PID
		}
	}
	h.t.Fatalf("no process %s in %s", label, r.out)
	return 0
}

// uplinks is how many were made: each has a name of its own.
var uplinks atomic.Uint32

// newUplink makes an interface for Redoubt, which must be there again when Redoubt has ended, and
// the network that it leads to.
func newUplink(t testing.TB) (name string, outside *network.Namespace) {
	t.Helper()
	outside, err := network.NewNamespace()
	if err != nil {
		t.Fatal(err)
	}
	// Last of all: the other end goes with it, and so the pair.
	t.Cleanup(func() { _ = outside.Close() })
	name = fmt.Sprintf("rt%d-%d", os.Getpid(), uplinks.Add(1))
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}
	if err := netlink.LinkAdd(pair); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after Redoubt's end
		l, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkDel(l)
		}
		if err != nil {
			t.Errorf("the uplink did not come back: %v", err)
		}
	})
	peer, err := netlink.LinkByName(name + "p")
	if err == nil {
		err = netlink.LinkSetNsFd(peer, int(outside.File().Fd()))
	}
	if err == nil {
		err = outside.Do(func() error {
			a, err := netlink.ParseAddr("192.0.2.100/24")
			if err != nil {
				return err
			}
			return errors.Join(netlink.AddrAdd(peer, a), netlink.LinkSetUp(peer))
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return name, outside
}

// ping sends echo requests from outside until the guest that serves answers one.
func ping(t testing.TB, outside *network.Namespace) {
	t.Helper()
	var c net.PacketConn
	err := outside.Do(func() (err error) { c, err = net.ListenPacket("ip4:icmp", "192.0.2.100"); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	request := []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}
	buf := make([]byte, 256)
	for range 30 {
		if _, err := c.WriteTo(request, &net.IPAddr{IP: net.IPv4(192, 0, 2, 1)}); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, _, err := c.ReadFrom(buf); err == nil && n >= 1 && buf[0] == 0 {
			return
		}
	}
	t.Error("the guest is not reached from outside")
}

// enough tells a guest to end, from outside.
func enough(t testing.TB, outside *network.Namespace, address string) {
	t.Helper()
	err := outside.Do(func() error {
		c, err := net.DialTimeout("tcp", address+":7000", time.Minute)
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// instances counts those of a service that the audit log has a guest depend on.
func (h *host) instances(guest, service string) (n int) {
	h.t.Helper()
	for r, err := range audit.Records(h.path("state", audit.Dir)) {
		if err != nil {
			h.t.Fatal(err)
		}
		if r.Act == audit.ActLink && r.Object == guest && r.Detail[audit.DetailService] == service {
			n++
		}
	}
	return n
}
