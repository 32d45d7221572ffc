package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
)

// A Job is a command to run in L1.
type Job struct {
	Args   []string  // program and arguments, as on this host
	Dir    string    // working directory; "" is this process's
	Env    []string  // KEY=VALUE; nil is this process's environment
	Output io.Writer // standard output and error, streamed
	// MemoryMiB and CPUs are L1's; 0: 6144 and 1. With more than one, L1 is a newer QEMU: under 7.2
	// nested guests then crash now and then (a triple fault, an XCR0 that is not what they set). With
	// one it is 7.2 nevertheless, which is a tenth faster.
	MemoryMiB, CPUs int
	// Modules are kernel modules to load beyond the usual.
	Modules []string
}

// modules are what L1 needs to reach its root, its ports and KVM, and what network tests want.
var modules = []string{
	"virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "kvm_amd", "tun", "vhost_net",
	"bridge", "8021q", "veth", "crc32c_generic", "nft_meta_bridge",
}

// labCPU is a nested-capable model less the features that software emulation lacks (each would
// be a line of warning), and less cmpxchg16b: QEMU 7.2's emulation of it inside a nested guest
// leaves garbage in the flags register. Debian's 6.12 cloud kernel then dies in its allocator,
// under any monitor.
const labCPU = "EPYC,+svm,+npt,-cx16,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec"

// labCmdline makes L1's clock tick periodically, with neither stopped ticks nor high-resolution
// timers. QEMU 7.2 emulates VMRUN so that it sets a bit in the processor's pending interrupts
// without taking their lock; an interrupt that arrives in that instant is lost until another
// one comes. After a one-shot timer none does, and L1 stands still for good (its APIC then shows
// the timer's vector requested and the processor halted with interrupts on; a key press wakes
// it). A periodic tick comes 4 ms later.
const labCmdline = "console=ttyS0 panic=-1 quiet mitigations=off nohz=off highres=off"

// init1 is L1's init. It never runs anything from a guest's reach: the job and the status
// port are its own.
const init1 = `#!/bin/sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $(cat /mod/order); do insmod /mod/$m || echo "lab: insmod $m failed"; done
mkdir -p /host /rw /new
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro hostroot /host || echo "lab: no host root"
mount -t tmpfs -o size=50% tmpfs /rw; mkdir /rw/u /rw/w
mount -t overlay -o lowerdir=/host,upperdir=/rw/u,workdir=/rw/w overlay /new || echo "lab: no overlay"
for d in proc sys dev; do mount --move /$d /new/$d; done
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts; mount -t tmpfs tmpfs /new/dev/shm; mount -t tmpfs tmpfs /new/run
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup 2>/dev/null
ifconfig lo 127.0.0.1 up
# As udev does: KVM is a group's.
[ -e /new/dev/kvm ] && chown 0:993 /new/dev/kvm && chmod 660 /new/dev/kvm
# Huge pages for guests in memfds, as a host of Redoubt should have it: far fewer nested faults.
echo advise >/new/sys/kernel/mm/transparent_hugepage/shmem_enabled
cp /job /new/run/lab-job; cp /labinit /new/run/lab-init
out=$(echo /new/dev/vport*p1) status=$(echo /new/dev/vport*p2)
# Over the root and not only chrooted into: the kernel makes no user namespaces in a chroot.
cd /new
mount --move . /
exec /bin/busybox chroot . /bin/sh /run/lab-init ${out#/new} ${status#/new}
`

// labInit runs the job where init1 leaves off, in the tree of the host.
const labInit = `#!/bin/sh
/bin/sh /run/lab-job >$1 2>&1 </dev/null
echo $? >$2
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
`

