// Package debian brings Debian packages into a cache directory, unpacked, without
// installing anything on the host.
//
// The tests, the demo and the lab need QEMU, swtpm, busybox and several kernels. Installing
// them would change the machine; so a private apt configuration (own lists, own archive
// directory, an empty dpkg status) resolves the closure of the named packages and dpkg -x
// unpacks it beneath one root. Programs from that root run through [Root.Command], which
// points the dynamic loader at the root's own libraries.
//
// Everything is idempotent: a stamp names the package set that a root holds, and a second
// call with the same set does nothing. Concurrent callers are serialised by a file lock.
package debian

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// ErrUnsupported says that this machine cannot fetch packages: it is not Debian 12 or the
// caller is not root. The caller prints [List] and exits 2.
var ErrUnsupported = errors.New("packages can be fetched only by root on Debian 12")

// toolPackages are the programs the tests, the demo and the lab run.
var toolPackages = []string{
	"qemu-system-x86", "qemu-utils", "seabios", "ovmf",
	"swtpm", "swtpm-tools", "tpm2-tools",
	"busybox-static", "syslinux", "syslinux-common", "mtools", "systemd-boot-efi",
	"e2fsprogs", "fdisk", "aide",
}

// labPackages are the lab's machine where it has several processors: a newer QEMU than the one that the
// product is tested with, which emulates nested SVM with races (package lab tells which).
var labPackages = []string{"qemu-system-x86", "seabios"}

const (
	labSuite = "bookworm-backports"
	// labSet is the directory they are unpacked into.
	labSet = "lab"
)

// storePackages are XenStore's own clients, which the store's tests run; of what they depend on
// the host has all but storeLibraries.
var (
	storePackages  = []string{"xenstore-utils", "xen-utils-4.17"}
	storeLibraries = []string{"libxenstore4", "libxentoolcore1", "libxentoollog1"}
)

// storeSet is the directory they are unpacked into.
const storeSet = "xenstore"

// guestPackages are what a guest's root is made of that nothing boots: what the default rules of a baseline are held to. Of what they
// depend on nothing is fetched.
var guestPackages = []string{
	"base-files", "base-passwd", "bash", "bash-completion", "coreutils", "cron", "cron-daemon-common", "dpkg", "ifupdown",
	"init-system-helpers", "initramfs-tools-core", "iputils-ping", "libc-bin", "libc6", "libpam-modules", "libpam-runtime", "login",
	"logrotate", "openssh-client", "openssh-server", "passwd", "python3-minimal", "sudo", "systemd", "udev", "unattended-upgrades", "util-linux",
}

// guestSet is the directory they are unpacked into, with owners and modes as they have them.
const guestSet = "guest"

// A Kernel is one Debian kernel the product must boot.
type Kernel struct {
	Name  string // as tests name it: "6.1", "6.1-cloud", "6.12", "6.12-cloud"
	suite string // apt's target release
	meta  string // the meta package that depends on the current image
}

// Kernels are all kernels fetched, the default first.
var Kernels = []Kernel{
	{"6.1", "bookworm", "linux-image-amd64"},
	{"6.12", "bookworm-backports", "linux-image-amd64"},
	{"6.1-cloud", "bookworm", "linux-image-cloud-amd64"},
	{"6.12-cloud", "bookworm-backports", "linux-image-cloud-amd64"},
}

// List is the text printed where packages cannot be fetched: what is needed, exactly.
func List() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Debian 12 (bookworm), as root, with: %s\n", strings.Join(toolPackages, " "))
	fmt.Fprintf(&b, "the lab's machine: %s\n", labLabel())
	fmt.Fprintf(&b, "the store's clients: %s\n", storeLabel())
	fmt.Fprintf(&b, "a guest's root: %s\n", guestLabel())
	for _, k := range Kernels {
		fmt.Fprintf(&b, "kernel %s: %s from %s\n", k.Name, k.meta, k.suite)
	}
	fmt.Fprintf(&b, "kernel modules: each kernel's linux-headers and %s\n", strings.Join(buildPackages, " "))
	return b.String()
}

// Dir is the cache directory: $REDOUBT_CACHE, else redoubt beneath the user's cache directory.
func Dir() (string, error) {
	if d := os.Getenv("REDOUBT_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory (set REDOUBT_CACHE): %w", err)
	}
	return filepath.Join(d, "redoubt"), nil
}

