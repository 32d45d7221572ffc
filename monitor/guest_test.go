package monitor

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
)

// guestInit is the init of every test guest: the word after t= on the command line says what
// it does.
const guestInit = `#!/bin/sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
exec </dev/console >/dev/console 2>&1
echo "INIT $(cut -d' ' -f1 /proc/uptime)"
what=$(sed 's/.* t=\([a-z0-9]*\).*/\1/' /proc/cmdline)
case $what in
  off) ;;
  reboot) reboot -f ;;
  sysrq) echo b >/proc/sysrq-trigger ;;
  panic) echo c >/proc/sysrq-trigger ;;
  facts)
    echo "CPUS $(grep -c ^processor /proc/cpuinfo)"
    echo "MEM $(awk '/MemTotal/{print $2}' /proc/meminfo)"
    echo "CLOCK $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
    echo "HIGH $(grep -c '^1........-.*System RAM' /proc/iomem)"
    echo "TEXT $(awk '/Kernel code/{sub("-.*","",$1); print $1}' /proc/iomem)"
    echo "PCI $(ls /sys/bus/pci/devices | wc -l)"
    dmesg | grep -iE 'warn|bug|error|fail|lockup|stall' ;;
  button)
    for m in $(cat /mod/order); do insmod /mod/$m; done
    exec 3</dev/input/event0 # opened before the press, else it is lost
    echo READY; head -c 1 <&3 >/dev/null; echo PRESSED ;;
  wait) echo READY; while :; do sleep 100; done ;;
  echo) echo READY; read line; echo "GOT $line" ;;
  clock) i=0; while [ $i -lt 100 ]; do echo "T $(cut -d' ' -f1 /proc/uptime) $(date +%s)"; i=$((i+1)); usleep 50000; done ;;
  modules)
    for m in $(cat /mod/order); do
      case $m in null_blk*) set -- memory_backed=1 gb=1 nr_devices=1 submit_queues=1;; *) set --;; esac
      insmod /mod/$m $* && echo "RESULT loaded $m"
    done
    if [ -e /sys/class/net/dummy0 ]; then
      ip link set dummy0 up; ip addr add 192.0.2.1/24 dev dummy0; arp -i dummy0 -s 192.0.2.9 02:00:00:00:00:09
      ping -c 3 -i 0.1 -W 1 192.0.2.9 >/dev/null; ip link set dummy0 mtu 1400; ip link show dummy0 | sed -n 's/.*mtu \([0-9]*\).*/RESULT mtu \1/p'
      # The kernel patches the module's code: ftrace's place, and a breakpoint behind it.
      if mount -t tracefs t /sys/kernel/tracing 2>/dev/null; then
        T=/sys/kernel/tracing; echo dummy_xmit >$T/set_ftrace_filter; echo function >$T/current_tracer
        ping -c 2 -i 0.1 -W 1 192.0.2.9 >/dev/null; echo "RESULT traced $(grep -q dummy_xmit $T/trace && echo yes)"; echo nop >$T/current_tracer
        echo 'p:behind dummy_xmit+5' >$T/kprobe_events && echo 1 >$T/events/kprobes/behind/enable
        ping -c 2 -i 0.1 -W 1 192.0.2.9 >/dev/null; echo "RESULT probed $(grep -q behind $T/trace && echo yes)"
        echo 0 >$T/events/kprobes/behind/enable; echo >$T/kprobe_events; umount $T
      fi
      ip link set dummy0 down
      echo "RESULT dummy0 $([ $(cat /sys/class/net/dummy0/statistics/tx_packets) -ge 3 ] && echo sent)"
    fi
    if [ -e /dev/nullb0 ]; then
      seq 1 20000 >/data; dd if=/data of=/dev/nullb0 bs=4096 conv=fsync 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches
      echo "RESULT nullb0 $(head -c $(wc -c </data) /dev/nullb0 | md5sum) $(md5sum </data)"
    fi
    if [ -e /fs.img ]; then
      mkdir -p /mnt; seq 1 3000 >/data
      mount -t vfat -o loop /fs.img /mnt && echo "RESULT vfat $(cat /mnt/greeting.txt) $(ls /mnt | wc -l)"
      mkdir /mnt/dir; for n in 1 2 3 4 5; do cp /data /mnt/dir/a-longer-name-$n; done; rm /mnt/dir/a-longer-name-2; mv /mnt/greeting.txt /mnt/dir/moved
      umount /mnt; echo 3 >/proc/sys/vm/drop_caches; mount -t vfat -o loop /fs.img /mnt
      echo "RESULT vfat $(find /mnt | sort | xargs echo) $(cat /mnt/dir/a-* | md5sum) $(cat /data /data /data /data | md5sum) $(cat /mnt/dir/moved)"
      umount /mnt
    fi
    [ -e /dev/hwrng ] && echo "RESULT rng $(cat /sys/class/misc/hw_random/rng_current) $(head -c 64 /dev/hwrng | wc -c)"
    for c in crc32c xxhash64; do grep -q "^name *: $c" /proc/crypto && echo "RESULT $c $(grep -A9 "^name *: $c" /proc/crypto | grep -c 'selftest *: passed')"; done
    awk '{print "RESULT module", $1}' /proc/modules
    for m in $(awk '{print $1}' /proc/modules); do rmmod $m && echo "RESULT gone $m"; done
    [ -e /mod/dummy.ko ] && insmod /mod/dummy.ko && echo "RESULT again $(ls /sys/class/net | grep -c dummy)" && rmmod dummy && echo "RESULT gone again"
    dmesg | grep -iE 'bug|oops|warn|invalid|fault|xor:|failed' ;;
  script) . /script ;;
  tpm)
    mount -t securityfs sec /sys/kernel/security
    dmesg | grep -iE 'tpm|ima:'; ls /sys/class/tpm
    echo "BOOTAGG $(head -c 200 /sys/kernel/security/ima/ascii_runtime_measurements 2>/dev/null)" ;;
esac
sync; poweroff -f
`