// Run boots L1, runs job in it and returns its exit status. It ends when the job ends or ctx
// does; an error means that L1 did not carry the job through, and tells L1's last words.
func Run(ctx context.Context, job Job) (status int, err error) {
	root, err := debian.Open()
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "redoubt-lab-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	initrd := filepath.Join(dir, "initrd")
	if err := buildInitrd(root, job, initrd); err != nil {
		return 0, err
	}
	kernel, err := root.Vmlinuz("6.1")
	if err != nil {
		return 0, err
	}
	memory, cpus := job.MemoryMiB, job.CPUs
	if memory == 0 {
		memory = 6144
	}
	if cpus == 0 {
		cpus = 1
	}
	machine := func(ctx context.Context, args ...string) *exec.Cmd {
		return root.Command(ctx, "qemu-system-x86_64", append([]string{"-L", root.Path("usr/share/seabios"), "-L", root.Path("usr/share/qemu")}, args...)...)
	}
	if cpus > 1 {
		machine = root.Lab
	}
	cmd := machine(ctx,
		"-accel", "tcg,thread=multi", "-cpu", labCPU,
		"-smp", strconv.Itoa(cpus), "-m", strconv.Itoa(memory),
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", kernel, "-initrd", initrd,
		"-append", labCmdline,
		"-fsdev", "local,id=r,path=/,security_model=none,readonly=on,multidevs=remap",
		"-device", "virtio-9p-pci,fsdev=r,mount_tag=hostroot",
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=out,path=/dev/fd/3", "-device", "virtserialport,chardev=out,nr=1",
		"-chardev", "file,id=status,path=/dev/fd/4", "-device", "virtserialport,chardev=status,nr=2",
	)
	var console tail
	cmd.Stdout, cmd.Stderr = &console, &console
	out, outw, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	st, stw, err := os.Pipe()
	if err != nil {
		return 0, errors.Join(err, out.Close(), outw.Close())
	}
	cmd.ExtraFiles = []*os.File{outw, stw}
	if err := cmd.Start(); err != nil {
		return 0, errors.Join(err, out.Close(), outw.Close(), st.Close(), stw.Close())
	}
	err = errors.Join(outw.Close(), stw.Close())
	var statusText bytes.Buffer
	var copying sync.WaitGroup
	copying.Go(func() { _, _ = io.Copy(job.Output, out) }) // ends with QEMU
	copying.Go(func() { _, _ = io.Copy(&statusText, io.LimitReader(st, 64)) })
	waited := cmd.Wait()
	copying.Wait()
	err = errors.Join(err, out.Close(), st.Close())
	if err != nil {
		return 0, err
	}
	status, perr := strconv.Atoi(strings.TrimSpace(statusText.String()))
	switch {
	case ctx.Err() != nil:
		return 0, fmt.Errorf("lab: %w; console: %s", context.Cause(ctx), console.String())
	case waited != nil:
		return 0, fmt.Errorf("lab: qemu: %w; console: %s", waited, console.String())
	case perr != nil:
		return 0, fmt.Errorf("lab: L1 ended without a status; console: %s", console.String())
	}
	return status, nil
}

func buildInitrd(root *debian.Root, job Job, path string) error {
	tree, err := root.Modules("6.1")
	if err != nil {
		return err
	}
	script, err := jobScript(root, job)
	if err != nil {
		return err
	}
	b := initramfs.New(root.Path("bin/busybox"), init1)
	b.Modules(tree, append(append([]string(nil), modules...), job.Modules...)...)
	b.File("job", []byte(script), 0o644)
	b.File("labinit", []byte(labInit), 0o644)
	return b.WriteFile(path)
}

// jobScript is the job as a shell script: environment, directory, command.
func jobScript(root *debian.Root, job Job) (string, error) {
	if len(job.Args) == 0 {
		return "", errors.New("lab: no command")
	}
	dir, env := job.Dir, job.Env
	if dir == "" {
		wd, err := os.Getwd()
		if err != nil {
			return "", err
		}
		dir = wd
	}
	if env == nil {
		env = os.Environ()
	}
	cache, err := debian.Dir()
	if err != nil {
		return "", err
	}
	vars := map[string]string{}
	for _, kv := range env {
		if k, v, ok := strings.Cut(kv, "="); ok && k != Later && k != "TMPDIR" {
			vars[k] = v
		}
	}
	vars[InLab] = "1"
	vars["REDOUBT_CACHE"] = cache
	vars["REDOUBT_TOOLS"] = root.Tools()
	keys := make([]string, 0, len(vars))
	for k := range vars {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	var b strings.Builder
	fmt.Fprintf(&b, "cd %s || exit 126\nexec env -i", quote(dir))
	for _, k := range keys {
		fmt.Fprintf(&b, " \\\n %s", quote(k+"="+vars[k]))
	}
	for _, a := range job.Args {
		fmt.Fprintf(&b, " \\\n %s", quote(a))
	}
	b.WriteByte('\n')
	return b.String(), nil
}

// quote makes s one word of a POSIX shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// tail keeps the last bytes written, for error messages.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailSize = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - tailSize; n > 0 {
		t.buf = append(t.buf[:0], t.buf[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.buf))
}
