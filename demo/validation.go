package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"redoubt.dev/redoubt/lab/initramfs"
)

// shop is a guest whose root file system is its disk, which has a baseline. The guest that works on its disk is its neighbour.
const (
	shop          = "shop"
	shopKey       = "shop.key"
	neighbour     = "192.0.2.1"
	vlan          = "nics:\n  - vlan: 10\n"
	changedFile   = "/usr/bin/backup"
	shopPing      = "ping -c 2 -W 2 " + neighbour + " | grep loss"
	shopIntrusion = "echo 'nc -l -p 23 -e sh &' >>" + changedFile + "; sync"
	shopRepair    = "sed -i '$d' " + changedFile + "; sync"
)

// shopBoot is the initrd's init: what is on the disk goes on.
const shopBoot = `#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
for m in $(cat /mod/order); do insmod /mod/$m; done
mkdir /disk
mount -t ext4 /dev/vda /disk
mount -t devtmpfs dev /disk/dev
umount /proc
exec switch_root /disk /sbin/init
`

// shopInit is the disk's: it does what its console says, one line at a time.
const shopInit = `#!/bin/sh
export PATH=/usr/bin:/bin
exec </dev/console >/dev/console 2>&1
mount -t proc proc /proc
dmesg -n 1
stty -echo
ip link set eth0 up
ip addr add 192.0.2.2/24 dev eth0
echo "DEMO READY"
n=0
while read line; do eval "$line"; n=$((n+1)); echo "DEMO did $n"; done
`

// shopDisk makes the disk: Debian's busybox and what a small system has.
func (d *demo) shopDisk(ctx context.Context) error {
	tree := d.path("tree")
	for _, dir := range []string{"bin", "sbin", "usr/bin", "etc", "dev", "proc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o755); err != nil { //nolint:gosec // a guest's
			return err
		}
	}
	busybox, err := os.ReadFile(d.cache.Path("bin/busybox"))
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"bin/busybox": string(busybox), "sbin/init": shopInit, "usr/bin/backup": "#!/bin/sh\ntar -c /etc >/tmp/etc.tar\n",
		"usr/bin/report": "#!/bin/sh\nuptime\n", "etc/passwd": "root:x:0:0:root:/:/bin/sh\n", "etc/shadow": "root:*:19000::::::\n",
	} {
		if err := os.WriteFile(filepath.Join(tree, name), []byte(text), 0o755); err != nil { //nolint:gosec // programs, of a guest's
			return err
		}
	}
	for _, applet := range []string{"sh", "mount", "dmesg", "stty", "ip", "ping", "grep", "sed", "sync"} {
		if err := os.Symlink("busybox", filepath.Join(tree, "bin", applet)); err != nil {
			return err
		}
	}
	out, err := d.cache.Command(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, d.path(shop+".img"), "32M").CombinedOutput()
	if err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, out)
	}
	return nil
}

