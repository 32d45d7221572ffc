package e2e

import (
	"bufio"
	"context"
	"io"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/peers"
)

// peerCmdline is the command line of every guest of the comparison: what [host.start] gives ours.
const peerCmdline = debian.Cmdline + " e2e=deaf " + benchCmdline

// A peerMonitor is another monitor that boots the same guest.
type peerMonitor struct {
	name    string
	command func(ctx context.Context, root *debian.Root, kernel, initrd string) (*exec.Cmd, error)
}

var peerMonitors = []peerMonitor{
	{"microvm", qemuPeer("microvm")},
	{"q35", qemuPeer("q35")},
	{"gokvm", gokvmPeer},
}

// qemuPeer is QEMU with no device but the machine's own and a serial port.
func qemuPeer(machine string) func(context.Context, *debian.Root, string, string) (*exec.Cmd, error) {
	return func(ctx context.Context, root *debian.Root, kernel, initrd string) (*exec.Cmd, error) {
		return root.Command(ctx, "qemu-system-x86_64",
			"-L", root.Path("usr/share/qemu"), "-L", root.Path("usr/share/seabios"),
			"-M", machine, "-enable-kvm", "-cpu", "host", "-nodefaults", "-no-user-config", "-display", "none",
			"-smp", "1", "-m", "256M", "-serial", "stdio",
			"-kernel", kernel, "-initrd", initrd, "-append", peerCmdline), nil
	}
}

// gokvmPeer needs parameters of its own: it has no ACPI tables and no calibrated timer.
func gokvmPeer(ctx context.Context, root *debian.Root, kernel, initrd string) (*exec.Cmd, error) {
	program, err := peers.Gokvm(root)
	if err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, program, "boot", "-k", kernel, "-i", initrd, "-m", "256M", "-c", "1",
		"-p", peerCmdline+" noapic noacpi notsc lapic tsc_early_khz=2000 pci=realloc=off"), nil
}

// prepare makes the peer's measurement: from the start of its process until its guest's kernel
// says that it runs the first program.
func (p peerMonitor) prepare(b *testing.B, h *host) func() time.Duration {
	b.Helper()
	kernel, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		b.Fatal(err)
	}
	image := initrd(b, h.cache, debian.Usual, false)
	return func() time.Duration {
		b.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 2*bootTime)
		defer cancel()
		c, err := p.command(ctx, h.cache, kernel, image)
		if err != nil {
			b.Fatal(err)
		}
		out, in := io.Pipe()
		c.Stdout, c.Stderr = in, in
		begin := time.Now()
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		var ending sync.WaitGroup
		ending.Go(func() { _ = c.Wait(); _ = in.Close() }) // ended by us, in the good case
		var last []string
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if l := lines.Text(); strings.Contains(l, "Run ") && strings.Contains(l, " as init process") {
				took := time.Since(begin)
				cancel()
				_, _ = io.Copy(io.Discard, out)
				ending.Wait()
				return took
			}
			last = append(last, lines.Text())
		}
		cancel()
		ending.Wait()
		b.Fatalf("%s: no first program within %v:\n%s", p.name, 2*bootTime, lastLines(strings.Join(last, "\n"), 20))
		return 0
	}
}
