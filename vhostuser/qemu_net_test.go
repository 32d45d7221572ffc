package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/network/nettest"
	"redoubt.dev/redoubt/virtio"
)

var testMAC = [6]byte{0x02, 0, 0, 0, 0, 0x10}

// netChild is a network back end in a process of its own: descriptor 6 is the tap's.
func netChild(c *net.UnixConn, mem os.FileInfo) error {
	tap, err := network.NewTap(os.NewFile(6, "tun"), "test0")
	if err != nil {
		return err
	}
	b, err := virtio.NewNet(tap.Port(), testMAC, 1500)
	if err != nil {
		return err
	}
	return Serve(context.Background(), c, b, Options{
		Memory:  Whitelist{mem},
		OnStart: func() { os.NewFile(5, "started").Close() },
	})
}

// netGuestInit sends random data to the host, which sends it back, in rounds.
const netGuestInit = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
echo "INIT before the driver"
for m in $(cat /mod/order); do insmod /mod/$m || echo "insmod $m failed"; done
cat /sys/class/net/eth0/address /sys/class/net/eth0/device/features
ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0
dd if=/dev/urandom of=/data bs=64k count=48 2>/dev/null
for round in 1 2 3 4 5 6; do
  echo "ROUND $round"
  got=$(nc 192.0.2.1 5000 < /data | md5sum)
  [ "$got" = "$(md5sum < /data)" ] && echo "SAME $round" || echo "round $round failed"
done
for f in rx_errors tx_errors rx_crc_errors rx_frame_errors rx_length_errors; do
  [ "$(cat /sys/class/net/eth0/statistics/$f)" = 0 ] || echo "error counter $f is not 0"
