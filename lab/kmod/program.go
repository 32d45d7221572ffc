package kmod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"redoubt.dev/redoubt/lab/debian"
)

// Program returns the file of a program for guests, of one C file that needs no library, built with what builds modules. What was built
// before is not built again.
func Program(ctx context.Context, root *debian.Root, name string, source []byte) (string, error) {
	scratch, err := root.Scratch()
	if err != nil {
		return "", err
	}
	final := filepath.Join(scratch, "program-"+name+"-"+digest(map[string][]byte{name: source}))
	if _, err := os.Stat(final); err == nil {
		return final, nil
	}
	work, err := os.MkdirTemp(scratch, "program-")
	if err != nil {
		return "", fmt.Errorf("program %s is not built yet, and cannot be here (`make fetch` does): %w", name, err)
	}
	if err := os.WriteFile(filepath.Join(work, name+".c"), source, 0o644); err != nil {
		return "", err
	}
	said, err := inTree(root.Headers(), work, func() *exec.Cmd {
		return exec.CommandContext(ctx, "/usr/bin/x86_64-linux-gnu-gcc-12", "-O2", "-Wall", "-Werror", "-static", "-nostdlib", "-ffreestanding",
			"-fno-stack-protector", "-fno-pie", "-no-pie", "-fcf-protection=none", "-s", "-o", sources+"/"+name, sources+"/"+name+".c")
	})
	if err != nil {
		return "", errors.Join(fmt.Errorf("program %s: %w:\n%s", name, err, said), os.RemoveAll(work))
	}
	return final, errors.Join(os.Rename(filepath.Join(work, name), final), os.RemoveAll(work))
}
