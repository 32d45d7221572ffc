package builder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/sandbox"
)

// AdminSocket is the name, in the run directory, of the socket on which the Builder itself answers
// root, and nobody else.
const AdminSocket = "builder.sock"

// MethodServices lists the processes that run.
const MethodServices = "services" // nothing → []RunningService

// MethodReset replaces a service's processes now, as its timer would.
const MethodReset = "reset" // Reset → ResetDone

// Calls that are about tenants.
const (
	MethodTenants      = "tenants"       // nothing → []Tenant
	MethodSetTenant    = "set-tenant"    // Tenant → nothing: it is there, its toolstack runs
	MethodRemoveTenant = "remove-tenant" // Tenant, of which the name counts → nothing
)

// Reset names the service and, where it is not to be all, the guest.
type Reset struct {
	Service string `json:"service"`
	Guest   string `json:"guest,omitempty"`
}

// ResetDone says how many were replaced.
type ResetDone struct {
	Replaced int `json:"replaced"`
}

// RunningService is a process that the Builder started and what is declared for it.
type RunningService struct {
	Service  string        `json:"service"`
	Label    string        `json:"label"`
	PID      int           `json:"pid"`
	Declared sandbox.State `json:"declared"`
}

// maxAdmins bounds the connections of the admin socket.
const maxAdmins = 16

// serveAdmin answers on the admin socket until ctx ends.
func (b *Builder) serveAdmin(ctx context.Context) error {
	path := filepath.Join(b.cfg.RunDir, AdminSocket)
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return err
	}
	b.wg.Go(func() {
		defer context.AfterFunc(ctx, func() { l.Close() })()
		var conns sync.WaitGroup
		defer conns.Wait()
		places := make(chan struct{}, maxAdmins)
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			places <- struct{}{}
			conns.Go(func() {
				defer func() { <-places }()
				b.admin(ctx, c)
			})
		}
	})
	return nil
}

func (b *Builder) admin(ctx context.Context, c *net.UnixConn) {
	f, err := c.File()
	_ = c.Close()
	if err != nil {
		return
	}
	conn, err := ipc.FromFile(f)
	if err != nil {
		return
	}
	_ = rpc.New(conn, func(ctx context.Context, r *rpc.Request) (any, error) {
		closeAll(r.Files)
		switch r.Method {
		case MethodServices:
			return b.procs.list(), nil
		case MethodReset:
			var in Reset
			if err := r.Decode(&in); err != nil {
				return nil, err
			}
			return b.reset(in)
		case MethodTenants:
			return b.ledger.all(), nil
		case MethodSetTenant:
			var in Tenant
			if err := r.Decode(&in); err != nil {
				return nil, err
			}
			return struct{}{}, b.recordTenant(r.Method, in.Name, func() error { return b.setTenant(ctx, in) })
		case MethodRemoveTenant:
			var in Tenant
			if err := r.Decode(&in); err != nil {
				return nil, err
			}
			return struct{}{}, b.recordTenant(r.Method, in.Name, func() error { return b.removeTenant(in.Name) })
		}
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q", r.Method)
	}).Run(ctx)
}

// recordTenant has an act on a tenant in the log before it is done and with what came of it.
func (b *Builder) recordTenant(method, tenant string, act func() error) error {
	e := b.journal.entry(method, tenant, audit.Asked)
	if err := b.journal.record(e); err != nil {
		return err
	}
	err := act()
	e.Time, e.Outcome = time.Now(), outcome(err)
	if err != nil {
		e = withDetail(e, "reason", err.Error())
	}
	return errors.Join(err, b.journal.record(e))
}

// list is what runs, by label.
func (p *processes) list() []RunningService {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := []RunningService{}
	for _, i := range p.running {
		if i.spec != nil { // else it is being started
			out = append(out, RunningService{i.service.Name, i.spec.Name, i.pid, i.spec.Declared()})
		}
	}
	slices.SortFunc(out, func(a, b RunningService) int { return strings.Compare(a.Label, b.Label) })
	return out
}
