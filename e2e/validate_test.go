package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/verdict"
)

// validatedInit mounts the guest's disk and does what its console says, one line at a time.
const validatedInit = `#!/bin/sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
exec </dev/console >/dev/console 2>&1
stty -echo
for m in $(cat /mod/order); do insmod /mod/$m; done
mkdir /disk
mount -t ext4 /dev/vda /disk || echo MOUNT-FAILED
ip=$(sed -n 's/.*ip=\([0-9.]*\).*/\1/p' /proc/cmdline)
[ "$ip" ] && { ip link set eth0 up; ip addr add $ip/24 dev eth0; }
# Once is not enough where a whole machine is emulated: the first asks for the neighbour.
reaches() { ping -c 3 -W 2 $1 >/dev/null && echo "$1 ANSWERS" || echo "$1 SILENT"; }
# It writes, and has its processor leave it: next to nothing does so often as printing.
load() { while :; do dd if=/dev/urandom of=/disk/load bs=64k count=8 conv=fsync 2>/dev/null; echo busy; done & }
echo READY
n=0
while read line; do eval "$line"; n=$((n+1)); echo "DID $n"; done
poweroff -f
`

// validatedInitrd builds that guest's image.
func validatedInitrd(t testing.TB, h *host) string {
	t.Helper()
	path := h.path("initrd-validated")
	modules, err := h.cache.Modules(debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	b := initramfs.New(h.cache.Path("bin/busybox"), validatedInit)
	b.Modules(modules, "virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "button", "evdev", "ext4", "overlay")
	if err := b.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// rootDisk makes a disk with the file system of a small system on it.
func (h *host) rootDisk(name string) string {
	h.t.Helper()
	dir := h.path("tree-" + name)
	for path, text := range map[string]string{
		"usr/bin/login": "login", "usr/bin/su": "su", "usr/sbin/sshd": "sshd", "etc/passwd": "root:x:0:0::/root:/bin/sh\n",
		"etc/shadow": "root:*:1::::::\n", "etc/cron.d/daily": "daily", "boot/vmlinuz": "kernel", "var/log/messages": "log", "home/a/notes": "notes",
	} {
		p := filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			h.t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			h.t.Fatal(err)
		}
	}
	for i := range 200 { // more than a handful
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("usr/bin/tool%d", i)), fmt.Appendf(nil, "tool %d", i), 0o755); err != nil {
			h.t.Fatal(err)
		}
	}
	disk := h.path(name + ".img")
	c := h.cache.Command(h.t.Context(), "mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, disk, "64M")
	if out, err := c.CombinedOutput(); err != nil {
		h.t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return disk
}

// A shell types into a guest's console.
type shell struct {
	h    *host
	name string
	in   io.WriteCloser
	done int
}

func (h *host) shell(name string) *shell {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := h.client(ctx, "console", name)
	in, err := c.StdinPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { cancel(); _ = c.Wait() })
	return &shell{h: h, name: name, in: in}
}

// does types a line and returns what the console said until it was done.
func (s *shell) does(line string) string {
	s.h.t.Helper()
	if _, err := io.WriteString(s.in, line+"\n"); err != nil {
		s.h.t.Fatal(err)
	}
	s.done++
	out := s.h.await(s.name, fmt.Sprintf("DID %d\n", s.done), bootTime)
	if _, after, ok := strings.Cut(out, fmt.Sprintf("DID %d\n", s.done-1)); ok {
		out = after
	}
	return out
}

// validatedSpec writes the spec of a guest with such a disk.
func (h *host) validatedSpec(name, emulator, disk, cmdline, more string) string {
	h.t.Helper()
	kernel, err := h.cache.Vmlinuz(debian.Usual)
	if err != nil {
		h.t.Fatal(err)
	}
	path := h.path(name + ".yaml")
	doc := fmt.Sprintf("name: %s\nemulator: %s\nmemory: 256MiB\nboot:\n  kernel: %s\n  initrd: %s\n  cmdline: %s %s\ndisks:\n- path: %s\n%s",
		name, emulator, kernel, validatedInitrd(h.t, h), debian.Cmdline, cmdline, disk, more)
	if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// validate validates a guest and returns the report.
func (h *host) validate(name string, args ...string) verdict.Report {
	h.t.Helper()
	r := h.run(append([]string{"validate", name, "--json"}, args...)...)
	var v verdict.Report
	if err := json.Unmarshal([]byte(r.out), &v); err != nil {
		h.t.Fatalf("redoubt validate %s: exit status %d: %s%s", name, r.status, r.out, r.err)
	}
	if (r.status == 1) != (len(v.Findings) > 0) {
		h.t.Errorf("redoubt validate %s: exit status %d with %d findings", name, r.status, len(v.Findings))
	}
	return v
}

func (h *host) status(name string) (s verdict.Status) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must("validate", name, "--last", "--json")), &s); err != nil {
		h.t.Fatal(err)
	}
	return s
}

