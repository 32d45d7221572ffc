// Package initramfs builds the small root file systems that test guests and the lab boot
// from: busybox, an init, kernel modules in load order, and any other files.
package initramfs

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

// A Builder collects files. The first error is kept and returned by the end.
type Builder struct {
	records []cpio.Record
	dirs    map[string]bool
	err     error
}

// New starts an image with busybox (a static binary) and the usual directories. init is a
// script for busybox sh; it finds all applets under /bin.
func New(busybox, init string) *Builder {
	b := &Builder{dirs: map[string]bool{}}
	for _, d := range []string{"bin", "dev", "etc", "mnt", "mod", "proc", "root", "run", "sys", "tmp"} {
		b.Dir(d)
	}
	b.HostFile(busybox, "bin/busybox")
	b.Link("busybox", "bin/sh")
	b.File("init", []byte(init), 0o755)
	// The kernel opens /dev/console before any init could mount devtmpfs.
	b.records = append(b.records, cpio.CharDev("dev/console", 0o600, 5, 1))
	return b
}

// Dir adds a directory and its parents.
func (b *Builder) Dir(name string) {
	name = strings.Trim(name, "/")
	if name == "" || name == "." || b.dirs[name] {
		return
	}
	b.Dir(filepath.Dir(name))
	b.dirs[name] = true
	b.records = append(b.records, cpio.Directory(name, 0o755))
}

// File adds a file.
func (b *Builder) File(name string, data []byte, perm fs.FileMode) {
	b.Dir(filepath.Dir(name))
	b.records = append(b.records, cpio.StaticFile(strings.TrimPrefix(name, "/"), string(data), uint64(perm.Perm())))
}

// Link adds a symbolic link.
func (b *Builder) Link(target, name string) {
	b.Dir(filepath.Dir(name))
	b.records = append(b.records, cpio.Symlink(name, target))
}

// HostFile adds a copy of a file of this machine, with its permissions.
func (b *Builder) HostFile(path, name string) {
	data, err := os.ReadFile(path)
	if err != nil {
		b.fail(err)
		return
	}
	st, err := os.Stat(path)
	if err != nil {
		b.fail(err)
		return
	}
	b.File(name, data, st.Mode())
}

// Modules adds the kernel modules named, with all they depend on, beneath /mod, and /mod/order:
// their file names in load order. tree is lib/modules/RELEASE of an unpacked kernel; no
// modules.dep is needed, dependencies are read from each module's .modinfo section.
func (b *Builder) Modules(tree string, names ...string) {
	files := map[string]string{}
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		name := strings.TrimSuffix(d.Name(), ".xz")
		if err == nil && strings.HasSuffix(name, ".ko") {
			files[moduleName(strings.TrimSuffix(name, ".ko"))] = path
		}
		return err
	})
	if err != nil {
		b.fail(err)
		return
	}
	// What a kernel has built in needs no loading (virtio_pci is a module of 6.1, part of 6.12).
	builtin := map[string]bool{}
	if list, err := os.ReadFile(filepath.Join(tree, "modules.builtin")); err == nil {
		for _, l := range strings.Fields(string(list)) {
			builtin[moduleName(strings.TrimSuffix(filepath.Base(l), ".ko"))] = true
		}
	}
	var order []string
	var add func(name string, chain []string)
	add = func(name string, chain []string) {
		if slices.Contains(order, name+".ko") || b.err != nil {
			return
		}
		if builtin[name] {
			return
		}
		path, ok := files[name]
		if !ok || slices.Contains(chain, name) {
			b.fail(fmt.Errorf("module %s (needed by %v) is not in %s", name, chain, tree))
			return
		}
		data, err := readModule(path)
		if err != nil {
			b.fail(err)
			return
		}
		deps, err := moduleDeps(data)
		if err != nil {
			b.fail(fmt.Errorf("%s: %w", path, err))
			return
		}
		for _, d := range deps {
			add(d, append(chain, name))
		}
		order = append(order, name+".ko")
		b.File("mod/"+name+".ko", data, 0o644)
	}
	for _, n := range names {
		add(moduleName(n), nil)
	}
	b.File("mod/order", []byte(strings.Join(order, "\n")+"\n"), 0o644)
}

// moduleName: the kernel treats - and _ alike.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// readModule returns the module itself: newer kernels' come compressed, and busybox's insmod
// takes plain ones.
func readModule(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil || !strings.HasSuffix(path, ".xz") {
		return data, err
	}
	r, err := xz.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if data, err = io.ReadAll(r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return data, nil
}

func moduleDeps(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for _, kv := range strings.Split(string(info), "\x00") {
		if list, ok := strings.CutPrefix(kv, "depends="); ok && list != "" {
			return strings.Split(moduleName(list), ","), nil
		}
	}
	return nil, nil
}

func (b *Builder) fail(err error) {
	if b.err == nil {
		b.err = fmt.Errorf("initramfs: %w", err)
	}
}

// Bytes is the finished archive, gzipped (fast: it is unpacked under emulation).
func (b *Builder) Bytes() ([]byte, error) {
	if b.err != nil {
		return nil, b.err
	}
	var out bytes.Buffer
	z, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	w := cpio.Newc.Writer(z)
	if err := cpio.WriteRecords(w, b.records); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	return out.Bytes(), nil
}

// WriteFile writes the finished archive.
func (b *Builder) WriteFile(path string) error {
	data, err := b.Bytes()
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}
