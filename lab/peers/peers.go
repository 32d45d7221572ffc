// Package peers brings the virtual machine monitors that Redoubt's benchmarks compare it with
// and that no Debian package holds. QEMU, the other peer, comes with package debian.
//
// A peer is built on the host, in the cache: the lab has neither a network nor the time.
package peers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"redoubt.dev/redoubt/lab/debian"
)

// The version of gokvm that figures are given for; it is the last one published.
const (
	gokvmModule  = "github.com/bobuhiro11/gokvm"
	gokvmVersion = "v0.0.8-0.20231003020000-f53faca69d28"
)

// Gokvm is the path of the gokvm program, a small monitor in Go, where [Build] has put it. The
// error says how to bring it there.
func Gokvm(root *debian.Root) (string, error) {
	dir, err := gokvmDir(root)
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "gokvm")
	if _, err := os.Stat(program); err != nil {
		return "", fmt.Errorf("peer gokvm: %w: run `go run ./lab/cmd/peers`", err)
	}
	return program, nil
}

// Build builds the peers, unless they are there already. It takes their sources through the Go
// module proxy; this module's own requirements are not touched.
func Build(ctx context.Context, root *debian.Root) error {
	dir, err := gokvmDir(root)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "gokvm")); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "install", gokvmModule+"@"+gokvmVersion)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOBIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("peer gokvm: go install: %w\n%s", err, out)
	}
	return nil
}

// gokvmDir is named after the version: another version is another directory.
func gokvmDir(root *debian.Root) (string, error) {
	scratch, err := root.Scratch()
	if err != nil {
		return "", err
	}
	return filepath.Join(scratch, "gokvm-"+gokvmVersion), nil
}
