package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
)

// guestInit is the init of every guest here: e2e=WHAT on the command line says what it does,
// after it has told what its kernel knows of the TPM.
const guestInit = `#!/bin/sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
mount -t securityfs sec /sys/kernel/security
exec </dev/console >/dev/console 2>&1
what=$(sed 's/.*e2e=\([a-z-]*\).*/\1/' /proc/cmdline)
for m in $(cat /mod/order); do [ $m = dummy.ko ] || [ "$what" = modules ] || insmod /mod/$m; done
dmesg | grep -iE 'tpm|ima:|lockup|stall|hung|timed out|timeout|watchdog: BUG' | grep -v 'ACPI: ' | sed 's/^/KERNEL /'
read pcr template kind boot rest </sys/kernel/security/ima/ascii_runtime_measurements; echo "AGG $boot"
for p in 0 1 2 3 4 5 6 7 8 9; do v=; read v </sys/class/tpm/tpm0/pcr-sha256/$p; echo "PCR $p $v"; done 2>/dev/null
sick() { dmesg | grep -iE 'i/o error|blocked for more' | sed 's/^/DISK-ERROR /'; }
button() { for e in /dev/input/event*; do exec 7<$e; (head -c 1 <&7 >/dev/null; echo PRESSED; killall -q -STOP guest; sync; sick; poweroff -f) & done; }
# Rounds until its power button is pressed.
churn() {
  for e in /dev/input/event*; do exec 7<$e; (head -c 1 <&7 >/dev/null; touch /enough) & done
  round=0
  until [ -e /enough ]; do
    round=$((round+1))
    dd if=/dev/urandom of=/data bs=64k count=48 2>/dev/null
    echo "ROUND $round"
    dd if=/data of=/dev/vda bs=8k oflag=direct conv=fsync 2>/dev/null || echo "DISK-ERROR write"
    echo 3 >/proc/sys/vm/drop_caches
    got=$(dd if=/dev/vda bs=64k count=48 2>/dev/null | md5sum)
    [ "$got" = "$(md5sum </data)" ] && echo "SAME $round"
  done
  sick
}
# What IMA and the kernel say of what runs, with programs of its own.
measured() {
  echo 'measure func=BPRM_CHECK' >/sys/kernel/security/ima/policy
  for n in 1 2 3 4 5; do program tool$n "exit $n"; tool$n; done
  while read l; do echo "MODULE $l"; done </proc/modules
  for p in /proc/[0-9]*; do read s <$p/stat && echo "TASK $s"; done
  echo "IMA $(base64 -w0 </sys/kernel/security/ima/binary_runtime_measurements)"
}
# So many files are measured, a line a thousand.
many() {
  echo 'measure func=FILE_CHECK mask=MAY_READ' >/sys/kernel/security/ima/policy
  mkdir /many; n=0
  while [ $n -lt $1 ]; do n=$((n+1)); echo $n >/many/$n; read x </many/$n; [ $((n % 1000)) = 0 ] && echo "MANY $n"; done
}
program() { printf '#!/bin/sh\n%s\n' "$2" >/bin/$1; chmod +x /bin/$1; }
own() { ip link set eth0 up; ip addr add 192.0.2.$1/24 dev eth0; }
ask() { until got=$(nc -w 30 192.0.2.1 $1 </dev/null) && [ "$got" ]; do :; done; echo $got; }
network() {
  case $1 in
    server)
      own 1
      program boots 'echo x >>/boots; grep -c x /boots'
      program echos 'grep ^Icmp: /proc/net/snmp | (read names; read tag a b c d e f g h echos rest; echo $echos)'
      for p in 5000=cat 5001=boots 5002=echos; do nc -ll -p ${p%=*} -e /bin/${p#*=} & done
      echo READY; while :; do sleep 1000; done ;;
    client)
      own 2
      boot=$(ask 5001); echo "BOOT $boot"
      [ "$boot" = 1 ] && reboot -f
      dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null
      (nc -l -p 7000 </dev/null; touch /enough) &
      round=0
      until [ -e /enough ]; do
        round=$((round+1)); echo "ROUND $round"
        [ "$(nc 192.0.2.1 5000 </data | md5sum)" = "$(md5sum </data)" ] && echo "SAME $round" || echo "DIFFERENT $round"
      done ;;
    liar)
      ip link set eth1 up
      own 3; before=$(ask 5002); ip addr flush dev eth0
      own 9; arp -i eth0 -s 192.0.2.1 02:00:00:00:00:01
      heard() { ping -c $1 -W 2 192.0.2.1 >/dev/null && echo "$2 answered" || echo "$2 unanswered"; }
      heard 3 WRONG-IP
      ip link set eth0 down; ip addr flush dev eth0; ip link set eth0 address 02:00:00:00:00:05; own 3
      arp -i eth0 -s 192.0.2.1 02:00:00:00:00:01
      heard 3 WRONG-MAC
      ip link set eth0 down; ip addr flush dev eth0; ip link set eth0 address 02:00:00:00:00:03; own 3
      heard 2 HONEST
      echo "ECHOS $(($(ask 5002) - before))"; echo LIED
      nc -l -p 7000 </dev/null
      echo "ELSEWHERE $(cat /sys/class/net/eth1/statistics/rx_packets)" ;;
    host)
      own 1; who=$(sed 's/.*who=\([a-z]*\).*/\1/' /proc/cmdline)
      [ $who = default ] && ip addr add 192.0.2.7/24 dev eth0
      program whose "echo $who"; nc -ll -p 5003 -e /bin/whose &
      echo READY; while :; do sleep 1000; done ;;
    visitor)
      own 2; round=0
      while :; do
        round=$((round+1)); who=$(ask 5003)
        ping -c 1 -W 2 192.0.2.7 >/dev/null && other=answered || other=unanswered
        echo "ROUND $round $who $other"
      done ;;
  esac
}
case $what in
  net) network $(sed 's/.*net=\([a-z]*\).*/\1/' /proc/cmdline) ;;
  off) ;;
  reboot) if [ "$(head -c 6 /dev/vda)" = booted ]; then echo SECOND; else printf booted >/dev/vda; sync; echo FIRST; reboot -f; fi ;;
  # Its bus: each function with its identity and where its registers are; disks and NICs by theirs.
  pci)
    for d in /sys/bus/pci/devices/*; do echo "PCI $(basename $d) $(cat $d/vendor) $(cat $d/device) $(head -1 $d/resource | cut -d' ' -f1)"; done
    for d in /sys/block/vd* /sys/class/net/eth*; do echo "IS $(basename $d) $(basename $(dirname $(readlink -f $d/device)))"; done
    if [ "$(head -c 6 /dev/vda)" = booted ]; then echo READY; while :; do sleep 1000; done; else printf booted >/dev/vda; sync; echo FIRST; reboot -f; fi ;;
  panic) echo c >/proc/sysrq-trigger ;;
  sealed) if [ "$(head -c 4 /dev/vda | tr -d '\\0')" ]; then /bin/guest unseal /dev/vda; else /bin/guest seal /dev/vda; fi ;;
  clear) /bin/guest clear ;;
  devices)
    echo "CPUS $(grep -c ^processor /proc/cpuinfo)"
    echo "RNG $(cat /sys/class/misc/hw_random/rng_current) $(head -c 64 /dev/hwrng | wc -c)"
    echo "DISK $(head -c 5 /dev/vda)"; printf written | dd of=/dev/vda bs=512 seek=1 conv=fsync 2>/dev/null
    echo "READONLY $(cat /sys/block/vdb/ro)"
    for v in /sys/class/virtio-ports/*; do [ "$(cat $v/name)" = redoubt.0 ] && port=/dev/$(basename $v); done
    exec 3<>$port; echo "hello, host" >&3; read line <&3; echo "CHANNEL $line" ;;
  many) many $(sed 's/.*many=\([0-9]*\).*/\1/' /proc/cmdline); echo READY; while :; do sleep 1000; done ;;
  wait) grep -q ' measured' /proc/cmdline && measured; echo "LOG $(base64 -w0 </sys/kernel/security/tpm0/binary_bios_measurements)"; button; echo READY; while :; do sleep 1000; done ;;
  churn) churn ;;
  overlay)
    echo "BASE $(md5sum </dev/vda)"; churn
    dd if=/data of=/dev/vda bs=512 count=1 seek=14001 oflag=direct 2>/dev/null || echo "DISK-ERROR sector"
    sync; echo 3 >/proc/sys/vm/drop_caches; echo "DISK $(md5sum </dev/vda)" ;;
  io) /bin/guest io $(sed 's/.*io=\([a-z]*\).*/\1/' /proc/cmdline) /dev/vda ;;
  sink) own 1; /bin/guest sink /dev/vda ;;
  # It reboots after so many rounds, if it is told a number.
  verify)
    button; n=$(sed -n 's/.*net=\([0-9]*\).*/\1/p' /proc/cmdline); [ "$n" ] && { own $n; /bin/guest talk & }
    /bin/guest verify /dev/vda $(sed -n 's/.*rounds=\([0-9]*\).*/\1/p' /proc/cmdline) && sick && reboot -f ;;
  # Its kernel has one module, which makes a network device.
  modules)
    insmod /mod/dummy.ko && ip link set dummy0 up && ip addr add 192.0.2.9/24 dev dummy0 && echo DUMMY-UP
    ping -c 2 -W 1 192.0.2.10 >/dev/null
    echo "SENT $(cat /sys/class/net/dummy0/statistics/tx_packets)"; echo READY; while :; do sleep 1000; done ;;
  nap) echo READY; sleep 4 ;;
  deaf) echo READY; while :; do sleep 1000; done ;;
esac
echo E2E-DONE
sync; poweroff -f
`

