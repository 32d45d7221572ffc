package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/initramfs"
)

// The word that begins every line the guest's init says to the demo, and its last one.
const (
	mark  = "DEMO "
	ready = mark + "READY"
)

// guestInit tells what the guest's kernel and its programs know of the TPM, then waits. It
// needs no kernel module: the same image boots under every kernel.
const guestInit = `#!/bin/sh
export PATH=/bin:/usr/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
mount -t securityfs sec /sys/kernel/security
exec </dev/console >/dev/console 2>&1
dmesg -n 1 # from now on the console is ours
echo "DEMO kernel $(uname -s) $(uname -r)"
dmesg | grep -E 'tpm_(crb|tis)|ima: .*TPM' | sed 's/^\[ *\([0-9.]*\)\] /DEMO log /'
echo "DEMO aggregate $(head -1 /sys/kernel/security/ima/ascii_runtime_measurements | cut -d' ' -f4)"
if [ -e /dev/tpmrm0 ]; then
  export TPM2TOOLS_TCTI=device:/dev/tpmrm0
  tpm2_pcrread sha256:0,1,4,8,9 | sed -n 's/^ *\([0-9]*\) *: 0x/DEMO pcr \1 /p'
fi
echo "DEMO READY"
while :; do sleep 1000; done
`

// buildInitrd makes the guests' initial RAM file system: Debian's busybox and Debian's
// tpm2-tools with the libraries they need.
func buildInitrd(root *debian.Root, file string) error {
	b := initramfs.New(root.Path("bin/busybox"), guestInit)
	seen := map[string]bool{}
	// tpm2_pcrread is tpm2 by another name; the device's library is loaded at run time.
	if err := addProgram(b, root, "usr/bin/tpm2", "usr/bin/tpm2_pcrread", seen); err != nil {
		return err
	}
	if err := addLibrary(b, root, "libtss2-tcti-device.so.0", seen); err != nil {
		return err
	}
	return b.WriteFile(file)
}

func addProgram(b *initramfs.Builder, root *debian.Root, from, to string, seen map[string]bool) error {
	b.HostFile(root.Path(from), to)
	b.HostFile(root.Path("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"), "lib64/ld-linux-x86-64.so.2")
	return addNeeded(b, root, root.Path(from), seen)
}

// addNeeded adds the libraries that an object names, and theirs.
func addNeeded(b *initramfs.Builder, root *debian.Root, object string, seen map[string]bool) error {
	file, err := os.Open(object)
	if err != nil {
		return err
	}
	defer file.Close()
	f, err := elf.NewFile(file)
	if err != nil {
		return fmt.Errorf("%s: %w", object, err)
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", object, err)
	}
	for _, l := range libs {
		if err := addLibrary(b, root, l, seen); err != nil {
			return err
		}
	}
	return nil
}

// addLibrary adds a library by its name, where Debian's dynamic loader looks for it.
func addLibrary(b *initramfs.Builder, root *debian.Root, name string, seen map[string]bool) error {
	if seen[name] {
		return nil
	}
	seen[name] = true
	for _, dir := range []string{"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"} {
		at := root.Path(path.Join(dir, name))
		if _, err := os.Stat(at); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		b.HostFile(at, path.Join("lib/x86_64-linux-gnu", name))
		return addNeeded(b, root, at, seen)
	}
	return fmt.Errorf("library %s is not among the unpacked packages", name)
}