done
dmesg | grep -i -e 'eth0.*error' -e 'virtio.*error' -e 'hung' -e 'timed out'
echo FINISHED
poweroff -f
`

// netHost is the host's side: a namespace with a tap, an address on it, and a service that sends
// back what it gets. progress tells of each part of that.
func netHost(t *testing.T) (tun *os.File, progress <-chan struct{}) {
	t.Helper()
	ns := nettest.Namespace(t)
	var l net.Listener
	if err := ns.Do(func() (err error) {
		if tun, err = network.OpenTun(); err != nil {
			return err
		}
		fd, err := unix.FcntlInt(tun.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		tap, err := network.NewTap(os.NewFile(uintptr(fd), "tun"), "test0")
		if err != nil {
			return err
		}
		tap.File.Close() // tun stays
		link, err := netlink.LinkByName("test0")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr("192.0.2.1/24")
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.AddrAdd(link, a), netlink.LinkSetUp(link)); err != nil {
			return err
		}
		l, err = net.Listen("tcp", "192.0.2.1:5000")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tun.Close() })
	told, served := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 256<<10)
			for {
				n, err := io.ReadFull(c, buf)
				if _, werr := c.Write(buf[:n]); werr != nil || err != nil {
					break
				}
				select {
				case told <- struct{}{}:
				default:
				}
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-served })
	return tun, told
}

// TestQEMUNetSurvivesKills: a guest under QEMU exchanges verified traffic with the host over a
// tap while the back end of its network device is killed and replaced: before the driver starts,
// and again and again with packets on their way. It sees pauses and nothing else.
func TestQEMUNetSurvivesKills(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest: needs a run without -short, as `make test` is")
	}
	tun, progress := netHost(t)
	g := newNetGuest(t, tun, netGuestInit)
	limit := time.NewTimer(3 * time.Minute)
	defer limit.Stop()
	same, kills, relayed, ended := 0, 0, g.relayed, g.ended
	for {
		select {
		case <-progress:
			g.replace()
			kills++
		case l := <-g.lines.c:
			t.Log(l)
			switch {
			case strings.HasPrefix(l, "INIT"), strings.HasPrefix(l, "ROUND"):
				for range 3 {
					g.replace()
					kills++
				}
			case strings.HasPrefix(l, "SAME"):
				same++
			case strings.Contains(l, "failed") || strings.Contains(strings.ToLower(l), "error"), strings.HasPrefix(l, "qemu-system"):
				t.Fatalf("the guest or QEMU says %q", l)
			case l == "FINISHED":
				if same != 6 {
					t.Errorf("%d rounds of 6 came back as they were sent", same)
				}
				g.finish()
				t.Logf("%d kills", kills)
				return
			}
		case err := <-relayed:
			g.relayed <- err
			if err != nil {
				t.Fatalf("relay: %v", err)
			}
			relayed = nil
		case <-ended:
			if ended = nil; g.err != nil {
				t.Fatalf("QEMU ended: %v", g.err)
			}
		case <-limit.C:
			t.Fatalf("not finished after %d kills and %d rounds", kills, same)
		}
	}
}

// netGuest is a guest under QEMU whose network device's back end can be replaced.
type netGuest struct {
	t       testing.TB
	tun     *os.File
	mem     *os.File
	front   *Frontend
	backEnd *exec.Cmd
	qemu    *exec.Cmd
	relayed chan error
	ended   chan struct{} // closed when QEMU has ended, with err
	err     error
	lines   *lines
}

func newNetGuest(t testing.TB, tun *os.File, init string) *netGuest {
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
	b := initramfs.New(root.Path("bin/busybox"), init)
	b.Modules(tree, "virtio_pci", "virtio_net")
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := b.WriteFile(initrd); err != nil {
		t.Fatal(err)
	}
	g := &netGuest{t: t, tun: tun, front: NewFrontend(2, virtio.NetQueueSize), relayed: make(chan error, 1), lines: newLines()}
	g.mem = memfd(t, guestMemory, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	st, err := g.mem.Stat()
	if err != nil {
		t.Fatal(err)
	}
	g.replace()
	t.Cleanup(func() { end(g.backEnd) })
	g.replace() // nothing has been set up yet
	l, door, err := Door(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer door.Close()
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.AcceptUnix()
		if err == nil {
			err = Relay(t.Context(), c, g.front, RelayOptions{Memory: Whitelist{st}, OwnConfig: true})
		}
		g.relayed <- err
	}()
	g.qemu = root.Command(t.Context(), "qemu-system-x86_64",
		"-L", root.Path("usr/share/seabios"), "-L", root.Path("usr/share/qemu"),
		"-accel", "tcg", "-cpu", "qemu64", "-machine", "q35,memory-backend=ram", "-nodefaults", "-display", "none", "-no-reboot",
		"-m", "256", "-object", fmt.Sprintf("memory-backend-file,id=ram,size=%d,mem-path=/proc/self/fd/3,share=on", guestMemory),
		"-chardev", "socket,id=net,path=/proc/self/fd/4", "-netdev", "vhost-user,id=net0,chardev=net",
		// Under TCG vhost-user-net of QEMU 7.2 takes KVM's interrupt routes to be there as soon as the
		// guest uses MSI-X, and crashes.
		"-device", fmt.Sprintf("virtio-net-pci,netdev=net0,mac=%s,disable-legacy=on,romfile=,vectors=0", net.HardwareAddr(testMAC[:])),
		"-serial", "stdio", "-kernel", kernel, "-initrd", initrd,
		"-append", debian.Cmdline+" panic=-1",
	)
	g.qemu.ExtraFiles = []*os.File{g.mem, door}
	g.qemu.Stdout, g.qemu.Stderr = g.lines, g.lines
	if err := g.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	g.ended = make(chan struct{})
	go func() {
		g.err = g.qemu.Wait()
		close(g.ended)
	}()
	t.Cleanup(func() {
		_ = g.qemu.Process.Kill()
		<-g.ended
	})
	return g
}

// replace kills the back end and starts the next one, and returns when that serves the guest.
func (g *netGuest) replace() {
	g.t.Helper()
	if g.backEnd != nil {
		end(g.backEnd)
	}
	own, theirs := socketpair(g.t)
	var started *os.File
	g.backEnd, started = spawnBackEnd(g.t, theirs, g.mem, netBackEnd, g.tun)
	started.Close()
	if _, err := g.front.Connect(own); err != nil {
		g.t.Fatal(err)
	}
}

// finish waits for the guest's power-off.
func (g *netGuest) finish() {
	g.t.Helper()
	if <-g.ended; g.err != nil {
		g.t.Errorf("QEMU: %v", g.err)
	}
	if err := <-g.relayed; err != nil {
		g.t.Errorf("relay: %v", err)
	}
	if err := g.front.Close(); err != nil {
		g.t.Error(err)
	}
}
