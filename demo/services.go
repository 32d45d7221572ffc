package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/initramfs"
	"redoubt.dev/redoubt/sandbox/attack"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/matrix"
)

// attacks tries every attack in the sandbox of every service, and without one.
func (d *demo) attacks(ctx context.Context) error {
	// The next steps' guests boot meanwhile.
	if err := d.startStored(ctx); err != nil {
		return err
	}
	if err := d.startShop(ctx); err != nil {
		return err
	}
	// The sandboxes of QEMU and swtpm are made of these.
	if err := os.Setenv("REDOUBT_TOOLS", d.cache.Tools()); err != nil {
		return err
	}
	dir := d.path("victim")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	field, err := matrix.New(d.probe, dir)
	if err != nil {
		return err
	}
	err = d.tryAll(ctx, field)
	return errors.Join(err, field.Close())
}

func (d *demo) tryAll(ctx context.Context, field *matrix.Field) error {
	all := len(attack.All)
	var wrong []string
	denied, declared := 0, 0
	d.quote(fmt.Sprintf("%-12s %-8s %s", "service", "denied", "declared"))
	for i := range services.Table {
		s := &services.Table[i]
		state, err := os.MkdirTemp(d.dir, "state-")
		if err != nil {
			return err
		}
		// Where nothing at all works, the failure of an attack says nothing.
		if r, err := field.Inside(s, state, attack.Nothing); err != nil || !r.Succeeded {
			return fmt.Errorf("the sandbox of %s holds no process: %s %w", s.Name, r.Text, err)
		}
		stopped, may := 0, ""
		for _, a := range attack.All {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			r, err := field.Inside(s, state, a)
			why := matrix.Declared(s.Name, a.Name)
			switch {
			case err != nil:
				return fmt.Errorf("%s: %s: %w", s.Name, a.Name, err)
			case r.Succeeded != (why != ""):
				wrong = append(wrong, fmt.Sprintf("%s: %s: %s", s.Name, a.Name, r.Text))
			case why != "":
				declared++
				may = fmt.Sprintf("%s: %s", a.Name, why)
			default:
				stopped++
			}
		}
		denied += stopped
		d.quote(strings.TrimSpace(fmt.Sprintf("%-12s %-8s %s", s.Name, fmt.Sprintf("%d/%d", stopped, all), may)))
	}
	succeeded, unavailable := 0, 0
	for _, a := range attack.All {
		switch r := field.Outside(a); {
		case r.Succeeded:
			succeeded++
		case r.Unavailable:
			unavailable++
		default:
			wrong = append(wrong, fmt.Sprintf("without a sandbox: %s: %s", a.Name, r.Text))
		}
	}
	d.say("  %d attacks × %d services: %d denied, %d declared; without a sandbox %d of %d succeed, %d need what this kernel lacks",
		all, len(services.Table), denied, declared, succeeded, all, unavailable)
	if len(wrong) > 0 {
		return fmt.Errorf("not as it should be: %s", strings.Join(wrong, "; "))
	}
	return nil
}

// storedInit waits for a line and then writes to the guest's disk, reads back and compares, without end, and prints each second
// how much was done and what the longest request took.
const storedInit = `#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
exec </dev/console >/dev/console 2>&1
dmesg -n 1
for m in $(cat /mod/order); do insmod /mod/$m; done
ip link set eth0 up
ip addr add 192.0.2.1/24 dev eth0
echo "DEMO READY"
read go
/bin/guest io verified /dev/vda
poweroff -f
`

