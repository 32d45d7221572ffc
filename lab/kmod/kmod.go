// Package kmod builds kernel modules from source for the kernels of the cache, in the tree that package debian unpacks for
// that. What is built stays in the cache: `make fetch` builds what tests load, so that they find it where nothing can be
// written, in the lab. Nothing is installed on the host and nothing of it is used but its kernel.
package kmod

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
)

// A Module is the source of one module.
type Module struct {
	Name    string            // as /proc/modules has it
	Sources map[string][]byte // C files and headers, by name; NAME.c only where it is the only C file
}

// FromFS is the module of the C files and headers in a directory.
func FromFS(f fs.FS, dir, name string) (Module, error) {
	m := Module{Name: name, Sources: map[string][]byte{}}
	all, err := fs.ReadDir(f, dir)
	if err != nil {
		return m, err
	}
	for _, e := range all {
		if x := filepath.Ext(e.Name()); x != ".c" && x != ".h" {
			continue
		}
		if m.Sources[e.Name()], err = fs.ReadFile(f, dir+"/"+e.Name()); err != nil {
			return m, err
		}
	}
	return m, nil
}

// Build returns the files NAME.ko of modules that are built together, for a kernel named as in debian.Kernels: they may use
// what others of them export. What was built before from the same sources is not built again.
func Build(ctx context.Context, root *debian.Root, kernel string, modules ...Module) (map[string]string, error) {
	tree, err := root.Modules(kernel)
	if err != nil {
		return nil, err
	}
	release := filepath.Base(tree)
	scratch, err := root.Scratch()
	if err != nil {
		return nil, err
	}
	files, err := layout(modules)
	if err != nil {
		return nil, err
	}
	final := filepath.Join(scratch, "kmod-"+release+"-"+digest(files))
	built := map[string]string{}
	for _, m := range modules {
		built[m.Name] = filepath.Join(final, m.Name+".ko")
	}
	if _, err := os.Stat(final); err == nil {
		return built, nil
	}
	work, err := os.MkdirTemp(scratch, "kmod-")
	if err != nil {
		return nil, fmt.Errorf("kernel modules are not built yet, and cannot be here (`make fetch` does): %w", err)
	}
	if err := build(ctx, root, release, work, files, modules, final); err != nil {
		return nil, errors.Join(fmt.Errorf("modules for %s: %w", release, err), os.RemoveAll(work))
	}
	return built, os.RemoveAll(work)
}

// layout is all files of a build: a Kbuild file, and a directory with another for each module.
func layout(modules []Module) (map[string][]byte, error) {
	files := map[string][]byte{}
	var dirs strings.Builder
	for _, m := range modules {
		if m.Name == "" || strings.ContainsAny(m.Name, "/ -$") {
			return nil, fmt.Errorf("%q is no name of a module", m.Name)
		}
		fmt.Fprintf(&dirs, "obj-m += %s/\n", m.Name)
		// No debugging information: guests load these from small memories.
		k := fmt.Sprintf("obj-m := %s.o\nccflags-y += -g0\nasflags-y += -g0\n", m.Name)
		var parts []string
		for _, n := range slices.Sorted(maps.Keys(m.Sources)) {
			files[m.Name+"/"+n] = m.Sources[n]
			if o, ok := strings.CutSuffix(n, ".c"); ok {
				parts = append(parts, o+".o")
			}
		}
		switch {
		case slices.Equal(parts, []string{m.Name + ".o"}):
		case len(parts) == 0 || slices.Contains(parts, m.Name+".o"):
			return nil, fmt.Errorf("module %s of %v: it needs C files, and among several none may be called as it is", m.Name, parts)
		default:
			k += fmt.Sprintf("%s-y := %s\n", m.Name, strings.Join(parts, " "))
		}
		files[m.Name+"/Kbuild"] = []byte(k)
	}
	files["Kbuild"] = []byte(dirs.String())
	return files, nil
}

func digest(files map[string][]byte) string {
	h := sha256.New()
	for _, n := range slices.Sorted(maps.Keys(files)) {
		fmt.Fprintf(h, "%s\x00%d\x00", n, len(files[n]))
		h.Write(files[n])
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func build(ctx context.Context, root *debian.Root, release, work string, files map[string][]byte, modules []Module, final string) error {
	src, out := filepath.Join(work, "src"), filepath.Join(work, "out")
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	for n, data := range files {
		p := filepath.Join(src, n)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(p, data, 0o644); err != nil {
			return err
		}
	}
	said, err := inTree(root.Headers(), src, func() *exec.Cmd {
		return exec.CommandContext(ctx, "/usr/bin/make", "-j", strconv.Itoa(runtime.NumCPU()), "-C", "/usr/src/linux-headers-"+release,
			"M="+sources, "CC=/usr/bin/x86_64-linux-gnu-gcc-12", "AWK=/usr/bin/mawk",
			"CONFIG_DEBUG_INFO_BTF_MODULES=", "modules") // types of a module are nobody's need, and a program's more
	})
	if err != nil {
		return fmt.Errorf("%w:\n%s", err, said)
	}
	for _, m := range modules {
		if err := os.Rename(filepath.Join(src, m.Name, m.Name+".ko"), filepath.Join(out, m.Name+".ko")); err != nil {
			return fmt.Errorf("%w; make said:\n%s", err, said)
		}
	}
	if err := os.Rename(out, final); err != nil && !errors.Is(err, fs.ErrExist) { // another process was faster
		return err
	}
	return nil
}

// sources is where they lie in the tree.
const sources = "/mnt"

// inTree runs a command with root as its root, and returns what it said. The command's mounts are those of a thread that ends
// here, and end with it.
func inTree(root, src string, command func() *exec.Cmd) (said []byte, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread goes with its mounts
		if err = mount(root, src); err != nil {
			return
		}
		cmd := command()
		cmd.Dir = "/"
		cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "KBUILD_BUILD_TIMESTAMP=", "KBUILD_BUILD_USER=redoubt", "KBUILD_BUILD_HOST=redoubt"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		said, err = cmd.CombinedOutput()
	}()
	<-done
	return said, err
}

// mount gives the calling thread mounts of its own, in which root has what make needs beside: src, a /tmp, and /dev/null.
func mount(root, src string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	for _, m := range []struct {
		what, where, kind string
		flags             uintptr
	}{
		{"tmpfs", "dev", "tmpfs", 0},
		{"tmpfs", "tmp", "tmpfs", 0},
		{src, sources, "", unix.MS_BIND},
		{"/dev/null", "dev/null", "", unix.MS_BIND},
	} {
		at := filepath.Join(root, m.where)
		var err error
		if m.what == "/dev/null" {
			err = os.WriteFile(at, nil, 0o666)
		} else {
			err = os.MkdirAll(at, 0o755)
		}
		if err != nil {
			return err
		}
		if err := unix.Mount(m.what, at, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.what, at, err)
		}
	}
	return nil
}
