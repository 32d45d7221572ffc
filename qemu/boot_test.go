package qemu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
)

// initScript is the guest's init: it does what the kernel command line says after "do=".
const initScript = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc p /proc
mount -t sysfs s /sys
mount -t devtmpfs d /dev
mount -t securityfs s /sys/kernel/security
for m in $(cat /mod/order); do insmod /mod/$m || echo "insmod $m failed"; done
echo 4 > /proc/sys/kernel/printk
dmesg | grep -i -e 'ima:' -e 'tpm' -e 'Command line'
head -1 /sys/kernel/security/ima/ascii_runtime_measurements
echo "uptime $(cat /proc/uptime)"
log() { od -v -An -tx1 /sys/kernel/security/tpm0/binary_bios_measurements | tr -d ' \n'; echo; echo LOGEND; }
what=$(sed -n 's/.*do=\([a-z]*\).*/\1/p' /proc/cmdline)
echo "GUEST UP $what"
case $what in
off) poweroff -f;;
reset) reboot -f;;
crash) echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger;;
button) e=$(grep -l "Power Button" /sys/class/input/event*/device/name | head -1 | cut -d/ -f5); exec 3< /dev/input/$e; echo "WAIT $e"; dd bs=24 count=1 <&3 >/dev/null 2>&1; echo BUTTON; poweroff -f;;
log) log; poweroff -f;;
patch)
  yes | while read l; do :; done &
  i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo 1 > /proc/sys/kernel/sched_schedstats; echo 0 > /proc/sys/kernel/sched_schedstats; done
  echo PATCHED; log; poweroff -f;;
channel) p=/dev/vport0p1; [ -e $p ] || p=$(ls /dev/vport*|head -1); read line < $p; echo "CHANNEL $line $(cat /sys/class/virtio-ports/*/name)"; echo "answer $line" > $p; poweroff -f;;
ticks) i=0; while true; do i=$((i+1)); echo "TICK $i"; sleep 0.1; done;;
firmware)
  echo LOGBEGIN; log
  for i in 0 1 2 3 4 5 6 7 8 9; do echo "PCR $i $(cat /sys/class/tpm/tpm0/pcr-sha256/$i)"; done
  echo DONE; poweroff -f;;