// guestModules are in every guest's image; dummy is loaded by what=modules only, which loads no other.
var guestModules = []string{"virtio_pci", "virtio_blk", "virtio_rng", "virtio_console", "virtio_net", "button", "evdev", "dummy"}

var (
	initrdMu sync.Mutex
	initrds  = map[string]string{}
)

// initrd builds the image for a kernel, with the guest program where a test needs it.
func initrd(t testing.TB, cache *debian.Root, kernel string, withGuest bool) string {
	t.Helper()
	initrdMu.Lock()
	defer initrdMu.Unlock()
	key := fmt.Sprint(kernel, withGuest)
	if p := initrds[key]; p != "" {
		return p
	}
	modules, err := cache.Modules(kernel)
	if err != nil {
		t.Fatal(err)
	}
	b := initramfs.New(cache.Path("bin/busybox"), guestInit)
	b.Modules(modules, guestModules...)
	if withGuest {
		b.HostFile(guestProgram(t), "bin/guest")
	}
	p := filepath.Join(scratch, "initrd-"+strings.ReplaceAll(key, " ", "-"))
	if err := b.WriteFile(p); err != nil {
		t.Fatal(err)
	}
	initrds[key] = p
	return p
}

// guestProgram is the program that runs inside a guest; the lab takes the one the host built.
func guestProgram(t testing.TB) string {
	t.Helper()
	path := filepath.Join(programsDir, "e2e-guest")
	if os.Getenv("REDOUBT_IN_LAB") == "" {
		c := exec.Command("go", "build", "-ldflags=-s -w", "-o", path, "./guest")
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	return path
}

// A start describes one guest of a test.
type start struct {
	name, emulator, kernel string
	what                   string // e2e= on the command line
	cmdline                string // more of it
	withGuest              bool
	args                   []string
}

func (h *host) start(s start) {
	h.t.Helper()
	r := h.tryStart(s)
	if r.status != 0 {
		h.t.Fatalf("redoubt run: %s%s", r.out, r.err)
	}
}

func (h *host) tryStart(s start) result {
	h.t.Helper()
	if s.kernel == "" {
		s.kernel = debian.Usual
	}
	if s.name == "" {
		s.name = "guest"
	}
	kernel, err := h.cache.Vmlinuz(s.kernel)
	if err != nil {
		h.t.Fatal(err)
	}
	return h.run(append([]string{
		"run", "--name", s.name, "--emulator", s.emulator, "--kernel", kernel,
		"--initrd", initrd(h.t, h.cache, s.kernel, s.withGuest), "--memory", "256MiB",
		"--cmdline", strings.TrimSpace(debian.Cmdline + " e2e=" + s.what + " " + s.cmdline),
	}, s.args...)...)
}

// facts are what the guest's init told.
type facts struct {
	kernel []string
	agg    string
	pcrs   map[int]string
	log    string
}

func readFacts(console string) facts {
	f := facts{pcrs: map[int]string{}}
	for _, l := range strings.Split(console, "\n") {
		word, rest, _ := strings.Cut(l, " ")
		switch word {
		case "KERNEL":
			f.kernel = append(f.kernel, rest)
		case "AGG":
			f.agg = rest
		case "LOG":
			f.log = rest
		case "PCR":
			var n int
			var v string
			if k, _ := fmt.Sscanf(rest, "%d %s", &n, &v); k == 2 {
				f.pcrs[n] = strings.ToLower(v)
			}
		}
	}
	return f
}

// keptTrust fails the test unless the guest's kernel found its TPM in time, measured a real
// boot_aggregate, and complained of nothing.
func (f facts) keptTrust(t testing.TB) {
	t.Helper()
	bad := func(l string) bool {
		l = strings.ToLower(l)
		for _, w := range []string{"bypass", "lockup", "stall", "hung", "timed out", "timeout", "watchdog: bug", "error"} {
			if strings.Contains(l, w) {
				return true
			}
		}
		return false
	}
	for _, l := range f.kernel {
		if bad(l) {
			t.Errorf("the guest's kernel says: %s", l)
		}
	}
	algorithm, digest, _ := strings.Cut(f.agg, ":")
	if len(digest) < 40 || strings.Trim(digest, "0") == "" {
		t.Errorf("boot_aggregate is %q of %q", digest, algorithm)
	}
}

const bootTime = 100 * time.Second
