package netback

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/network/nettest"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
	"redoubt.dev/redoubt/virtio"
)

const childEnv = "NETBACK_TEST_CHILD"

// TestMain is NetBack itself where the tests start it: descriptor 3 is its control connection.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		os.Exit(m.Run())
	}
	control, err := ipc.FromFile(os.NewFile(3, "control"))
	if err == nil {
		err = Serve(context.Background(), slog.New(slog.NewTextHandler(os.Stderr, nil)), control)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "netback:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A host does what the Builder does: it holds the namespace and the taps, starts NetBack in it, and
// replaces it.
type host struct {
	t      testing.TB
	ns     *network.Namespace
	config network.Config
	guests []*guest
	cmd    *exec.Cmd
	peer   *rpc.Peer
	heard  chan struct{}
}

func newHost(t testing.TB, c network.Config) *host {
	t.Helper()
	h := &host{t: t, ns: nettest.Namespace(t), config: c}
	t.Cleanup(h.kill)
	return h
}

func (h *host) kill() {
	if h.cmd == nil {
		return
	}
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
	<-h.heard
	h.cmd = nil
}

// replace kills NetBack and starts the next one; when it returns, all guests are served.
func (h *host) replace() {
	h.t.Helper()
	h.kill()
	control, child, err := ipc.Files()
	if err != nil {
		h.t.Fatal(err)
	}
	defer child.Close()
	h.cmd = exec.Command(os.Args[0])
	h.cmd.Env = append(os.Environ(), childEnv+"=1")
	h.cmd.ExtraFiles = []*os.File{child}
	h.cmd.Stderr = os.Stderr
	if err := h.ns.Do(h.cmd.Start); err != nil {
		h.t.Fatal(err)
	}
	conn, err := ipc.FromFile(control)
	if err != nil {
		h.t.Fatal(err)
	}
	h.peer = rpc.New(conn, func(_ context.Context, r *rpc.Request) (any, error) {
		var f protocol.NICFailed
		if err := r.Decode(&f); err != nil {
			return nil, err
		}
		h.t.Errorf("%s: %+v", r.Method, f)
		return nil, nil
	})
	h.heard = make(chan struct{})
	go func() {
		defer close(h.heard)
		_ = h.peer.Run(context.Background())
	}()
	if _, err := h.peer.Call(h.t.Context(), protocol.MethodNetwork, h.config, nil); err != nil {
		h.t.Fatal(err)
	}
	for _, g := range h.guests {
		h.attach(g)
	}
}

func (h *host) attach(g *guest) {
	h.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	back, front := os.NewFile(uintptr(fds[0]), "back"), os.NewFile(uintptr(fds[1]), "front")
	defer back.Close()
	defer front.Close()
	in := protocol.AttachNIC{ID: g.id, MTU: 1500, Files: protocol.Files{protocol.FileTun, protocol.FileMemory, protocol.FileNetwork}}
	if _, err := h.peer.Call(h.t.Context(), protocol.MethodAttachNIC, in, nil, g.tun, g.mem, back); err != nil {
		h.t.Fatal(err)
	}
	c, err := net.FileConn(front)
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := g.front.Connect(c.(*net.UnixConn)); err != nil {
		h.t.Fatal(err)
	}
}

// A guest is one under QEMU with one NIC.
type guest struct {
	id    int
	tun   *os.File
	mem   *os.File
	front *vhostuser.Frontend
	qemu  *exec.Cmd
	ended chan error
	lines chan string
}

const memory = 192 << 20

// boot starts a guest whose init is the script after the usual beginning.
func (h *host) boot(id int, mac network.MAC, script string) *guest {
	t := h.t
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := root.Vmlinuz(debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := root.Modules(debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	b := initramfs.New(root.Path("bin/busybox"), "#!/bin/sh\n/bin/busybox --install -s /bin\n"+
		"mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev\n"+
		"for m in $(cat /mod/order); do insmod /mod/$m || echo \"insmod $m failed\"; done\n"+
		"ip link set lo up; ip link set eth0 up\n"+script)
	b.Modules(tree, "virtio_pci", "virtio_net")
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := b.WriteFile(initrd); err != nil {
		t.Fatal(err)
	}
	g := &guest{id: id, front: vhostuser.NewFrontend(2, virtio.NetQueueSize), ended: make(chan error, 1), lines: make(chan string, 1024)}
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	g.mem = os.NewFile(uintptr(fd), "guest")
	if err := g.mem.Truncate(memory); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(g.mem.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		t.Fatal(err)
	}
	st, err := g.mem.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.ns.Do(func() (err error) { g.tun, err = network.OpenTun(); return err }); err != nil {
		t.Fatal(err)
	}
	h.attach(g)
	h.guests = append(h.guests, g)
	l, door, err := vhostuser.Door(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer door.Close()
	relayed := make(chan error, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err == nil {
			err = vhostuser.Relay(context.Background(), c, g.front, vhostuser.RelayOptions{Memory: vhostuser.Whitelist{st}, OwnConfig: true})
		}
		relayed <- err
	}()
	g.qemu = root.Command(context.Background(), "qemu-system-x86_64",
		"-L", root.Path("usr/share/seabios"), "-L", root.Path("usr/share/qemu"),
		"-accel", "tcg", "-cpu", "qemu64", "-machine", "q35,memory-backend=ram", "-nodefaults", "-display", "none", "-no-reboot",
		"-m", "192", "-object", fmt.Sprintf("memory-backend-file,id=ram,size=%d,mem-path=/proc/self/fd/3,share=on", memory),
		"-chardev", "socket,id=net,path=/proc/self/fd/4", "-netdev", "vhost-user,id=net0,chardev=net",
		"-device", fmt.Sprintf("virtio-net-pci,netdev=net0,mac=%s,ctrl_guest_offloads=off,disable-legacy=on,romfile=,vectors=0", net.HardwareAddr(mac[:])),
		"-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append", debian.Cmdline+" panic=-1",
	)
	g.qemu.ExtraFiles = []*os.File{g.mem, door}
	out, err := g.qemu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	g.qemu.Stderr = os.Stderr
	if err := g.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		text, part := make([]byte, 4096), []byte(nil)
		for {
			n, err := out.Read(text)
			part = append(part, text[:n]...)
			for {
				line, rest, ok := bytes.Cut(part, []byte("\n"))
				if !ok {
					break
				}
				g.lines <- strings.TrimSpace(string(line))
				part = rest
			}
			if err != nil {
				break
			}
		}
		g.ended <- g.qemu.Wait()
	}()
	t.Cleanup(func() {
		_ = g.qemu.Process.Kill()
		if err := <-g.ended; err != nil && !errors.As(err, new(*exec.ExitError)) {
			t.Error(err)
		}
		_ = l.Close()
		if err := <-relayed; err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("relay: %v", err)
		}
		if err := g.front.Close(); err != nil {
			t.Error(err)
		}
		g.tun.Close()
		g.mem.Close()
	})
	return g
}

// await reads the guest's lines up to one.
func (h *host) await(g *guest, want string) {
	h.t.Helper()
	limit := time.NewTimer(2 * time.Minute)
	defer limit.Stop()
	for {
		select {
		case l := <-g.lines:
			h.t.Logf("guest %d: %s", g.id, l)
			if strings.Contains(l, "failed") {
				h.t.Fatalf("guest %d says %q", g.id, l)
			}
			if l == want {
				return
			}
		case err := <-g.ended:
			g.ended <- err
			h.t.Fatalf("guest %d ended: %v", g.id, err)
		case <-limit.C:
			h.t.Fatalf("guest %d does not say %q", g.id, want)
		}
	}
}

var (
	mac1, mac2 = network.MAC{2, 0, 0, 0, 0, 1}, network.MAC{2, 0, 0, 0, 0, 2}
	ip1, ip2   = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
)

// TestGuestsSurviveKills: two guests of one VLAN exchange verified traffic through NetBack, behind
// its filter, while NetBack is killed and replaced several times a second. Their drivers take TCP segments that
// nobody has cut, in several buffers, and are offered no way to change their minds.
func TestGuestsSurviveKills(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests: needs a run without -short, as `make test` is")
	}
	h := newHost(t, network.Config{NICs: []network.NIC{
		{ID: 1, VLAN: 7, MAC: mac1, Addresses: []netip.Addr{ip1}}, {ID: 2, VLAN: 7, MAC: mac2, Addresses: []netip.Addr{ip2}},
	}})
	h.replace()
	a := h.boot(1, mac1, "ip addr add 192.0.2.1/24 dev eth0\nnc -ll -p 5000 -e /bin/cat &\necho READY\nwait\n")
	b := h.boot(2, mac2, `features=$(cat /sys/class/net/eth0/device/features)
case $features in ??0????111?????1*) ;; *) echo "features $features failed" ;; esac
ip addr add 192.0.2.2/24 dev eth0
dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null
until nc -w 5 192.0.2.1 5000 </dev/null; do :; done
echo READY
for round in 1 2 3 4; do
  [ "$(nc 192.0.2.1 5000 < /data | md5sum)" = "$(md5sum < /data)" ] && echo "SAME $round" || echo "round $round failed"
done
for f in rx_errors tx_errors rx_crc_errors rx_frame_errors rx_length_errors; do
  [ "$(cat /sys/class/net/eth0/statistics/$f)" = 0 ] || echo "counter $f failed"
done
echo FINISHED
poweroff -f
`)
	h.await(a, "READY")
	h.await(b, "READY")
	want := []string{"SAME 1", "SAME 2", "SAME 3", "SAME 4", "FINISHED"}
	kills := 0
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(2 * time.Minute)
	defer limit.Stop()
	for len(want) > 0 {
		select {
		case <-tick.C:
			h.replace()
			kills++
		case l := <-b.lines:
			t.Log(l)
			if strings.Contains(l, "failed") {
				t.Fatalf("the guest says %q", l)
			}
			if l == want[0] {
				want = want[1:]
			}
		case <-limit.C:
			t.Fatalf("after %d kills there is no %q", kills, want[0])
		}
	}
	t.Logf("%d kills", kills)
	if kills < 3 {
		t.Errorf("only %d kills", kills)
	}
}

// TestRefused: calls that make no sense.
func TestRefused(t *testing.T) {
	h := newHost(t, network.Config{NICs: []network.NIC{{ID: 1, VLAN: 7, MAC: mac1}}})
	h.replace()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	all := protocol.Files{protocol.FileTun, protocol.FileMemory, protocol.FileNetwork}
	for name, in := range map[string]protocol.AttachNIC{
		"not in the network": {ID: 2, MTU: 1500, Files: all},
		"no tap":             {ID: 1, MTU: 1500, Files: all},
		"no memory":          {ID: 1, MTU: 1500, Files: protocol.Files{protocol.FileTun, protocol.FileTun, protocol.FileNetwork}},
	} {
		if _, err := h.peer.Call(t.Context(), protocol.MethodAttachNIC, in, nil, null, null, null); err == nil {
			t.Errorf("%s: attached", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	bad := network.Config{NICs: []network.NIC{{ID: 1, VLAN: 0, MAC: mac1}}}
	if _, err := h.peer.Call(t.Context(), protocol.MethodNetwork, bad, nil); err == nil {
		t.Error("a network with VLAN 0 was made")
	}
	if _, err := h.peer.Call(t.Context(), "open-everything", struct{}{}, nil); err == nil {
		t.Error("an unknown call was answered")
	}
}

// BenchmarkResetNetBack: how long a guest is not heard when NetBack is killed: from the kill to the
// guest's answer to an echo request that was sent to it right then.
func BenchmarkResetNetBack(b *testing.B) {
	up := network.Uplink{ID: 0, VLAN: 7}
	h := newHost(b, network.Config{NICs: []network.NIC{{ID: 1, VLAN: 7, MAC: mac1}}, Uplinks: []network.Uplink{up}})
	outside, err := network.NewNamespace()
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = outside.Close() }()
	var ping net.PacketConn
	if err := outside.Do(func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "out0"}, PeerName: "out1"}); err != nil {
			return err
		}
		l, err := netlink.LinkByName("out0")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr("192.0.2.2/24")
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l), network.Plug(h.ns, "out1", up)); err != nil {
			return err
		}
		ping, err = net.ListenPacket("ip4:icmp", "192.0.2.2")
		return err
	}); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = ping.Close() }()
	h.replace()
	g := h.boot(1, mac1, "ip addr add 192.0.2.1/24 dev eth0\nuntil ping -c 1 -W 1 192.0.2.2 >/dev/null; do :; done\necho READY\nwhile :; do sleep 1000; done\n")
	h.await(g, "READY")
	echo := func(seq int) {
		m := binary.BigEndian.AppendUint16([]byte{8, 0, 0, 0, 0x52, 0x44}, uint16(seq))
		sum := 0x0800 + 0x5244 + seq
		binary.BigEndian.PutUint16(m[2:], ^uint16(sum>>16+sum&0xffff))
		if _, err := ping.WriteTo(m, &net.IPAddr{IP: net.IPv4(192, 0, 2, 1)}); err != nil {
			b.Fatal(err)
		}
	}
	hear := func(seq int) {
		buf := make([]byte, 256)
		if err := ping.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			b.Fatal(err)
		}
		for {
			n, _, err := ping.ReadFrom(buf)
			if err != nil {
				b.Fatal(err)
			}
			if n >= 8 && buf[0] == 0 && binary.BigEndian.Uint16(buf[6:]) == uint16(seq) {
				return
			}
		}
	}
	var total, least time.Duration
	n := 0
	for b.Loop() {
		start := time.Now()
		h.kill()
		echo(2 * n)
		h.replace()
		hear(2 * n)
		took := time.Since(start)
		start = time.Now()
		echo(2*n + 1) // the way's own time
		hear(2*n + 1)
		own := time.Since(start)
		total, least = total+took, least+own
		n++
	}
	b.ReportMetric(float64(total.Microseconds())/1000/float64(n), "ms-downtime")
	b.ReportMetric(float64(least.Microseconds())/1000/float64(n), "ms-echo")
	b.ReportMetric(0, "ns/op")
}