// Fetch makes sure that the cache holds the tools and all kernels, and tells progress to log.
func Fetch(ctx context.Context, log io.Writer) (*Root, error) {
	dir, err := Dir()
	if err != nil {
		return nil, err
	}
	r := &Root{dir: dir}
	missing := r.missing()
	if len(missing) == 0 {
		return r, nil
	}
	if err := supported(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if missing = r.missing(); len(missing) == 0 { // another process was faster
		return r, nil
	}
	fmt.Fprintf(log, "fetching into %s, nothing is installed on the host: %s\n", dir, strings.Join(missing, "; "))
	a, err := newApt(ctx, filepath.Join(dir, "apt"))
	if err != nil {
		return nil, err
	}
	if slices.Contains(missing, toolsLabel()) {
		if err := a.unpackClosure(ctx, "", toolPackages, r.dir, "root", log); err != nil {
			return nil, err
		}
		if err := stamp(r.dir, "root", toolsLabel()); err != nil {
			return nil, err
		}
	}
	if slices.Contains(missing, labLabel()) {
		if err := a.unpackClosure(ctx, labSuite, labPackages, r.dir, labSet, log); err != nil {
			return nil, err
		}
		if err := stamp(r.dir, labSet, labLabel()); err != nil {
			return nil, err
		}
	}
	if slices.Contains(missing, storeLabel()) {
		if err := a.unpackSome(ctx, slices.Concat(storePackages, storeLibraries), r.dir, storeSet, log); err != nil {
			return nil, err
		}
		if err := stamp(r.dir, storeSet, storeLabel()); err != nil {
			return nil, err
		}
	}
	if slices.Contains(missing, guestLabel()) {
		if err := a.unpackSome(ctx, guestPackages, r.dir, guestSet, log); err != nil {
			return nil, err
		}
		if err := stamp(r.dir, guestSet, guestLabel()); err != nil {
			return nil, err
		}
	}
	for _, k := range Kernels {
		if !slices.Contains(missing, k.label()) {
			continue
		}
		if err := a.unpackKernel(ctx, k, r.dir, log); err != nil {
			return nil, err
		}
		if err := stamp(r.dir, "kernel-"+k.Name, k.label()); err != nil {
			return nil, err
		}
	}
	if !stamped(r.dir, headersSet, r.headersLabel()) { // the kernels' releases are known now
		if err := a.unpackHeaders(ctx, r, log); err != nil {
			return nil, err
		}
		if err := stamp(r.dir, headersSet, r.headersLabel()); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func toolsLabel() string { return strings.Join(toolPackages, " ") }
func labLabel() string   { return strings.Join(labPackages, " ") + " (" + labSuite + ")" }
func storeLabel() string {
	return strings.Join(slices.Concat(storePackages, storeLibraries), " ")
}
func guestLabel() string       { return strings.Join(guestPackages, " ") }
func (k Kernel) label() string { return k.meta + " (" + k.suite + ")" }

func stampPath(dir, set string) string { return filepath.Join(dir, "."+set+".stamp") }

func digest(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func stamp(dir, set, label string) error {
	return os.WriteFile(stampPath(dir, set), []byte(digest(label)), 0o644)
}

func stamped(dir, set, label string) bool {
	b, err := os.ReadFile(stampPath(dir, set))
	return err == nil && string(b) == digest(label)
}

func (r *Root) missing() []string {
	var m []string
	if !stamped(r.dir, "root", toolsLabel()) {
		m = append(m, toolsLabel())
	}
	if !stamped(r.dir, labSet, labLabel()) {
		m = append(m, labLabel())
	}
	if !stamped(r.dir, storeSet, storeLabel()) {
		m = append(m, storeLabel())
	}
	if !stamped(r.dir, guestSet, guestLabel()) {
		m = append(m, guestLabel())
	}
	for _, k := range Kernels {
		if !stamped(r.dir, "kernel-"+k.Name, k.label()) {
			m = append(m, k.label())
		}
	}
	if l := r.headersLabel(); !stamped(r.dir, headersSet, l) {
		m = append(m, l)
	}
	return m
}

func supported() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: not root", ErrUnsupported)
	}
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if !bytes.Contains(b, []byte("VERSION_CODENAME=bookworm")) {
		return fmt.Errorf("%w: /etc/os-release names another system", ErrUnsupported)
	}
	return nil
}

func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	if err := eintr.Call(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX) }); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// apt is a private apt configuration.
type apt struct{ opts []string }

func newApt(ctx context.Context, dir string) (*apt, error) {
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	status := filepath.Join(dir, "status")
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return nil, err
	}
	sources, err := privateSources(ctx)
	if err != nil {
		return nil, err
	}
	list := filepath.Join(dir, "sources.list")
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return nil, err
	}
	a := &apt{opts: []string{
		"-o", "Dir::State=" + filepath.Join(dir, "state"),
		"-o", "Dir::State::status=" + status,
		"-o", "Dir::Cache=" + filepath.Join(dir, "cache"),
		"-o", "Dir::Etc::sourcelist=" + list,
		"-o", "Dir::Etc::sourceparts=-",
		"-o", "APT::Sandbox::User=root",
		"-o", "APT::Get::AllowUnauthenticated=false",
		"-o", "Acquire::Retries=3",
	}}
	if out, err := a.run(ctx, "apt-get", "-q", "update"); err != nil {
		return nil, fmt.Errorf("apt-get update (private lists): %w: %s", err, lastLine(out))
	}
	return a, nil
}

