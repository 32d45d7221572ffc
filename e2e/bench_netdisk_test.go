package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/network/nettest"
	"redoubt.dev/redoubt/qemu"
)

// Of a round of BenchmarkNetToDisk.
const (
	netToDiskBytes = 32 << 20
	netToDiskTime  = 2 * time.Minute
)

// A sink is a guest that writes what comes over the network to its disk.
type sink struct {
	outside *network.Namespace // from where it is reached
	disk    string             // its image
	all     []float64          // bytes a second of each round
}

// BenchmarkNetToDisk: the ratio of a guest's throughput from the network to its disk, flushed at the end,
// through NetBack, the filter and BlkBack to that of the same guest under QEMU alone, with a tap
// and an image of its own. Both guests run; rounds take turns. The peer is QEMU as it comes, whose guest takes
// TCP segments of 64 KiB as ours does, and QEMU whose guest takes frames of 1,500 bytes.
func BenchmarkNetToDisk(b *testing.B) {
	if os.Getenv(lab.InLab) != "" {
		b.Skip("QEMU's guests are for the host, where `make bench` runs this")
	}
	b.Run("qemu", func(b *testing.B) { netToDisk(b, "") })
	b.Run("qemu-frames", func(b *testing.B) {
		netToDisk(b, ",guest_tso4=off,guest_tso6=off,guest_ufo=off,guest_ecn=off,mrg_rxbuf=off")
	})
}

func netToDisk(b *testing.B, features string) {
	name, outside := newUplink(b)
	h := newHost(b, "--uplink", name+":10", "--reset", "blkback=off,netback=off")
	ours := &sink{outside: outside, disk: h.path("ours.img")}
	h.must("disk", "create", ours.disk, "64MiB")
	h.start(start{
		name: "sink", emulator: "qemu", what: "sink", withGuest: true,
		args: []string{"--no-tpm", "--disk", ours.disk, "--nic", "vlan=10,address=192.0.2.1"},
	})
	h.await("sink", "READY", 2*bootTime)
	peer := qemuSink(b, h, features)
	for _, s := range []*sink{ours, peer} { // not counted: it finds no page and no neighbour
		s.round(b)
		s.all = nil
	}
	rounds := 0
	for b.Loop() || rounds < 5 {
		rounds++
		ours.round(b)
		peer.round(b)
	}
	b.Logf("ours %.0f, QEMU's own %.0f bytes/s", ours.all, peer.all)
	b.ReportMetric(middle(ours.all)/middle(peer.all), "ratio")
	b.ReportMetric(middle(ours.all)/1e6, "MB/s")
	b.ReportMetric(middle(peer.all)/1e6, "MB/s-peer")
	b.ReportMetric(0, "ns/op")
}

func middle(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}

// round sends bytes that no round had before, waits until the guest says that they are on its disk, and
// looks whether they are.
func (s *sink) round(b *testing.B) {
	b.Helper()
	data := make([]byte, 8+netToDiskBytes)
	binary.LittleEndian.PutUint64(data, netToDiskBytes)
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], rand.Uint64())
	_, _ = rand.NewChaCha8(seed).Read(data[8:]) // never fails
	var c net.Conn
	err := s.outside.Do(func() (err error) { c, err = net.DialTimeout("tcp", "192.0.2.1:7001", time.Minute); return err })
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	begin := time.Now()
	if err := c.SetDeadline(begin.Add(netToDiskTime)); err != nil {
		b.Fatal(err)
	}
	var answer [8]byte
	if _, err = c.Write(data); err == nil {
		_, err = io.ReadFull(c, answer[:])
	}
	took := time.Since(begin)
	if err != nil || !bytes.Equal(answer[:], data[:8]) {
		b.Fatalf("%x, %v", answer, err)
	}
	s.all = append(s.all, netToDiskBytes/took.Seconds())
	f, err := os.Open(s.disk)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	there := make([]byte, netToDiskBytes)
	if _, err := io.ReadFull(f, there); err != nil || !bytes.Equal(there, data[8:]) {
		b.Fatalf("the disk does not hold what was sent: %v", err)
	}
}

// qemuSink is the same guest under QEMU, with the same machine but for its devices' back ends; features are
// options of its network device.
func qemuSink(b *testing.B, h *host, features string) *sink {
	b.Helper()
	b.Setenv("REDOUBT_TOOLS", h.cache.Tools())
	s := &sink{outside: nettest.Namespace(b), disk: h.path("peer.img")}
	h.must("disk", "create", s.disk, "64MiB")
	const tapName = "peer"
	var tap *network.Tap
	err := s.outside.Do(func() error {
		tun, err := network.OpenTun()
		if err != nil {
			return err
		}
		if tap, err = network.NewTap(tun, tapName); err != nil {
			return err
		}
		l, err := netlink.LinkByName(tapName)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr("192.0.2.100/24")
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
	})
	if err != nil {
		b.Fatal(err)
	}
	kernel, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		b.Fatal(err)
	}
	ram, err := unix.MemfdCreate("peer", unix.MFD_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	memory := os.NewFile(uintptr(ram), "peer")
	if err := memory.Truncate(256 << 20); err != nil {
		b.Fatal(err)
	}
	console, itsConsole := consolePair(b)
	_, itsQMP := consolePair(b)
	files := []*os.File{memory, itsConsole, itsQMP, tap.File}
	for path, mode := range map[string]int{kernel: os.O_RDONLY, initrd(b, h.cache, debian.Usual, true): os.O_RDONLY, s.disk: os.O_RDWR} {
		f, err := os.OpenFile(path, mode, 0)
		if err != nil {
			b.Fatal(err)
		}
		files = append(files, f)
	}
	fd := func(path string) int {
		return 3 + slices.IndexFunc(files, func(f *os.File) bool { return f.Name() == path })
	}
	accel, _ := qemu.ChooseAccel()
	args, err := qemu.Args(qemu.Config{
		Name: "peer", Memory: 256 << 20, CPUs: 1, Accel: accel, TPM: qemu.NoTPM, CommandLine: "console=ttyS0 quiet e2e=sink",
	}, qemu.FDs{
		RAM: 3, Console: 4, QMP: 5, Kernel: fd(kernel), Initrd: fd(initrd(b, h.cache, debian.Usual, true)), Disks: []qemu.DiskFD{{FD: fd(s.disk)}},
	}, qemu.DataDirs()...)
	if err != nil {
		b.Fatal(err)
	}
	args = append(args, "-netdev", "tap,id=nic0,fd=6", "-device", "virtio-net-pci,netdev=nic0,mac=02:00:00:00:00:77,rx_queue_size=256,disable-legacy=on,romfile="+features)
	ctx, cancel := context.WithCancel(context.Background())
	c := h.cache.Command(ctx, qemu.Program, args...)
	var said strings.Builder
	c.ExtraFiles, c.Stdout, c.Stderr = files, &said, &said
	err = c.Start()
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		cancel()
		_ = c.Wait()
	})
	late := time.AfterFunc(2*bootTime, func() { _ = console.Close() })
	defer late.Stop()
	lines := bufio.NewScanner(console)
	for lines.Scan() {
		if strings.TrimSpace(lines.Text()) == "READY" {
			b.Cleanup(drained(console))
			return s
		}
	}
	cancel()
	_ = c.Wait() // it has said why
	b.Fatalf("the peer's guest is not ready: %v: %s", lines.Err(), said.String())
	return nil
}

// drained reads a console so that its guest never waits for it; what is returned waits for its end.
func drained(console net.Conn) func() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, console)
	}()
	return func() {
		console.Close()
		<-done
	}
}