esac
poweroff -f
`

var (
	initrdOnce sync.Once
	initrdData []byte
	initrdErr  error
)

func initrd(t testing.TB, r *debian.Root) []byte {
	t.Helper()
	initrdOnce.Do(func() {
		modules, err := r.Modules(debian.Usual)
		if err != nil {
			initrdErr = err
			return
		}
		b := initramfs.New(r.Path("bin/busybox"), initScript)
		b.Modules(modules, "virtio_pci", "virtio_console", "virtio_blk", "button", "evdev")
		initrdData, initrdErr = b.Bytes()
	})
	if initrdErr != nil {
		t.Fatal(initrdErr)
	}
	return initrdData
}

func tempFile(t testing.TB, name string, data []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// A console collects what the guest prints and tells when a text has come.
type console struct {
	t    testing.TB
	f    *os.File
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // 1 buffered
	done chan struct{}
}

func newConsole(t testing.TB) (*console, *os.File) {
	own, theirs := socketpair(t)
	return readConsole(t, own), theirs
}

// readConsole collects what comes from own.
func readConsole(t testing.TB, own *os.File) *console {
	c := &console{t: t, f: own, more: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(c.done)
		buf := make([]byte, 4096)
		for {
			n, err := own.Read(buf)
			if testing.Verbose() {
				_, _ = os.Stdout.Write(buf[:n])
			}
			c.mu.Lock()
			c.text.Write(buf[:n])
			c.mu.Unlock()
			select {
			case c.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return c
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// wait waits for a text.
func (c *console) wait(what string, limit time.Duration) {
	c.t.Helper()
	c.waitFor(limit, what, func(s string) bool { return strings.Contains(s, what) })
}

// waitFor waits until all that was printed satisfies ok.
func (c *console) waitFor(limit time.Duration, what string, ok func(string) bool) {
	c.t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for !ok(c.String()) {
		select {
		case <-c.more:
		case <-c.done:
			if !ok(c.String()) {
				c.t.Fatalf("console ended without %q:\n%s", what, c)
			}
		case <-timer.C:
			c.t.Fatalf("no %q on the console after %v:\n%s", what, limit, c)
		}
	}
}

// bootLimit is far beyond what a boot takes on a busy machine.
const bootLimit = 120 * time.Second

// direct starts a guest with a TPM from kernel and initrd.
func direct(t *testing.T, do string, transport Transport, change func(*Config, *Files)) (*Machine, *console) {
	t.Helper()
	m, files, con := newDirect(t, do, change, Hooks{})
	startMachine(t, m, files, transport)
	return m, con
}

// newDirect makes the machine of direct; change (or nil) may make another of it.
func newDirect(t *testing.T, do string, change func(*Config, *Files), hooks Hooks) (*Machine, Files, *console) {
	t.Helper()
	r := root(t)
	path, err := r.Vmlinuz(debian.Usual)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	con, theirs := newConsole(t)
	config := Config{
		Name: "test,1", Memory: 256 << 20, CPUs: 1, Accel: TCG,
		CommandLine: debian.Cmdline + " panic=-1 do=" + do,
	}
	files := Files{Kernel: kernel, Initrd: tempFile(t, "initrd", initrd(t, r)), Console: theirs}
	if change != nil {
		change(&config, &files)
	}
	return New(config, hooks), files, con
}

func startMachine(t *testing.T, m *Machine, files Files, transport Transport) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	if err := m.Start(ctx, files, transport); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_, _ = m.Wait()
	})
}

func wantOutcome(t *testing.T, m *Machine, con *console, want Outcome) {
	t.Helper()
	timer := time.NewTimer(bootLimit)
	defer timer.Stop()
	select {
	case <-m.Done():
	case <-timer.C:
		t.Fatalf("machine did not end:\n%s", con)
	}
	got, err := m.Wait()
	if got != want || err != nil {
		t.Fatalf("outcome %s, %v; want %s\n%s", got, err, want, con)
	}
	<-con.done
}

// The guest finds its TPM: IMA measures instead of bypassing.
func TestPowerOff(t *testing.T) {
	tpm := newSwtpm(t, root(t))
	m, con := direct(t, "off", tpm, nil)
	wantOutcome(t, m, con, PowerOff)
	out := con.String()
	if !strings.Contains(out, "ima: Allocated hash algorithm") || strings.Contains(out, "TPM-bypass") {
		t.Errorf("IMA without a TPM:\n%s", out)
	}
	if strings.Contains(out, "10 0000000000") || !strings.Contains(out, "boot_aggregate") {
		t.Errorf("boot_aggregate:\n%s", out)
	}
	if err := m.Pause(); !errors.Is(err, ErrQMPClosed) && !strings.Contains(err.Error(), "ended") {
		t.Errorf("Pause after the end: %v", err)
	}
}

func TestReset(t *testing.T) {
	m, con := direct(t, "reset", newSwtpm(t, root(t)), nil)
	wantOutcome(t, m, con, Reboot)
}

func TestPowerButton(t *testing.T) {
	m, con := direct(t, "button", nil, func(c *Config, _ *Files) { c.TPM = NoTPM })
	con.wait("WAIT event", bootLimit)
	if !strings.Contains(con.String(), "TPM-bypass") {
		t.Errorf("no bypass without a TPM:\n%s", con)
	}
	if err := m.PowerButton(); err != nil {
		t.Fatal(err)
	}
	wantOutcome(t, m, con, PowerOff)
	if !strings.Contains(con.String(), "BUTTON") {
		t.Errorf("button not seen:\n%s", con)
	}
}

// The event log of the host's measurements reaches the guest's kernel.
func TestEventLog(t *testing.T) {
	tpm := newSwtpm(t, root(t))
	log := testLog()
	m, files, con := newDirect(t, "log", func(c *Config, _ *Files) { c.TPM = TIS }, Hooks{})
	if err := m.SetEventLog(log); err != nil {
		t.Fatal(err)
	}
	startMachine(t, m, files, tpm)
	con.wait("LOGEND", bootLimit)
	got, err := m.ReadEventLog()
	if err != nil && !strings.Contains(err.Error(), "does not run") { // it may have ended by now
		t.Fatal(err)
	}
	if err == nil && !bytes.HasPrefix(got, log) {
		t.Errorf("area does not hold the log: %x", got[:len(log)])
	}
	wantOutcome(t, m, con, PowerOff)
	if want := hexString(log); !strings.Contains(con.String(), want) {
		t.Errorf("guest's log is not ours (%s):\n%s", want, con)
	}
}

type transportFunc func(locality uint8, cmd []byte) ([]byte, error)

func (f transportFunc) Execute(l uint8, cmd []byte) ([]byte, error) { return f(l, cmd) }