func (d *demo) startStored(ctx context.Context) error {
	modules, err := d.cache.Modules(kernel)
	if err != nil {
		return err
	}
	b := initramfs.New(d.cache.Path("bin/busybox"), storedInit)
	b.Modules(modules, "virtio_pci", "virtio_blk", "virtio_net")
	b.HostFile(d.guest, "bin/guest")
	if err := b.WriteFile(d.path("initrd-" + stored)); err != nil {
		return err
	}
	text, err := d.writeSpec(stored, kernel, cmdline)
	if err != nil {
		return err
	}
	text = strings.Replace(text, "initrd: initrd", "initrd: initrd-"+stored, 1) + "disks:\n  - path: disk.img\n" + vlan
	if err := os.WriteFile(d.path(stored+".yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	for _, args := range [][]string{{"disk", "create", "disk.img", "64MiB"}, {"run", stored + ".yaml"}} {
		if _, err := d.run(ctx, args...); err != nil {
			return err
		}
	}
	d.follow(ctx, stored)
	return nil
}

const (
	unharmedFor = 5               // seconds of the guest's that are taken for comparison
	harms       = 10              // kills and replacements, in turns, one a second
	pauseBound  = 5 * time.Second // more would be no pause but a disk that is gone
)

// load kills the guest's BlkBack, and has it replaced in good order, in turns.
func (d *demo) load(ctx context.Context) error {
	console, end, err := d.lines(ctx, "logs", stored, "--follow")
	if err != nil {
		return err
	}
	defer end()
	events, done, err := d.lines(ctx, "events", stored, "--follow", "--json")
	if err != nil {
		return err
	}
	defer done()
	var unharmed, harmed ioSeconds
	if err := d.begins(ctx, console); err != nil {
		return err
	}
	if err := unharmed.read(console, unharmedFor); err != nil {
		return err
	}
	// What follows is a second's wait again and again: the guest of a later step boots meanwhile.
	if err := d.infect(ctx, ""); err != nil {
		return err
	}
	for i := range harms {
		if i%2 == 0 {
			err = d.killBlkBack(ctx)
		} else {
			_, err = d.run(ctx, "reset", "blkback", stored)
		}
		if err == nil {
			err = replaced(events)
		}
		if err == nil {
			err = harmed.read(console, 1)
		}
		if err != nil {
			return err
		}
	}
	// What the last of them did is told with the second after it.
	if err := harmed.read(console, 1); err != nil {
		return err
	}
	// The next step kills the Builder, with which the stream of a console ends.
	if _, err := d.await(rootkit); err != nil {
		return err
	}
	g, err := d.show(ctx, stored)
	if err != nil {
		return err
	}
	d.quote(fmt.Sprintf("unharmed:        %5d MiB written and verified in %2d s, longest pause %v", unharmed.bytes>>20, unharmed.seconds, unharmed.longest))
	d.quote(fmt.Sprintf("%2d × replaced:   %5d MiB written and verified in %2d s, longest pause %v, no error", harms, harmed.bytes>>20, harmed.seconds, harmed.longest))
	switch {
	case g.State != "running":
		return fmt.Errorf("the guest is %s: %s", g.State, g.Reason)
	case harmed.longest > pauseBound:
		return fmt.Errorf("a pause of %v", harmed.longest)
	}
	return nil
}

// begins has the guest begin its work, and waits for its first second.
func (d *demo) begins(ctx context.Context, console *bufio.Scanner) error {
	if _, err := d.await(stored); err != nil {
		return err
	}
	t, err := d.terminal(ctx, stored)
	if err != nil {
		return err
	}
	defer t.end()
	if _, err := io.WriteString(t.in, "go\n"); err != nil {
		return err
	}
	return new(ioSeconds).read(console, 1)
}

// replaced waits for the guest's next event of a new BlkBack.
func replaced(events *bufio.Scanner) error {
	for events.Scan() {
		var e struct {
			Kind string `json:"kind"`
		}
		if err := json.Unmarshal(events.Bytes(), &e); err != nil {
			return err
		}
		if e.Kind == "storage" {
			return nil
		}
	}
	return errors.New("the guest's events ended")
}

// lines are what a command prints that goes on, as it comes; end ends that.
func (d *demo) lines(ctx context.Context, args ...string) (all *bufio.Scanner, end func(), err error) {
	following, cancel := context.WithCancel(ctx)
	c := d.command(following, args...)
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		cancel()
		return nil, nil, err
	}
	return bufio.NewScanner(out), func() { cancel(); _ = c.Wait() }, nil
}

// A listed process is one that `redoubt services` lists.
type listed struct {
	Service string `json:"service"`
	Label   string `json:"label"`
	PID     int    `json:"pid"`
}

// listed are all of them.
func (d *demo) listed(ctx context.Context) (all []listed, err error) {
	out, err := d.redoubt(ctx, "services", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &all)
	}
	return all, err
}

// killBlkBack ends the guest's BlkBack as an accident would.
func (d *demo) killBlkBack(ctx context.Context) error {
	all, err := d.listed(ctx)
	if err != nil {
		return err
	}
	for _, p := range all {
		if p.Service == services.BlkBack && strings.HasSuffix(p.Label, "-"+stored) {
			d.say("  $ kill -9 %d    # %s", p.PID, p.Label)
			return unix.Kill(p.PID, unix.SIGKILL)
		}
	}
	return errors.New("no BlkBack runs")
}

// ioSeconds sum up what the guest tells of its disk.
type ioSeconds struct {
	seconds int
	bytes   int64
	longest time.Duration // of a request
}

// read takes n more lines of the workload: IO second bytes microseconds.
func (s *ioSeconds) read(console *bufio.Scanner, n int) error {
	for n > 0 && console.Scan() {
		l := strings.TrimSpace(console.Text())
		if strings.Contains(l, "GUEST FAILED") {
			return errors.New(l)
		}
		f := strings.Fields(l)
		if len(f) != 4 || f[0] != "IO" {
			continue
		}
		done, err := strconv.ParseInt(f[2], 10, 64)
		if err != nil {
			return err
		}
		us, err := strconv.ParseInt(f[3], 10, 64)
		if err != nil {
			return err
		}
		s.seconds, s.bytes, n = s.seconds+1, s.bytes+done, n-1
		s.longest = max(s.longest, time.Duration(us)*time.Microsecond)
	}
	if n > 0 {
		return errors.New("the guest's console ended")
	}
	return nil
}
