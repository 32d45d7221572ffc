// Package builder is the Builder: it starts every other process, makes guests, measures what
// it hands to them, and carries descriptors from one process to another. Nobody else opens
// /dev/kvm or makes guest memory.
//
// A guest's start: the emulator runs the kernel at once; beside it the store is told, the
// vTPM back end attached, the vTPM created and the measurements made. What joins the two
// sides again is the gate, in the vTPM back end.
//
// Failure: whatever goes wrong on the vTPM's side fails the guest closed. An emulator that
// ends, however it ends, yields one outcome. When the Builder dies, guests go on: what they are made
// of is kept by the Supervisor, and the next Builder takes it over (inherit.go).
package builder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	inspected "redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/pciback/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/response"
	"redoubt.dev/redoubt/services/store/kept"
	"redoubt.dev/redoubt/services/trust"
	"redoubt.dev/redoubt/services/validator"
	vtpm "redoubt.dev/redoubt/services/vtpm/kept"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
)

// Config of a Builder.
type Config struct {
	RunDir   string // sockets, logs and the lock; lost at a reboot
	StateDir string // what must outlive the host's reboot
	HostTPM  string // device or socket of the host's TPM; "" for none
	Pool     string // beneath which files that specs name must lie; "": /
	// Resets says how often a service is replaced that runs well; 0 or nothing: never. Only those in
	// services.Resettable may be named.
	Resets map[string]time.Duration
	Users  uint32 // the first of 65536 user ids for services; 0: services.DefaultUsers
	// StoreReset is after how many responses the store's worker is replaced, -1 for never; 0: 1.
	StoreReset int
	Uplinks    []network.HostLink // what leads out of the guests' network
	Quarantine network.Quarantine // what a guest in quarantine reaches
	Log        *slog.Logger
	Ready      func() // called once the API is served
	// Supervisor keeps what must outlive this process; see fdstore.Open.
	Supervisor *ipc.Conn
	// Reset ends this process at once, to be followed by another one. It does not return.
	Reset func()
}

// Builder is the running service.
type Builder struct {
	cfg   Config
	log   *slog.Logger
	procs *launch.Launcher

	kept       *fdstore.Store
	left       *fdstore.Left // of the last Builder, until this one is ready
	devices    vtpm.Devices
	generation uint64

	journal    *audit.Journal
	pcibacks   *asked.Asker
	inspectors *inspected.Asker
	ledger     *trust.Ledger
	followed   bool // the guests that were inherited are; Run's

	validations *validator.Manager
	store       *kept.Store
	vtpm        *vtpm.Manager

	tenantChange sync.Mutex   // over one change of a tenant
	starts       sync.RWMutex // held for reading over each start of an emulator

	mu        sync.Mutex
	guests    map[string]*guest
	tenancies map[string]*tenancy
	domains   domains
	closing   bool // no new guests

	ready chan struct{} // closed when all services are

	wg sync.WaitGroup // everything Run must wait for
}

// stopGrace bounds how long children may take to end with their Builder.
const stopGrace = 10 * time.Second

// pcibackLimit bounds what a PCIBack may take to answer, then to leave.
const pcibackLimit = 10 * time.Second