// found are a report's findings, such as "content disk0:/usr/bin/login".
func found(v verdict.Report) map[string]bool {
	all := map[string]bool{}
	for _, f := range v.Findings {
		all[string(f.Kind)+" "+f.Name.String()] = true
	}
	return all
}

func TestValidateQEMU(t *testing.T) { validate(t, "qemu") }

func TestValidateNative(t *testing.T) {
	lab.NeedsKVM(t)
	validate(t, "native")
}

// validate: what changes on a running guest's disk is found, at the price of what changed; what is in no rule is not; a guest
// goes into quarantine for it and stays there, over reset services, a killed Builder and its own restart, until it is released.
func validate(t *testing.T, emulator string) {
	h := newHost(t)
	key := h.path("web.key")
	public := strings.TrimSpace(h.must("baseline", "key", key))
	if again := strings.TrimSpace(h.must("baseline", "key", key)); again != public {
		t.Errorf("the key's public half is %q, then %q", public, again)
	}
	other := h.validatedSpec("other", emulator, h.rootDisk("other"), "ip=192.0.2.1", "nics:\n- vlan: 10\n")
	web := h.validatedSpec("web", emulator, h.rootDisk("web"), "ip=192.0.2.2", "nics:\n- vlan: 10\n"+
		"validation:\n  signers: ["+public+"]\n  respond:\n    critical: [quarantine]\n")
	h.must("run", other)
	h.must("run", web)
	h.await("web", "READY", bootTime)
	h.await("other", "READY", bootTime)
	sh := h.shell("web")
	if out := sh.does("reaches 192.0.2.1"); !strings.Contains(out, "192.0.2.1 ANSWERS") {
		t.Fatalf("the network does not work\n%s", out)
	}

	// A baseline counts when who may sign it has.
	h.fails(1, "the guest has no baseline", "validate", "web")
	h.must("baseline", "create", "web")
	if show := h.must("baseline", "show", "web", "--draft"); !strings.Contains(show, "disk0:/usr/bin/login") || strings.Contains(show, "/var/log/messages") {
		t.Errorf("the draft is\n%s", show)
	}
	h.must("baseline", "key", h.path("other.key"))
	h.fails(1, "may not sign this guest's baseline", "baseline", "sign", "web", "--key", h.path("other.key"))
	h.must("baseline", "sign", "web", "--key", key)
	v := h.validate("web")
	if len(v.Findings) != 0 || v.Baseline != 1 || v.Files < 200 || len(v.Snapshots) != 1 || !v.Snapshots[0].Safe {
		t.Fatalf("nothing has changed, and the report is %+v", v)
	}

	// What changes by itself is nothing; then an attack.
	sh.does("echo more >>/disk/var/log/messages; echo x >/disk/home/a/other; sync")
	if v = h.validate("web"); len(v.Findings) != 0 || v.Full || v.Read > 20 {
		t.Errorf("a log has changed, and the report is %+v", v)
	}
	sh.does("echo backdoor >/disk/usr/bin/login; cp /disk/usr/bin/su /disk/usr/bin/suid; chmod 4755 /disk/usr/bin/suid; rm /disk/usr/sbin/sshd; chmod 666 /disk/etc/shadow; sync")
	v = h.validate("web")
	for _, want := range []string{
		"content disk0:/usr/bin/login", "added disk0:/usr/bin/suid", "setuid disk0:/usr/bin/suid", "removed disk0:/usr/sbin/sshd", "metadata disk0:/etc/shadow",
	} {
		if !found(v)[want] {
			t.Errorf("not found: %s", want)
		}
	}
	if len(v.Snapshots) != 2 || v.Full || len(v.Responses) == 0 || v.Responses[len(v.Responses)-1] != spec.Quarantine {
		t.Errorf("the report is %+v", v)
	}
	for _, s := range v.Snapshots {
		t.Logf("snapshot %d: %s; held %v, I/O %v", s.Snapshot, s.Why, s.Held, s.HeldIO)
	}
	isolated := func(when string) {
		t.Helper()
		if out := sh.does("reaches 192.0.2.1"); !strings.Contains(out, "192.0.2.1 SILENT") {
			t.Errorf("%s the guest in quarantine reaches another\n%s", when, out)
		}
		if s := h.status("web"); len(s.InForce) != 1 || s.InForce[0] != spec.Quarantine || !strings.Contains(s.Reason, "disk0:") {
			t.Errorf("%s in force is %v: %s", when, s.InForce, s.Reason)
		}
	}
	isolated("at once")
	h.must("reset", "netback")
	isolated("after NetBack was replaced")
	h.must("reset", "blkback", "web")
	h.must("reset", "builder")
	sh = h.shellAgain(sh)
	isolated("after the Builder was replaced")
	if v = h.validate("web"); !v.Full || !found(v)["content disk0:/usr/bin/login"] {
		t.Errorf("after the Builder was replaced the report is %+v", v)
	}

	// Restored, accepted, released.
	sh.does("echo -n login >/disk/usr/bin/login; rm /disk/usr/bin/suid; echo -n sshd >/disk/usr/sbin/sshd; chmod 755 /disk/usr/sbin/sshd /disk/etc/shadow; sync")
	if v = h.validate("web"); len(v.Findings) != 0 {
		t.Errorf("restored, and the report is %+v", v)
	}
	isolated("restored")
	h.must("release", "web", "--reason", "restored")
	if out := sh.does("reaches 192.0.2.1"); !strings.Contains(out, "192.0.2.1 ANSWERS") {
		t.Errorf("released, and it reaches nobody\n%s", out)
	}
	sh.does("echo user >>/disk/etc/passwd; sync")
	if v = h.validate("web"); !found(v)["content disk0:/etc/passwd"] {
		t.Errorf("the report is %+v", v)
	}
	h.must("release", "web")
	h.must("baseline", "accept", "web", "disk0:/etc/passwd")
	if r := h.run("baseline", "diff", "web"); r.status != 1 || !strings.Contains(r.out, "disk0:/etc/passwd") || strings.Count(r.out, "\n") != 1 {
		t.Errorf("the draft's difference: exit status %d\n%s%s", r.status, r.out, r.err)
	}
	h.must("baseline", "sign", "web", "--key", key)
	if v = h.validate("web"); len(v.Findings) != 0 || v.Baseline != 2 {
		t.Errorf("accepted, and the report is %+v", v)
	}

	// Quarantine by hand, over the guest's restart.
	h.must("quarantine", "web", "--reason", "ticket")
	h.must("stop", "web", "--grace", "0s")
	h.must("run", "web")
	h.await("web", "READY", bootTime)
	sh = h.shell("web")
	if out := sh.does("reaches 192.0.2.1"); !strings.Contains(out, "192.0.2.1 SILENT") {
		t.Errorf("restarted, the guest in quarantine reaches another\n%s", out)
	}
	h.must("release", "web")
	h.must("stop", "web", "--grace", "0s")
	h.must("stop", "other", "--grace", "0s")
}

