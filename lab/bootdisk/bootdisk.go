// Package bootdisk makes disk images that firmware boots, for tests: one FAT file system with
// syslinux in its boot sector (BIOS) and systemd-boot in EFI/BOOT (UEFI), a kernel and an
// initrd. Nothing is mounted and no device is needed.
package bootdisk

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"redoubt.dev/redoubt/lab/debian"
)

// Make writes the image to path. scratch is a directory for files on the way.
func Make(ctx context.Context, r *debian.Root, path, scratch, kernel, initrd, cmdline string) error {
	const sectors = 96 << 20 / 512
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(path, sectors*512); err != nil {
		return err
	}
	run := func(name string, args ...string) error {
		cmd := r.Command(ctx, name, args...)
		// syslinux runs mtools by name; mtools must not mind the odd geometry.
		cmd.Env = slices.Concat(cmd.Env, []string{"PATH=" + r.Path("usr/bin") + ":" + os.Getenv("PATH"), "MTOOLS_SKIP_CHECK=1"})
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %v: %w: %s", name, args, err, out)
		}
		return nil
	}
	if err := run("mformat", "-i", path, "-T", fmt.Sprint(sectors), "-h", "64", "-s", "32", "-F", "::"); err != nil {
		return err
	}
	if err := run("mmd", "-i", path, "::EFI", "::EFI/BOOT", "::loader", "::loader/entries"); err != nil {
		return err
	}
	texts := map[string]string{
		"syslinux.cfg": "DEFAULT linux\nLABEL linux\n KERNEL /vmlinuz\n INITRD /initrd\n APPEND " + cmdline + "\n",
		"loader.conf":  "timeout 0\ndefault linux.conf\n",
		"linux.conf":   "title linux\nlinux /vmlinuz\ninitrd /initrd\noptions " + cmdline + "\n",
	}
	for name, text := range texts {
		if err := os.WriteFile(filepath.Join(scratch, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	for _, f := range [][2]string{
		{kernel, "vmlinuz"},
		{initrd, "initrd"},
		{filepath.Join(scratch, "syslinux.cfg"), "syslinux.cfg"},
		{r.Path("usr/lib/systemd/boot/efi/systemd-bootx64.efi"), "EFI/BOOT/BOOTX64.EFI"},
		{filepath.Join(scratch, "loader.conf"), "loader/loader.conf"},
		{filepath.Join(scratch, "linux.conf"), "loader/entries/linux.conf"},
	} {
		if err := run("mcopy", "-i", path, f[0], "::"+f[1]); err != nil {
			return err
		}
	}
	return run("syslinux", "--install", path)
}