// Run starts the services, serves until ctx ends or a service dies, and ends everything.
func Run(ctx context.Context, cfg Config) error {
	b := &Builder{cfg: cfg, log: cfg.Log, guests: map[string]*guest{}, tenancies: map[string]*tenancy{}, ready: make(chan struct{}), domains: domains{server.FirstGuest, map[tree.Domain]bool{}}}
	logs := filepath.Join(cfg.RunDir, services.LogDir)
	if b.cfg.Pool == "" {
		b.cfg.Pool = "/"
	}
	for _, d := range []string{cfg.RunDir, logs, cfg.StateDir} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	var err error
	if b.kept, b.left, b.generation, err = fdstore.Open(cfg.Supervisor); err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	defer b.kept.Close()
	if b.procs, err = launch.Open(logs, cfg.Users, b.kept); err != nil {
		return err
	}
	alive, err := b.inherit()
	if err != nil {
		return err
	}
	if b.ledger, err = trust.Open(cfg.StateDir, b.cfg.Pool); err != nil {
		return err
	}
	actor := audit.Actor{Service: services.Builder, UID: uint32(os.Getuid()), PID: os.Getpid()}
	if b.journal, err = audit.OpenJournal(cfg.StateDir, actor, cfg.Log, alive); err != nil {
		return err
	}
	defer b.journal.Close()
	self := audit.NewInstance(services.Builder, os.Getpid())
	if err := b.journal.Record(b.journal.Started(self)); err != nil {
		return err
	}
	defer func() { b.journal.Note(b.journal.Ended(self, nil, nil)) }()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	b.wg.Go(func() {
		select {
		case <-b.kept.Gone():
			cancel(errors.New("the supervisor died"))
		case <-ctx.Done():
		}
	})
	defer func() {
		cancel(nil)
		// The toolstacks first, so that nothing new is asked for; then guests; then the rest.
		b.closeTenants()
		b.endGuests()
		b.closeNetworks()
		if b.vtpm != nil {
			b.vtpm.Close(stopGrace)
		}
		if b.store != nil {
			b.store.Close(stopGrace)
		}
		b.wg.Wait()
		if b.pcibacks != nil {
			b.pcibacks.Wait()
			b.inspectors.Close()
		}
		b.procs.Wait()
	}()
	start := func(service string) func(guest string) (*process.Process, error) {
		return func(guest string) (*process.Process, error) {
			return b.procs.Start(service, launch.Order{Whose: guest})
		}
	}
	b.pcibacks = &asked.Asker{Log: b.log, Journal: b.journal, Limit: pcibackLimit, Start: start(services.PCIBack)}
	b.inspectors = inspected.New(b.journal, start(services.Inspector))
	responses, err := response.Open(filepath.Join(cfg.StateDir, response.LedgerFile))
	if err != nil {
		return err
	}
	if b.validations, err = validator.New(validator.Options{
		Dir: filepath.Join(cfg.StateDir, "validation"), Log: b.log, Journal: b.journal, Ledger: responses,
		Scanner: inspected.NewScanner(b.journal, start(services.Inspector)),
		Revoke: func(ctx context.Context, uuid string, revoked bool) error {
			return b.vtpm.Call(ctx, protocol.MethodRevoke, protocol.Revoke{UUID: uuid, Revoked: revoked}, nil)
		},
	}); err != nil {
		return err
	}
	b.resume(ctx)
	if err := b.boot(ctx, map[string]func(context.Context) error{
		services.StoreState: func(ctx context.Context) (err error) {
			if b.store, err = b.openStore(ctx, cancel); err != nil {
				return err
			}
			b.holdInherited()
			return b.store.Layout(ctx)
		},
		services.VTPM:      func(ctx context.Context) error { return b.startVTPM(ctx, cancel) },
		services.Toolstack: b.openTenants,
	}); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return err
	}
	if err := b.serveAdmin(ctx); err != nil {
		return err
	}
	b.followInherited()
	b.followed = true
	b.kept.Discard(b.left)
	b.resets(ctx)
	close(b.ready)
	cfg.Ready()
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// openStore starts the store. What it cannot be saved from ends the Builder by fatal.
func (b *Builder) openStore(ctx context.Context, fatal func(error)) (*kept.Store, error) {
	return kept.Open(ctx, kept.Options{
		RunDir: b.cfg.RunDir, Seen: services.StateDir, Reset: b.cfg.StoreReset, Log: b.log, Journal: b.journal, Kept: b.kept, Left: b.left,
		Start: func(dir string) (keeper.Process, error) {
			return b.procs.Start(services.StoreState, launch.Order{StateDir: dir})
		},
		Worker: func() (*process.Process, error) { return b.procs.Start(services.StoreLogic, launch.Order{}) },
		Guests: func() []string { return b.names(func(*guest) bool { return true }) },
		Lost:   fatal,
	})
}
