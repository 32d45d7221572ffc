// Command redoubt-supervisor is the first process of Redoubt; `redoubt up` starts it. It keeps the
// Builder running, which gets the arguments behind "--".
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services/supervisor"
)

func main() {
	const name = "redoubt-supervisor"
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("service", name)
	lock := flag.String("lock", "/run/redoubt/lock", "file that only one supervisor can have")
	ready := flag.Int("ready-fd", -1, "descriptor to which the Builder writes a line once the API is served")
	flag.Parse()
	err := func() error {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		cfg := supervisor.Config{
			Lock: *lock, Program: filepath.Join(filepath.Dir(self), "redoubt-builder"), Args: flag.Args(),
			Env: process.Env(), Log: log, Output: os.Stderr,
		}
		if *ready >= 0 {
			unix.CloseOnExec(*ready)
			cfg.Ready = os.NewFile(uintptr(*ready), "ready")
			cfg.Args = append([]string{"-ready"}, cfg.Args...)
		}
		// Where a group with processes can have no limited children, this process moves as the Builder
		// would, which cannot take it along. The Builder says what is wrong, if anything.
		_, _ = sandbox.FindCgroup()
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
		defer stop()
		return supervisor.Run(ctx, cfg)
	}()
	if err != nil {
		if !supervisor.Ended(err) { // else the Builder has said it
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		}
		os.Exit(1)
	}
}
