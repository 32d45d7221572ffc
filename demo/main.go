// Command demo shows what Redoubt is for, on real input: Debian's kernels and programs in
// guests of the built programs, through the command line an operator uses.
//
// It runs in directories of its own, needs no KVM, and leaves nothing behind, neither after a
// failure nor after Ctrl-C. Its last line counts the steps; the exit status is 0 where all
// went as they should.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/lab/debian"
)

func main() { os.Exit(run()) }

func run() int {
	bin := flag.String("bin", "bin", "directory of the built programs")
	limit := flag.Duration("timeout", 5*time.Minute, "time limit of the whole demo")
	part := flag.String("part", "", "only a part of it: fenced")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop() // the last thing: a second Ctrl-C does not interrupt the tidying
	ctx, cancel := context.WithTimeoutCause(ctx, *limit, fmt.Errorf("time limit of %v", *limit))
	defer cancel()

	h, err := newHost(*bin)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	all := steps()
	if *part == "fenced" {
		all = fencedSteps()
	}
	d := &demo{host: h, to: os.Stdout}
	d.say("Redoubt: trusted virtual machines. Each guest has its own TPM and is measured and attested")
	d.say("from its first instruction. Below: unmodified Debian kernels, Debian's programs in them.")
	ok := d.play(ctx, all)
	if err := d.tidy(); err != nil {
		fmt.Fprintln(os.Stderr, "demo: tidying:", err)
		ok = min(ok, len(all)-1) // nothing left behind is a promise too
	}
	fmt.Printf("demo: %d steps, %d ok\n", len(all), ok)
	if ok != len(all) {
		return 1
	}
	return 0
}

// newHost prepares the directories of a Redoubt of the demo's own.
func newHost(bin string) (*host, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	h := &host{bin: bin, program: filepath.Join(bin, "redoubt"), probe: filepath.Join(bin, "attack-probe"), guest: filepath.Join(bin, "e2e-guest")}
	for _, p := range []string{h.program, h.probe, h.guest} {
		if _, err := os.Stat(p); err != nil {
			return nil, fmt.Errorf("%w: run `make demo`", err)
		}
	}
	cache, err := debian.Open()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "redoubt-demo-")
	if err != nil {
		return nil, err
	}
	h.dir, h.cache = dir, cache
	for _, d := range []string{"run", "state"} {
		if err := os.Mkdir(h.path(d), 0o700); err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
	}
	return h, nil
}