// startShop starts the guest, which boots while other steps go on.
func (d *demo) startShop(ctx context.Context) error {
	if err := d.shopDisk(ctx); err != nil {
		return err
	}
	modules, err := d.cache.Modules(kernel)
	if err != nil {
		return err
	}
	b := initramfs.New(d.cache.Path("bin/busybox"), shopBoot)
	b.Modules(modules, "virtio_pci", "virtio_blk", "virtio_net", "ext4")
	if err := b.WriteFile(d.path("initrd-" + shop)); err != nil {
		return err
	}
	public, err := d.redoubt(ctx, "baseline", "key", shopKey)
	if err != nil {
		return err
	}
	text, err := d.writeSpec(shop, kernel, cmdline+" quiet")
	if err != nil {
		return err
	}
	d.shopSpec = "disks:\n  - path: " + shop + ".img\n" + vlan +
		"validation:\n  signers: [" + strings.TrimSpace(public) + "]\n  respond:\n    critical: [quarantine]\n"
	text = strings.Replace(text, "initrd: initrd", "initrd: initrd-"+shop, 1) + d.shopSpec
	if err := os.WriteFile(d.path(shop+".yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	if _, err := d.redoubt(ctx, "run", shop+".yaml"); err != nil {
		return err
	}
	d.follow(ctx, shop)
	return nil
}

// validated changes a file in the guest's /usr/bin, and has that found and followed.
func (d *demo) validated(ctx context.Context) error {
	if _, err := d.await(shop); err != nil {
		return err
	}
	d.say("  $ redoubt baseline key %s", shopKey)
	d.say("  $ redoubt run %s.yaml    # started with the guest that works on its disk, its neighbour", shop)
	d.quote(d.shopSpec)
	out, err := d.run(ctx, "baseline", "create", shop, "--key", shopKey)
	d.quote(out)
	if err != nil {
		return err
	}
	d.say("  $ redoubt console %s", shop)
	t, err := d.terminal(ctx, shop)
	if err != nil {
		return err
	}
	defer t.end()
	if err := t.reaches(true); err != nil {
		return err
	}
	if _, err := t.types(shopIntrusion); err != nil {
		return err
	}
	found, err := d.deviates(ctx)
	if err != nil {
		return err
	}
	if !strings.Contains(found, changedFile) || !strings.Contains(found, "followed by: quarantine") {
		return errors.New("the file was not found, or nothing followed")
	}
	if err := t.reaches(false); err != nil {
		return err
	}
	if _, err := t.types(shopRepair); err != nil {
		return err
	}
	out, err = d.run(ctx, "validate", shop)
	d.quote(out)
	if err != nil {
		return err
	}
	if out, err = d.run(ctx, "release", shop, "--reason", "restored"); err != nil {
		d.quote(out)
		return err
	}
	return t.reaches(true)
}

// deviates shows a validation that must find something.
func (d *demo) deviates(ctx context.Context) (string, error) {
	out, err := d.run(ctx, "validate", shop)
	d.quote(out)
	var failed *statusError
	switch {
	case err == nil:
		return "", errors.New("nothing was found")
	case !errors.As(err, &failed) || failed.status != 1 || failed.text != "":
		return "", err
	}
	return out, nil
}

// A terminal types into a guest's console, which says when a line is done.
type terminal struct {
	d    *demo
	name string
	in   io.Writer
	out  *bufio.Scanner
	did  int
	end  func()
}

func (d *demo) terminal(ctx context.Context, name string) (*terminal, error) {
	typing, cancel := context.WithCancel(ctx)
	c := d.command(typing, "console", name)
	in, err := c.StdinPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return &terminal{d: d, name: name, in: in, out: bufio.NewScanner(out), end: func() { cancel(); _ = c.Wait() }}, nil
}

// types types a line and shows it with what the console says to it.
func (t *terminal) types(line string) (string, error) {
	t.did++
	t.d.quote(t.name + "# " + line)
	if _, err := io.WriteString(t.in, line+"\n"); err != nil {
		return "", err
	}
	var said strings.Builder
	for t.out.Scan() {
		l := strings.TrimSpace(t.out.Text())
		if l == fmt.Sprintf("%sdid %d", mark, t.did) {
			return said.String(), nil
		}
		if l != "" && !strings.HasPrefix(l, mark) && !strings.HasPrefix(l, "[") { // of before; the kernel's
			t.d.quote(l)
			fmt.Fprintln(&said, l)
		}
	}
	return "", errors.New("the console ended")
}

// reaches has the guest ask its neighbour, which must be heard or not.
func (t *terminal) reaches(must bool) error {
	said, err := t.types(shopPing)
	if err != nil {
		return err
	}
	if !strings.Contains(said, "packet loss") || strings.Contains(said, "100% packet loss") == must {
		return fmt.Errorf("the neighbour should be reached: %v", must)
	}
	return nil
}
