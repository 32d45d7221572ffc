// Package workload has the program that benchmarks of guests run in them: what UnixBench measures, one kind of work at a time.
package workload

import (
	"context"
	_ "embed"

	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/kmod"
)

//go:embed guest/workload.c
var source []byte

// Works are the kinds, and how many operations of each take some tenths of a second in a guest whose host is emulated.
var Works = []struct {
	Name       string
	Operations int
}{
	{"integer", 300},
	{"floating", 300},
	{"syscall", 3000},
	{"pipe", 3000},
	{"ctxsw", 600},
	{"fork", 60},
	{"exec", 40},
	{"shell", 4},
	{"file256", 4000},
	{"file1024", 4000},
	{"file4096", 3000},
}

// Build returns the program: workload NAME OPERATIONS prints a line "NAME OPERATIONS NANOSECONDS".
func Build(ctx context.Context, root *debian.Root) (string, error) {
	return kmod.Program(ctx, root, "workload", source)
}
