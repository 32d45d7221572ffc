// Package introspecttest gives tests a real guest to read: Debian's kernel under QEMU, which says of itself what is to
// be found.
package introspecttest

import (
	"bufio"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"redoubt.dev/redoubt/introspect/image"
	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/layout"
	"redoubt.dev/redoubt/introspect/symbols"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/qemu"
)

// Memory is how much a guest has, in bytes.
const Memory = 256 << 20

// A Guest runs until the test ends.
type Guest struct {
	Packed []byte // its kernel's image
	Image  *image.Image
	Table  *symbols.Table
	Layout *layout.Layout
	Memory *os.File
	Said   map[string][]string // by its script, a line each, behind a line "== NAME"
}

const guestInit = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc p /proc
mount -t devtmpfs d /dev
mount -t sysfs s /sys
mount -t securityfs s /sys/kernel/security
exec </dev/console >/dev/console 2>&1
for m in $(cat /mod/order); do insmod /mod/$m; done
echo BEGIN
`

// Boot starts a guest of a kernel of Debian's with modules, and returns when its script has ended.
func Boot(t *testing.T, name, cmdline, script string, modules ...string) *Guest {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	root, err := debian.Open()
	must(err)
	t.Setenv("REDOUBT_TOOLS", root.Tools())
	g := &Guest{Said: map[string][]string{}}
	path, err := root.Vmlinuz(name)
	must(err)
	g.Packed, err = os.ReadFile(path)
	must(err)
	g.Image, err = image.Unpack(g.Packed)
	must(err)
	g.Layout, g.Table, err = layout.Read(g.Image)
	must(err)
	vmlinuz, err := os.Open(path)
	must(err)
	tree, err := root.Modules(name)
	must(err)
	b := initramfs.New(root.Path("bin/busybox"), guestInit+script+"\necho END\nwhile :; do sleep 1000; done\n")
	b.Modules(tree, modules...)
	initrd := filepath.Join(t.TempDir(), "initrd")
	must(b.WriteFile(initrd))
	packed, err := os.Open(initrd)
	must(err)
	g.Memory, err = memfd.New("guest memory", Memory)
	must(err)
	t.Cleanup(func() { g.Memory.Close() })
	given, err := ipc.Duplicate(g.Memory)
	must(err)
	ours, theirs, err := ipc.Streams("console")
	must(err)
	console, err := net.FileConn(ours)
	must(err)
	ours.Close()
	m := qemu.New(qemu.Config{Name: "introspected", Memory: Memory, CPUs: 1, Accel: qemu.TCG, TPM: qemu.NoTPM, CommandLine: "console=ttyS0 quiet " + cmdline}, qemu.Hooks{})
	ctx, cancel := context.WithCancel(context.Background())
	must(m.Start(ctx, qemu.Files{RAM: given[0], Kernel: vmlinuz, Initrd: packed, Console: theirs}, nil))
	t.Cleanup(func() {
		cancel()
		_, _ = m.Wait()
		console.Close()
	})
	begun, about := false, ""
	lines := bufio.NewScanner(console)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		switch l := strings.TrimSpace(lines.Text()); {
		case l == "BEGIN":
			begun = true
		case l == "END":
			return g
		case begun && strings.HasPrefix(l, "== "):
			about = l[3:]
		case begun:
			g.Said[about] = append(g.Said[about], l)
		}
	}
	t.Fatalf("the console ended after %q", g.Said)
	return nil
}

// Find finds its kernel.
func (g *Guest) Find(t *testing.T) *kernel.Kernel {
	t.Helper()
	k, err := kernel.Find(g.Memory, Memory, g.Layout)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
