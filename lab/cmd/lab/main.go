// Command lab fetches what tests need and runs commands in the nested test machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/isolate/attack"
	"redoubt.dev/redoubt/lab"
	"redoubt.dev/redoubt/lab/debian"
	"redoubt.dev/redoubt/lab/workload"
)

const usage = `usage:
  lab fetch                                       bring packages into the cache, and build kernel modules for tests
  lab run [-timeout D] [-memory MiB] [-cpus N] -- CMD...
                                                  run a command in the lab
  lab test [-timeout D] [-cpus N] [-v] [-run R] [-bench R] PKG...
                                                  run the tests that need KVM
`

// The exit status of lab itself, where it is not the command's.
const (
	exitFailed = 125
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	status, err := run(ctx, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
	}
	os.Exit(status)
}

func run(ctx context.Context, args []string) (int, error) {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return exitUsage, nil
	}
	flags := flag.NewFlagSet("lab "+args[0], flag.ContinueOnError)
	timeout := flags.Duration("timeout", 10*time.Minute, "time limit")
	memory := flags.Int("memory", 0, "L1's memory in MiB (0: 6144)")
	cpus := flags.Int("cpus", 0, "L1's processors (0: 1)")
	verbose := flags.Bool("v", false, "print every test")
	filter := flags.String("run", "", "tests to run (default: those that need KVM)")
	bench := flags.String("bench", "", "benchmarks to run instead")
	if err := flags.Parse(args[1:]); err != nil {
		return exitUsage, nil
	}
	if args[0] == "fetch" {
		return fetch(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, *timeout, fmt.Errorf("time limit of %v", *timeout))
	defer cancel()
	var status int
	var err error
	switch args[0] {
	case "run":
		status, err = lab.Run(ctx, lab.Job{Args: flags.Args(), Output: os.Stdout, MemoryMiB: *memory, CPUs: *cpus})
	case "test":
		status, err = lab.Test(ctx, lab.TestRun{
			Packages: flags.Args(), Run: *filter, Bench: *bench, Verbose: *verbose, CPUs: *cpus, Output: os.Stdout,
		})
	default:
		fmt.Fprint(os.Stderr, usage)
		return exitUsage, nil
	}
	if err != nil {
		return exitFailed, err
	}
	return status, nil
}

func fetch(ctx context.Context) (int, error) {
	root, err := debian.Fetch(ctx, os.Stderr)
	if errors.Is(err, debian.ErrUnsupported) {
		return exitUsage, fmt.Errorf("%w; needed:\n%s", err, debian.List())
	}
	if err != nil {
		return 1, err
	}
	// What tests load into guests, built where the cache can be written: in the lab it cannot.
	for _, k := range attack.Kernels {
		if _, err := attack.Build(ctx, root, k); err != nil {
			return 1, err
		}
	}
	if _, err := workload.Build(ctx, root); err != nil {
		return 1, err
	}
	return 0, nil
}