// shellAgain goes on with a console whose connection has ended.
func (h *host) shellAgain(s *shell) *shell {
	next := h.shell(s.name)
	next.done = s.done
	return next
}

func TestPauseQEMU(t *testing.T) { pause(t, "qemu") }

func TestPauseNative(t *testing.T) {
	lab.NeedsKVM(t)
	pause(t, "native")
}

// pause: a paused guest does nothing, and goes on as if no time had passed; its disk is validated meanwhile.
func pause(t *testing.T, emulator string) {
	h := newHost(t)
	h.must("run", h.validatedSpec("web", emulator, h.rootDisk("web"), "", ""))
	h.await("web", "READY", bootTime)
	key := h.path("web.key")
	h.must("baseline", "key", key)
	sh := h.shell("web")
	h.must("baseline", "create", "web", "--key", key)
	sh.does("(while :; do cat /proc/uptime; usleep 100000; done) >/tick & sleep 1")
	h.must("pause", "web")
	h.must("pause", "web") // once is enough
	if v := h.validate("web"); len(v.Findings) != 0 {
		t.Errorf("%+v", v)
	}
	if _, err := io.WriteString(sh.in, "echo GOES-ON; "); err != nil {
		t.Fatal(err)
	}
	before := len(h.console("web"))
	held := time.NewTimer(3 * time.Second)
	<-held.C
	if after := len(h.console("web")); after != before {
		t.Errorf("the paused guest printed %d bytes", after-before)
	}
	h.must("resume", "web")
	out := sh.does("echo GAP $(awk '{d = $1 - last; if (last && d > most) most = d; last = $1} END {print int(most * 10)}' /tick)")
	var tenths int
	_, gap, ok := strings.Cut(out, "GAP ")
	if _, err := fmt.Sscanf(gap, "%d", &tenths); !ok || err != nil || tenths > 25 {
		t.Errorf("the guest saw %d tenths of a second pass while it was paused for more than 30\n%s", tenths, out)
	}
	h.must("stop", "web", "--grace", "0s")
}

