// Package programs finds the external programs Redoubt runs (QEMU, swtpm).
//
// They come from the host, or, where REDOUBT_TOOLS names a directory, from Debian packages
// unpacked beneath it; the dynamic loader is then pointed at the libraries beside them.
package programs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Root is the directory the programs' packages are unpacked beneath; "" means the host's own.
func Root() string { return os.Getenv("REDOUBT_TOOLS") }

// Path is the path of a file that a program's package installs, such as
// /usr/share/seabios/bios-256k.bin.
func Path(file string) string { return filepath.Join("/", Root(), file) }

// Find returns the path of the program name.
func Find(name string) (string, error) {
	if Root() == "" {
		p, err := exec.LookPath(name)
		if err != nil {
			return "", fmt.Errorf("%s is not installed (Debian package: %s)", name, debianPackage(name))
		}
		return p, nil
	}
	for _, dir := range []string{"usr/bin", "usr/sbin", "bin", "sbin"} {
		p := Path(filepath.Join(dir, name))
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not beneath REDOUBT_TOOLS=%s", name, Root())
}

// Libraries are the directories of the programs' libraries; none means the host's own.
func Libraries() []string {
	if Root() == "" {
		return nil
	}
	return []string{Path("usr/lib/x86_64-linux-gnu"), Path("lib/x86_64-linux-gnu"), Path("usr/lib/x86_64-linux-gnu/swtpm")}
}

// Env is the environment a program needs, and no more.
func Env() []string {
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	if l := Libraries(); l != nil {
		env = append(env, "LD_LIBRARY_PATH="+strings.Join(l, ":"))
	}
	return env
}

// Command prepares a program with its environment; it inherits no descriptor but those the
// caller adds.
func Command(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	path, err := Find(name)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = Env()
	return cmd, nil
}

func debianPackage(program string) string {
	switch program {
	case "qemu-system-x86_64":
		return "qemu-system-x86"
	case "qemu-img":
		return "qemu-utils"
	}
	return program
}
