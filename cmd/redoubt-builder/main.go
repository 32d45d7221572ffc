// Command redoubt-builder is the Builder; redoubt-supervisor starts it, and starts it again when it has died.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/builder"
	"redoubt.dev/redoubt/services/supervisor"
)

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("service", "redoubt-builder")
	cfg := builder.Config{Log: log}
	flag.StringVar(&cfg.RunDir, "run-dir", "/run/redoubt", "sockets, logs, lock")
	flag.StringVar(&cfg.StateDir, "state-dir", "/var/lib/redoubt", "guests and their vTPMs")
	flag.StringVar(&cfg.HostTPM, "host-tpm", "", "the host's TPM: a device or a socket; empty for none")
	flag.StringVar(&cfg.Pool, "pool", "/", "directory beneath which kernels and disks of guests must lie")
	resets := flag.String("reset", "", "how often services are replaced: SERVICE=DURATION or SERVICE=off, separated by commas")
	uplinks := flag.String("uplink", "", "interfaces that lead out of tenants' networks: [TENANT=]IFACE[:VLAN], separated by commas")
	quarantine := flag.String("quarantine", "", "where guests in quarantine are and what they reach: VLAN[=ADDRESS,...]")
	users := flag.Uint("users", services.DefaultUsers, "the first of 65536 user ids for services, of nobody else")
	reset := flag.String("store-reset", services.DefaultStoreReset, services.StoreResetUsage)
	ready := flag.Bool("ready", false, "write a line to descriptor "+strconv.Itoa(supervisor.ReadyFD)+" once the API is served")
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
	if cfg.Quarantine, err = network.ParseQuarantine(*quarantine); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-builder: -quarantine: %v\n", err)
		os.Exit(2)
	}
	if cfg.StoreReset, err = services.ParseStoreReset(*reset); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-builder: -store-reset: %v\n", err)
		os.Exit(2)
	}
	f := os.NewFile(supervisor.StoreFD, "supervisor")
	unix.CloseOnExec(supervisor.StoreFD)
	if cfg.Supervisor, err = ipc.FromFile(f); err != nil {
		fmt.Fprintln(os.Stderr, "redoubt-builder: this program is started by redoubt-supervisor, not by hand: use `redoubt up`")
		os.Exit(2)
	}
	if *ready {
		unix.CloseOnExec(supervisor.ReadyFD)
	}
	cfg.Ready = func() {
		if *ready {
			f := os.NewFile(supervisor.ReadyFD, "ready")
			_, _ = f.WriteString("ready\n") // whom it was for may have heard it from the last one
			f.Close()
		}
		log.Info("ready")
	}
	cfg.Reset = func() { os.Exit(supervisor.ExitReset) }
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := builder.Run(ctx, cfg); err != nil {
		fmt.Fprintf(os.Stderr, "redoubt-builder: %v\n", err)
		os.Exit(1)
	}
}
