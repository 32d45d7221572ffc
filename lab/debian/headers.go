package debian

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
)

// Modules of our own are built as on a Debian machine: by the headers of exactly the kernels that the cache holds, with the
// compiler that built them. Both lie in a tree of their own, a root for chroot(2), since a kernel's headers name each
// other by absolute paths. No package's scripts were run: dash brings /bin/sh itself, package kmod names gcc and awk.

// buildPackages are all that make runs there, without what they merely recommend or document. gcc's own dependencies are
// five times as much: run-time libraries and headers of C programs, which no module has.
var buildPackages = []string{
	"gcc-12", "cpp-12", "libgmp10", "libisl23", "libmpc3", "libmpfr6", "libzstd1", "zlib1g",
	"binutils", "binutils-x86-64-linux-gnu", "libbinutils", "libctf-nobfd0", "libctf0", "libjansson4",
	"make", "dash", "sed", "grep", "mawk", "findutils", "libc6", "libelf1",
	"coreutils", "libacl1", "libattr1", "libselinux1", "libpcre2-8-0",
}

// headersSet is the directory they are unpacked into.
const headersSet = "headers"

// headersOf is the package with the headers of a kernel that is in the cache.
func (r *Root) headersOf(k Kernel) (string, error) {
	tree, err := r.Modules(k.Name)
	if err != nil {
		return "", err
	}
	return "linux-headers-" + filepath.Base(tree), nil
}

// headersLabel names the compiler and the headers of the kernels that are in the cache.
func (r *Root) headersLabel() string {
	names := slices.Clone(buildPackages)
	for _, k := range Kernels {
		n, err := r.headersOf(k)
		if err != nil {
			n = "the headers of kernel " + k.Name
		}
		names = append(names, n)
	}
	return strings.Join(names, " ")
}

// unpackHeaders brings the compiler and the headers. A kernel of the cache whose headers Debian no longer has is fetched anew.
func (a *apt) unpackHeaders(ctx context.Context, r *Root, log io.Writer) error {
	debs, err := a.download(ctx, "", buildPackages, func(pkg string) bool { return slices.Contains(buildPackages, pkg) })
	if err != nil {
		return err
	}
	wanted := map[string][]string{} // by suite: flavours share most of theirs
	for _, k := range Kernels {
		name, err := a.available(ctx, r, k, log)
		if err != nil {
			discard(debs)
			return err
		}
		wanted[k.suite] = append(wanted[k.suite], name)
	}
	for suite, names := range wanted {
		more, err := a.download(ctx, suite, names, func(pkg string) bool {
			return strings.HasPrefix(pkg, "linux-headers-") || strings.HasPrefix(pkg, "linux-kbuild-")
		})
		if err != nil {
			discard(debs)
			return err
		}
		debs = append(debs, more...)
	}
	return unpack(ctx, debs, r.dir, headersSet, log)
}

// available is the package with a kernel's headers, of which Debian has only those of its newest kernels.
func (a *apt) available(ctx context.Context, r *Root, k Kernel, log io.Writer) (string, error) {
	name, err := r.headersOf(k)
	if err != nil {
		return "", err
	}
	if _, err := a.run(ctx, "apt-cache", "show", name); err == nil {
		return name, nil
	}
	fmt.Fprintf(log, "Debian no longer has %s: kernel %s is fetched anew\n", name, k.Name)
	if err := a.unpackKernel(ctx, k, r.dir, log); err != nil {
		return "", err
	}
	return r.headersOf(k)
}

// Headers is the tree in which modules are built: a root for chroot(2), with gcc-12, make and the headers of all kernels.
func (r *Root) Headers() string { return filepath.Join(r.dir, headersSet) }