// guest is a machine under test and its console.
type guest struct {
	*Machine
	console *console
	mu      sync.Mutex
	seen    map[Event]time.Duration // when, since the console was made
}

// boot describes a test guest; zero values have usable meanings.
type boot struct {
	kernel  string // debian.Usual
	vcpus   int    // 1
	memory  uint64 // 256 MiB
	what    string // guestInit's word
	extra   string // more command line
	modules []string
	files   map[string]string // of this host, by their names in the guest
	script  string            // /script, which the word script runs
	change  func(*Config)
}

func cache(t testing.TB) *debian.Root {
	t.Helper()
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func (b boot) build(t testing.TB) *guest {
	t.Helper()
	root := cache(t)
	if b.kernel == "" {
		b.kernel = debian.Usual
	}
	if b.vcpus == 0 {
		b.vcpus = 1
	}
	if b.memory == 0 {
		b.memory = 256 << 20
	}
	vmlinuz, err := root.Vmlinuz(b.kernel)
	if err != nil {
		t.Fatal(err)
	}
	image := initramfs.New(root.Path("bin/busybox"), guestInit)
	if len(b.modules) > 0 {
		tree, err := root.Modules(b.kernel)
		if err != nil {
			t.Fatal(err)
		}
		image.Modules(tree, b.modules...)
	}
	for to, from := range b.files {
		image.HostFile(from, to)
	}
	if b.script != "" {
		image.File("script", []byte(b.script), 0o755)
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := image.WriteFile(initrd); err != nil {
		t.Fatal(err)
	}
	g := &guest{console: newConsole()}
	cfg := Config{
		KVM: open(t, "/dev/kvm", os.O_RDWR), Memory: memfd(t, b.memory), MemoryBytes: b.memory, VCPUs: b.vcpus,
		Kernel: open(t, vmlinuz, os.O_RDONLY), Initrd: open(t, initrd, os.O_RDONLY),
		Cmdline:    debian.Cmdline + " panic=-1 t=" + b.what + " " + b.extra,
		ConsoleOut: g.console,
	}
	g.seen = map[Event]time.Duration{}
	cfg.OnEvent = func(e Event) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.seen[e] = time.Since(g.console.start)
	}
	if b.change != nil {
		b.change(&cfg)
	}
	g.Machine, err = New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// run runs the guest to its end, at most four minutes: the lab may share its processors.
func (g *guest) run(t testing.TB) Outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	start := time.Now()
	o, err := g.Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s := g.Stats()
	t.Logf("%v after %.1f s; exits %v; accesses %v; console %d bytes; events %v",
		o, time.Since(start).Seconds(), s.Exits, s.Accesses, s.ConsoleBytes, g.seen)
	return o
}

// expect runs the guest and fails unless it ends as told.
func (g *guest) expect(t testing.TB, want Kind) {
	t.Helper()
	if o := g.run(t); o.Kind != want {
		t.Errorf("outcome %v, want %v; console:\n%s", o, want, g.console)
	}
}

func open(t testing.TB, path string, flag int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func memfd(t testing.TB, size uint64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "guest-memory")
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	return f
}

// console collects what the guest prints and wakes who waits for a text.
type console struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	waiting map[string]chan struct{}
	stamps  map[string]time.Duration
	start   time.Time
}

func newConsole() *console {
	return &console{waiting: map[string]chan struct{}{}, stamps: map[string]time.Duration{}, start: time.Now()}
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf.Write(p)
	for text, ch := range c.waiting {
		if bytes.Contains(c.buf.Bytes(), []byte(text)) {
			c.stamps[text] = time.Since(c.start)
			close(ch)
			delete(c.waiting, text)
		}
	}
	return len(p), nil
}

// saw is closed when the guest has printed text. Ask before the guest runs.
func (c *console) saw(text string) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := make(chan struct{})
	if strings.Contains(c.buf.String(), text) {
		close(ch)
	} else {
		c.waiting[text] = ch
	}
	return ch
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

// value is what follows key on its line.
func (c *console) value(key string) string {
	for _, l := range strings.Split(c.String(), "\n") {
		if v, ok := strings.CutPrefix(strings.TrimSpace(l), key+" "); ok {
			return v
		}
	}
	return fmt.Sprintf("(no %s)", key)
}
