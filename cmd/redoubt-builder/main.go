// Command redoubt-builder is the Builder, the first process of Redoubt; `redoubt up` starts it.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/builder"
)

func main() {
	sandbox.LauncherMain() // a process on its way into its sandbox goes no further
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("service", "redoubt-builder")
	cfg := builder.Config{Log: log}
	flag.StringVar(&cfg.RunDir, "run-dir", "/run/redoubt", "sockets, logs, lock")
	flag.StringVar(&cfg.StateDir, "state-dir", "/var/lib/redoubt", "guests and their vTPMs")
	flag.StringVar(&cfg.HostTPM, "host-tpm", "", "the host's TPM: a device or a socket; empty for none")
	flag.StringVar(&cfg.Pool, "pool", "/", "directory beneath which kernels and disks of guests must lie")
	resets := flag.String("reset", "", "how often services are replaced: SERVICE=DURATION or SERVICE=off, separated by commas")
	uplinks := flag.String("uplink", "", "interfaces that lead out of tenants' networks: [TENANT=]IFACE[:VLAN], separated by commas")
	users := flag.Uint("users", services.DefaultUsers, "the first of 65536 user ids for services, of nobody else")
	reset := flag.String("store-reset", services.DefaultStoreReset, services.StoreResetUsage)
	ready := flag.Int("ready-fd", -1, "descriptor to write a line to once the API is served")
	flag.Parse()
	cfg.Users = uint32(*users)
	var err error
	if cfg.Resets, err = services.ParseResets(*resets); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-builder: -reset: %v\n", err)
		os.Exit(2)
	}
	if cfg.Uplinks, err = network.ParseUplinks(*uplinks); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-builder: -uplink: %v\n", err)
		os.Exit(2)
	}
	if cfg.StoreReset, err = services.ParseStoreReset(*reset); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-builder: -store-reset: %v\n", err)
		os.Exit(2)
	}
	cfg.Ready = func() {
		if *ready >= 0 {
			f := os.NewFile(uintptr(*ready), "ready")
			_, _ = f.WriteString("ready\n")
			f.Close()
		}
		log.Info("ready")
	}
	if *ready >= 0 {
		unix.CloseOnExec(*ready)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := builder.Run(ctx, cfg); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-builder: %v\n", err)
		os.Exit(1)
	}
}
