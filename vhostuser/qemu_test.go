package vhostuser

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
)

// guestInit writes random data to the disk around the page cache, reads it back, and says how
// that went, in rounds.
const guestInit = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
echo "INIT before the driver"
for m in $(cat /mod/order); do insmod /mod/$m || echo "insmod $m failed"; done
for round in 1 2 3 4 5 6; do
  dd if=/dev/urandom of=/data bs=64k count=64 2>/dev/null
  echo "ROUND $round"
  dd if=/data of=/dev/vda bs=16k oflag=direct conv=fsync 2>/dev/null || echo "write failed"
  echo 3 > /proc/sys/vm/drop_caches
  got=$(dd if=/dev/vda bs=64k count=64 2>/dev/null | md5sum)
  [ "$got" = "$(md5sum < /data)" ] && echo "SAME $round"
done
dmesg | grep -i -e 'i/o error' -e 'blk_update'
echo FINISHED
poweroff -f
`

const guestMemory = 256 << 20

// TestQEMUGuestSurvivesKills: a real guest under QEMU with verified I/O on its way while its back
// end is killed and replaced, at any instant: before the driver starts, with requests in flight,
// and while a new one is being told. It sees pauses and nothing else.
func TestQEMUGuestSurvivesKills(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest: needs a run without -short, as `make test` is")
	}
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
	dir := t.TempDir()
	b := initramfs.New(root.Path("bin/busybox"), guestInit)
	b.Modules(tree, "virtio_pci", "virtio_blk")
	initrd, path := filepath.Join(dir, "initrd"), filepath.Join(dir, "disk")
	if err := b.WriteFile(initrd); err != nil {
		t.Fatal(err)
	}
	create(t, path, 8<<20)
	mem := memfd(t, guestMemory, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	st, err := mem.Stat()
	if err != nil {
		t.Fatal(err)
	}

	front := NewFrontend(1, 256)
	var backEnd *exec.Cmd
	replace := func() {
		if backEnd != nil {
			end(backEnd)
		}
		own, theirs := socketpair(t)
		var started *os.File
		backEnd, started = spawnBackEnd(t, theirs, mem, path)
		started.Close()
		if _, err := front.Connect(own); err != nil {
			t.Fatal(err)
		}
	}
	replace()
	defer func() { end(backEnd) }()
	replace() // nothing has been set up yet

	own, theirs := socketpair(t)
	relayed := make(chan error, 1)
	go func() { relayed <- Relay(t.Context(), own, front, RelayOptions{Memory: Whitelist{st}}) }()
	tf, err := theirs.File()
	if err != nil {
		t.Fatal(err)
	}
	defer tf.Close()
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	qemu := root.Command(t.Context(), "qemu-system-x86_64",
		"-L", root.Path("usr/share/seabios"), "-L", root.Path("usr/share/qemu"),
		"-accel", "tcg", "-cpu", "qemu64", "-machine", "q35,memory-backend=ram", "-nodefaults", "-display", "none", "-no-reboot",
		"-m", "256", "-object", fmt.Sprintf("memory-backend-file,id=ram,size=%d,mem-path=/proc/self/fd/3,share=on", guestMemory),
		"-chardev", "socket,id=disk,fd=4", "-device", "vhost-user-blk-pci,chardev=disk,num-queues=1,disable-legacy=on",
		"-serial", "stdio", "-kernel", kernel, "-initrd", initrd,
		"-append", debian.Cmdline+" panic=-1",
	)
	qemu.ExtraFiles = []*os.File{mem, tf}
	lines := newLines()
	qemu.Stdout, qemu.Stderr = lines, lines
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	tf.Close()
	ended := false
	defer func() {
		if !ended {
			end(qemu)
		}
	}()
	limit := time.NewTimer(3 * time.Minute)
	defer limit.Stop()
	same, kills := 0, 0
	for {
		select {
		case l := <-lines.c:
			t.Log(l)
			switch {
			case strings.HasPrefix(l, "INIT"), strings.HasPrefix(l, "ROUND"):
				for range 5 { // one after the other, with requests in flight
					replace()
					kills++
				}
			case strings.HasPrefix(l, "SAME"):
				same++
			case strings.Contains(l, "failed") || strings.Contains(strings.ToLower(l), "error"):
				t.Errorf("the guest or QEMU says %q", l)
			case l == "FINISHED":
				if same != 6 {
					t.Errorf("%d rounds of 6 read back what was written", same)
				}
				ended = true
				if err := qemu.Wait(); err != nil {
					t.Errorf("QEMU: %v", err)
				}
				if err := <-relayed; err != nil {
					t.Errorf("relay: %v", err)
				}
				if err := front.Close(); err != nil {
					t.Error(err)
				}
				return
			}
		case <-limit.C:
			t.Fatalf("not finished after %d kills and %d rounds", kills, same)
		}
	}
}

func end(c *exec.Cmd) {
	_ = c.Process.Kill()
	_ = c.Wait()
}

// lines splits what is written into lines.
type lines struct {
	c    chan string
	part []byte
}

func newLines() *lines { return &lines{c: make(chan string, 1024)} }

var _ io.Writer = (*lines)(nil)

func (l *lines) Write(p []byte) (int, error) {
	l.part = append(l.part, p...)
	for {
		line, rest, ok := bytes.Cut(l.part, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		l.c <- strings.TrimSpace(string(line))
		l.part = rest
	}
}
