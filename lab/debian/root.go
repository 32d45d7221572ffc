package debian

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A Root is the cache: one tree with all tools and a tree per kernel.
type Root struct{ dir string }

// Open returns the cache without fetching; it fails where something is missing.
func Open() (*Root, error) {
	dir, err := Dir()
	if err != nil {
		return nil, err
	}
	r := &Root{dir: dir}
	if m := r.missing(); len(m) > 0 {
		return nil, fmt.Errorf("cache %s lacks %s: run `make fetch`", dir, strings.Join(m, "; "))
	}
	return r, nil
}

// Tools is the directory the tools are unpacked beneath; the product takes it as
// $REDOUBT_TOOLS (package programs).
func (r *Root) Tools() string { return filepath.Join(r.dir, "root") }

// Path is the path of a file of the unpacked tools, named as on an installed system.
func (r *Root) Path(file string) string { return filepath.Join(r.Tools(), file) }

// Guest is a tree with packages of a guest's root, that nobody has configured.
func (r *Root) Guest() string { return filepath.Join(r.dir, guestSet) }

// Scratch is a directory for what is built from the packages (initramfs images, peers).
func (r *Root) Scratch() (string, error) {
	d := filepath.Join(r.dir, "built")
	return d, os.MkdirAll(d, 0o755)
}

// Env is the environment that lets a program of the root find its libraries.
func (r *Root) Env() []string { return r.env("root") }

// Command runs a program of the root, named without its directory.
func (r *Root) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return r.command(ctx, "root", name, args)
}

// Lab runs the QEMU that the lab's machine is, with its own firmware.
func (r *Root) Lab(ctx context.Context, args ...string) *exec.Cmd {
	share := filepath.Join(r.dir, labSet, "usr/share")
	args = append([]string{"-L", filepath.Join(share, "seabios"), "-L", filepath.Join(share, "qemu")}, args...)
	return r.command(ctx, labSet, "qemu-system-x86_64", args)
}

func (r *Root) env(set string) []string {
	var path []string
	for _, lib := range []string{"usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/swtpm"} {
		path = append(path, filepath.Join(r.dir, set, lib))
	}
	return append(os.Environ(), "LD_LIBRARY_PATH="+strings.Join(path, ":"))
}

func (r *Root) command(ctx context.Context, set, name string, args []string) *exec.Cmd {
	var path string
	for _, d := range []string{"usr/bin", "bin", "usr/sbin", "sbin"} {
		path = filepath.Join(r.dir, set, d, name)
		if _, err := os.Stat(path); err == nil {
			break
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = r.env(set)
	return cmd
}

// XenStore runs one of XenStore's own clients (xenstore-read, test-xenstore, …) against the
// store that listens on socket.
func (r *Root) XenStore(ctx context.Context, socket, name string, args ...string) *exec.Cmd {
	set := filepath.Join(r.dir, storeSet)
	path := filepath.Join(set, "usr/bin", name)
	if _, err := os.Stat(path); err != nil {
		path = filepath.Join(set, "usr/lib/xen-4.17/bin", name)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "XENSTORED_PATH="+socket, "LD_LIBRARY_PATH="+filepath.Join(set, "usr/lib/x86_64-linux-gnu"))
	return cmd
}

// Usual is the kernel that guests boot where a test is not about kernels: of Debian's flavours the one that boots soonest, in
// half the time of the generic one.
const Usual = "6.1-cloud"

// Cmdline is what the kernels of tests' guests are told. Under emulation a console is slow, and dmesg tells the same; the
// kernel's tests of its own ciphers are a quarter of the usual kernel's boot.
const Cmdline = "console=ttyS0 quiet cryptomgr.notests"

// Vmlinuz is the boot image (bzImage) of the kernel named as in [Kernels].
func (r *Root) Vmlinuz(kernel string) (string, error) {
	return r.one(kernel, "boot/vmlinuz-*")
}

// Modules is the module directory (lib/modules/RELEASE) of the kernel named.
func (r *Root) Modules(kernel string) (string, error) {
	return r.one(kernel, "lib/modules/*")
}

func (r *Root) one(kernel, pattern string) (string, error) {
	m, err := filepath.Glob(filepath.Join(r.dir, "kernel-"+kernel, pattern))
	if err != nil || len(m) != 1 {
		return "", fmt.Errorf("kernel %s: %d files match %s in the cache", kernel, len(m), pattern)
	}
	return m[0], nil
}
