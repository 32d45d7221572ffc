// Package validator is the Builder's side of validating guests' disks: when a guest is looked at (package
// validation/schedule decides), how (a hold, a snapshot, an inspector), and what follows. It keeps guests' baselines.
//
//	guest's processors held by its emulator ─▶ safe? ─▶ BlkBack begins a snapshot ─▶ the guest goes on
//	an inspector of its own reads the disks as they were ─▶ what deviates from the signed baseline
//	─▶ a second snapshot confirms it ─▶ responses, in the ledger before they are in force
//
// An inspector reads what a hostile guest wrote: it may be taken over, die or lie, which costs its own guest's verdict. Its
// answer is read here as JSON, within bounds.
package validator

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/response"
	"redoubt.dev/redoubt/spec"
)

// A Guest is one that runs, as its Builder has it.
type Guest interface {
	UUID() string
	Name() string // as the log has it
	Owner() (tenant, name string)
	Spec() *spec.Guest
	// Hold holds its processors, LetGo lets them go on; see protocol.Hold for the files.
	Hold(ctx context.Context, in protocol.Hold, files ...*os.File) (protocol.Held, error)
	LetGo(ctx context.Context, who protocol.Holder) (protocol.WasHeld, error)
	// Snapshot begins a snapshot of its disks in place of the last one, once it stands still; see protocol.Snapshot.
	Snapshot(ctx context.Context, validated, force bool, stopped, begun *os.File) (protocol.Snapshotted, error)
	DropSnapshot(ctx context.Context) error
	// View is what an inspector needs to read them as they were.
	View() ([]asked.Disk, error)
	// Restrict has its NICs and disks be as the ledger says.
	Restrict(ctx context.Context) error
	// Fail ends it.
	Fail(reason string)
	// Tell adds to its timeline.
	Tell(kind, text string)
}

// A Scanner has an inspector read disks, which it closes: asked.Scanner.
type Scanner interface {
	Scan(ctx context.Context, guest string, disks []asked.Disk, q asked.Scan) (asked.Answer, error)
}

// Options of a Manager.
type Options struct {
	Dir     string // where baselines lie, a directory a guest
	Log     *slog.Logger
	Journal *audit.Journal
	Scanner Scanner
	Ledger  *response.Ledger
	// Revoke has a guest's vTPM opened no more, or again.
	Revoke func(ctx context.Context, uuid string, revoked bool) error
}

// A Manager validates guests. Its methods may be called by several goroutines.
type Manager struct {
	Options
	mu      sync.Mutex
	workers map[string]*worker // by the guest's UUID
}

// New makes one.
func New(o Options) (*Manager, error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	return &Manager{Options: o, workers: map[string]*worker{}}, nil
}

// Begin has a guest that runs validated from now on, until End.
func (m *Manager) Begin(g Guest) {
	if len(g.Spec().Disks) == 0 {
		return
	}
	w := newWorker(m, g)
	m.mu.Lock()
	m.workers[g.UUID()] = w
	m.mu.Unlock()
	go w.run()
}

// End ends that, and waits.
func (m *Manager) End(uuid string) {
	m.mu.Lock()
	w := m.workers[uuid]
	delete(m.workers, uuid)
	m.mu.Unlock()
	if w != nil {
		w.cancel()
		<-w.done
	}
}

// Forget removes what is known of a guest that is no more.
func (m *Manager) Forget(uuid string) error {
	if err := m.Ledger.Remove(uuid); err != nil {
		return err
	}
	return os.RemoveAll(m.dir(uuid))
}

func (m *Manager) worker(uuid string) (*worker, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if w := m.workers[uuid]; w != nil {
		return w, nil
	}
	return nil, rpc.Errorf(rpc.Unavailable, "the guest is down or has no disks: only disks of a running guest are validated")
}

// An ask is what somebody wants done between two validations, or one.
type ask struct {
	do   func(ctx context.Context, w *worker) error
	done chan error
}

// with has the guest's worker do something and waits for it.
func (m *Manager) with(ctx context.Context, uuid string, do func(context.Context, *worker) error) error {
	w, err := m.worker(uuid)
	if err != nil {
		return err
	}
	a := &ask{do: func(wctx context.Context, w *worker) error {
		// Who asked may have gone: then it is not done.
		both, cancel := context.WithCancel(wctx)
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		return do(both, w)
	}, done: make(chan error, 1)}
	select {
	case w.asks <- a:
	case <-w.ctx.Done():
		return errDown
	case <-ctx.Done():
		return ctx.Err()
	}
	err = <-a.done
	if err != nil && w.ctx.Err() != nil {
		return errDown
	}
	return err
}

var errDown = rpc.Errorf(rpc.Unavailable, "the guest has gone down: its disks are validated while it runs")

func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