func TestVerdictsQEMU(t *testing.T) { verdicts(t, "qemu", "  every: 2s\n") }

func TestVerdictsNative(t *testing.T) {
	lab.NeedsKVM(t)
	verdicts(t, "native", "  exits: 1000\n")
}

// verdicts: guests are validated by themselves, and a verdict that pauses or revokes stays until it is released, over a killed
// Builder and over attempts to start the guest anew. after is when the second is validated; the first is when it has written enough.
func verdicts(t *testing.T, emulator, after string) {
	h := newHost(t)
	key := h.path("web.key")
	h.must("baseline", "key", key)
	h.must("run", h.validatedSpec("still", emulator, h.rootDisk("still"), "", "validation:\n  written: 1MiB\n  respond:\n    critical: [pause]\n"))
	h.must("run", h.validatedSpec("revoked", emulator, h.rootDisk("revoked"), "", "validation:\n"+after+"  respond:\n    critical: [revoke]\n"))
	for _, name := range []string{"still", "revoked"} {
		h.await(name, "READY", bootTime)
		h.must("baseline", "create", name, "--key", key)
	}
	ek := h.show("revoked").EKSHA256
	still, revoked := h.shell("still"), h.shell("revoked")
	next := h.followEvents("still")
	// On the disk before what makes a validation due: else its snapshot may be too early to show it, and another one is not due.
	if _, err := io.WriteString(still.in, "echo backdoor >/disk/usr/bin/login; sync; dd if=/dev/zero of=/disk/home/much bs=64k count=64 conv=fsync\n"); err != nil {
		t.Fatal(err)
	}
	revoked.does("echo backdoor >/disk/usr/bin/login; sync; load")

	// One stands still.
	next("validation", bootTime) // what was found
	next("validation", bootTime) // and what follows
	if s := h.status("still"); len(s.InForce) != 1 || s.InForce[0] != spec.Pause {
		t.Errorf("in force: %v", s.InForce)
	}
	silent := len(h.console("still"))
	if _, err := io.WriteString(still.in, "echo GOES-ON\n"); err != nil {
		t.Fatal(err)
	}
	h.must("resume", "still") // is of the operator's own pauses
	h.must("reset", "builder")

	// The other is gone, and stays so.
	g := h.awaitDown("revoked", bootTime)
	if g.State != "failed" || !strings.Contains(g.Reason, "its vTPM is revoked") {
		t.Errorf("the guest is %s: %s", g.State, g.Reason)
	}
	h.fails(1, "its vTPM is revoked", "run", "revoked")
	if got := len(h.console("still")); got != silent {
		t.Errorf("the guest that a verdict paused printed %d bytes", got-silent)
	}
	h.must("release", "still")
	h.await("still", "GOES-ON\n", bootTime)
	h.must("stop", "still", "--grace", "0s")
	h.must("release", "revoked")
	h.must("run", "revoked", "--wait")
	if again := h.show("revoked").EKSHA256; ek == "" || again != ek {
		t.Errorf("released, its vTPM is %s; it was %s", again, ek)
	}
	h.must("stop", "revoked", "--grace", "0s")
}
