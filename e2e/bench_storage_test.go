package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
)

// second is what a guest's workload did in one.
type second struct {
	bytes   int64
	longest time.Duration // of its requests
}

// measure reads the lines of a workload (see e2e/guest) from a console.
func measure(b *testing.B, lines *bufio.Scanner, seconds int) []second {
	b.Helper()
	var all []second
	for lines.Scan() {
		l := strings.TrimSpace(lines.Text())
		if strings.Contains(l, "DISK-ERROR") || strings.Contains(l, "GUEST FAILED") {
			b.Fatal(l)
		}
		f := strings.Fields(l)
		if len(f) != 4 || f[0] != "IO" {
			continue
		}
		n, err := strconv.ParseInt(f[2], 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		us, err := strconv.ParseInt(f[3], 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		if all = append(all, second{n, time.Duration(us) * time.Microsecond}); len(all) == seconds {
			return all
		}
	}
	b.Fatalf("the console ended after %d seconds of the workload", len(all))
	return nil
}

func throughput(all []second) float64 {
	var sum int64
	for _, s := range all {
		sum += s.bytes
	}
	return float64(sum) / float64(len(all))
}

// underLoad starts a guest of ours with a workload, whose BlkBack is replaced only when asked, and
// returns its console.
func underLoad(b *testing.B, workload string) (*host, *bufio.Scanner) {
	b.Helper()
	h := newHost(b, "--reset", "blkback=off")
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "64MiB")
	h.start(start{name: "load", emulator: "qemu", what: "io", cmdline: "io=" + workload, withGuest: true, args: []string{"--disk", disk}})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	out, end := h.stream(ctx, "logs", "load", "--follow")
	b.Cleanup(func() { cancel(); end() })
	console := bufio.NewScanner(out)
	measure(b, console, 1)
	return h, console
}

// resetEvery replaces the guest's BlkBack again and again until it is stopped.
func (h *host) resetEvery(b *testing.B, every time.Duration) (stop func()) {
	b.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: h.path("run", services.AdminSocket), Net: "unixpacket"})
	if err != nil {
		b.Fatal(err)
	}
	f, err := c.File()
	if err != nil {
		b.Fatal(err)
	}
	_ = c.Close()
	conn, err := ipc.FromFile(f)
	if err != nil {
		b.Fatal(err)
	}
	peer := rpc.New(conn, nil)
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { _ = peer.Run(context.Background()) })
	all.Go(func() {
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-t.C:
			case <-ctx.Done():
				_ = peer.Close()
				return
			}
			var done protocol.ResetDone
			if _, err := peer.Call(context.Background(), protocol.MethodReset, protocol.Reset{Service: "blkback"}, &done); err != nil || done.Replaced != 1 {
				b.Errorf("reset: %d, %v", done.Replaced, err)
			}
		}
	})
	return func() { cancel(); all.Wait() }
}

// BenchmarkResetBlkBack: how long a guest's disk is away when BlkBack is replaced, as the guest sees
// it: the median of its longest request in each second with a replacement; and what throughput is
// left when that happens every so often, against the same guest's seconds without, in turns.
func BenchmarkResetBlkBack(b *testing.B) {
	b.Run("downtime", func(b *testing.B) {
		h, console := underLoad(b, "single")
		quiet := longest(measure(b, console, 10))
		stop := h.resetEvery(b, time.Second)
		measure(b, console, 1)
		with := longest(measure(b, console, 20))
		stop()
		b.Logf("longest requests %v, without resets %v", with, quiet)
		b.ReportMetric(float64(median(with).Microseconds())/1000, "ms-downtime")
		b.ReportMetric(0, "ns/op")
	})
	for _, every := range []int{1, 2, 5, 10} {
		b.Run(fmt.Sprintf("every-%ds", every), func(b *testing.B) {
			h, console := underLoad(b, "randwrite")
			var ratios []float64
			for range 3 {
				before := throughput(measure(b, console, 2*every))
				stop := h.resetEvery(b, time.Duration(every)*time.Second)
				with := throughput(measure(b, console, 2*every))
				stop()
				after := throughput(measure(b, console, 2*every))
				ratios = append(ratios, 2*with/(before+after))
			}
			slices.Sort(ratios)
			b.Logf("ratios %.3f", ratios)
			b.ReportMetric(ratios[1], "throughput-ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func longest(all []second) []time.Duration {
	var out []time.Duration
	for _, s := range all {
		out = append(out, s.longest)
	}
	slices.Sort(out)
	return out
}

// BenchmarkBlkBack: the ratio of a guest's throughput on a disk that BlkBack serves to that on the
// same image which QEMU serves itself.
func BenchmarkBlkBack(b *testing.B) {
	for _, w := range []string{"randread", "randwrite", "seqread", "seqwrite"} {
		b.Run(w, func(b *testing.B) {
			var ours, peer []float64
			for range 3 {
				h, console := underLoad(b, w)
				ours = append(ours, throughput(measure(b, console, 6)))
				h.must("stop", "load", "--grace", "0s")
				peer = append(peer, throughput(qemuUnderLoad(b, w, 6)))
			}
			slices.Sort(ours)
			slices.Sort(peer)
			b.Logf("ours %.0f, QEMU's own %.0f bytes/s", ours, peer)
			b.ReportMetric(ours[1]/peer[1], "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// qemuUnderLoad runs a workload in the same guest under QEMU with a disk of its own.
func qemuUnderLoad(b *testing.B, workload string, seconds int) []second {
	b.Helper()
	h := newDownHost(b)
	b.Setenv("REDOUBT_TOOLS", h.cache.Tools())
	disk := h.path("disk.img")
	h.must("disk", "create", disk, "64MiB")
	vmlinuz, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		b.Fatal(err)
	}
	var files qemu.Files
	for _, f := range []struct {
		to   **os.File
		path string
		mode int
	}{{&files.Kernel, vmlinuz, os.O_RDONLY}, {&files.Initrd, initrd(b, h.cache, debian.Usual, true), os.O_RDONLY}} {
		if *f.to, err = os.OpenFile(f.path, f.mode, 0); err != nil {
			b.Fatal(err)
		}
	}
	image, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	files.Disks = []qemu.Disk{{File: image}}
	console, theirs := consolePair(b)
	files.Console = theirs
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	m := qemu.New(qemu.Config{
		Name: "peer", Memory: 256 << 20, CPUs: 1, TPM: qemu.NoTPM,
		CommandLine: "console=ttyS0 quiet e2e=io io=" + workload,
	}, qemu.Hooks{})
	if err := m.Start(ctx, files, nil); err != nil {
		b.Fatal(err)
	}
	lines := bufio.NewScanner(console)
	measure(b, lines, 1)
	all := measure(b, lines, seconds)
	cancel()
	_, _ = m.Wait()
	return all
}

// consolePair is a console: our end, and the emulator's.
func consolePair(b *testing.B) (net.Conn, *os.File) {
	b.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	own := os.NewFile(uintptr(fds[0]), "console")
	defer own.Close()
	c, err := net.FileConn(own)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return c, os.NewFile(uintptr(fds[1]), "console")
}