// keyring holds the keys that every Debian system trusts for Debian's own archive.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// privateSources takes the archive's address from the system's own sources and adds the
// backports suite beside it.
func privateSources(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format",
		"$(REPO_URI) $(RELEASE)", "Created-By: Packages").Output()
	if err != nil {
		return "", fmt.Errorf("apt-get indextargets: %w", err)
	}
	var b strings.Builder
	seen := map[string]bool{}
	add := func(uri, suite string) {
		line := "deb [signed-by=" + keyring + "] " + uri + " " + suite + " main\n"
		if !seen[line] {
			seen[line] = true
			b.WriteString(line)
		}
	}
	for sc := bufio.NewScanner(bytes.NewReader(out)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) != 2 {
			continue
		}
		switch f[1] {
		case "bookworm":
			add(f[0], f[1])
			add(f[0], "bookworm-backports")
		case "bookworm-updates", "bookworm-security":
			add(f[0], f[1])
		}
	}
	if b.Len() == 0 {
		return "", fmt.Errorf("%w: apt's sources name no bookworm suite", ErrUnsupported)
	}
	return b.String(), nil
}

func (a *apt) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(a.opts), args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	return cmd.CombinedOutput()
}

// download fetches the packages that installing names on an empty system would install,
// keeps those that keep accepts, and returns their archive files.
func (a *apt) download(ctx context.Context, suite string, names []string, keep func(pkg string) bool) ([]string, error) {
	args := []string{"-y", "--no-install-recommends", "--print-uris", "--download-only", "install"}
	if suite != "" {
		args = append([]string{"-t", suite}, args...)
	}
	out, err := a.run(ctx, "apt-get", append(args, names...)...)
	if err != nil {
		return nil, fmt.Errorf("apt-get install --print-uris %s: %w: %s", strings.Join(names, " "), err, lastLine(out))
	}
	var want []string
	for sc := bufio.NewScanner(bytes.NewReader(out)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) < 3 || !strings.HasPrefix(f[0], "'") {
			continue
		}
		pkg, rest, ok := strings.Cut(f[1], "_")
		if !ok || !keep(pkg) {
			continue
		}
		version, _, _ := strings.Cut(rest, "_")
		want = append(want, pkg+"="+strings.ReplaceAll(version, "%3a", ":"))
	}
	if len(want) == 0 {
		return nil, fmt.Errorf("no package found for %s", strings.Join(names, " "))
	}
	tmp, err := os.MkdirTemp("", "redoubt-debs-")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "apt-get", append(append(slices.Clone(a.opts), "-q", "download"), want...)...)
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		_ = os.RemoveAll(tmp)
		return nil, fmt.Errorf("apt-get download: %w: %s", err, lastLine(out))
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err == nil && len(debs) != len(want) {
		err = fmt.Errorf("apt-get download: %d of %d packages arrived", len(debs), len(want))
	}
	return debs, err
}

// unpack replaces dir/set by the contents of debs and removes the archives.
func unpack(ctx context.Context, debs []string, dir, set string, log io.Writer) error {
	defer discard(debs)
	fresh := filepath.Join(dir, set+".new")
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := os.MkdirAll(fresh, 0o755); err != nil {
		return err
	}
	for _, deb := range debs {
		if out, err := exec.CommandContext(ctx, "dpkg", "-x", deb, fresh).CombinedOutput(); err != nil {
			return fmt.Errorf("dpkg -x %s: %w: %s", filepath.Base(deb), err, lastLine(out))
		}
	}
	old := filepath.Join(dir, set)
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	fmt.Fprintf(log, "unpacked %d packages into %s\n", len(debs), old)
	return os.Rename(fresh, old)
}

// discard removes archives, with the directories that download made for them.
func discard(debs []string) {
	for _, d := range debs {
		_ = os.RemoveAll(filepath.Dir(d))
	}
}

func (a *apt) unpackClosure(ctx context.Context, suite string, names []string, dir, set string, log io.Writer) error {
	debs, err := a.download(ctx, suite, names, func(string) bool { return true })
	if err != nil {
		return err
	}
	return unpack(ctx, debs, dir, set, log)
}

// unpackSome unpacks packages without those that they depend on.
func (a *apt) unpackSome(ctx context.Context, names []string, dir, set string, log io.Writer) error {
	debs, err := a.download(ctx, "", names, func(pkg string) bool { return slices.Contains(names, pkg) })
	if err != nil {
		return err
	}
	return unpack(ctx, debs, dir, set, log)
}

func (a *apt) unpackKernel(ctx context.Context, k Kernel, dir string, log io.Writer) error {
	image := func(pkg string) bool {
		return strings.HasPrefix(pkg, "linux-image-") && pkg != k.meta
	}
	debs, err := a.download(ctx, k.suite, []string{k.meta}, image)
	if err != nil {
		return err
	}
	return unpack(ctx, debs, dir, "kernel-"+k.Name, log)
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}
