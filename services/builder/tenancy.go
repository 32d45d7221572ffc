package builder

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
)

// tenancy is a tenant's toolstack, which is started again whenever it has ended. Its guests run on
// meanwhile: the Builder holds what connects a toolstack to them.
type tenancy struct {
	b        *Builder
	name     string
	listener *os.File // of its API; callers wait in its queue while there is no toolstack

	denied atomic.Int64 // callers turned away

	// mu is held over one change of the toolstack, so that no event is lost between an adoption
	// and the next notice.
	mu     sync.Mutex
	proc   *process.Process
	peer   *rpc.Peer // nil while there is none
	number int       // of the toolstack there is or was last
	deaths deaths
	ending bool
	closed chan struct{}             // with ending
	ends   map[string]protocol.Ended // the last of each guest
	wg     sync.WaitGroup            // its processes' connections
}

// APIPath is the socket of a tenant's API.
func APIPath(runDir, tenant string) string {
	if tenant == DefaultTenant {
		return filepath.Join(runDir, APISocket)
	}
	return filepath.Join(runDir, TenantsDir, tenant+".sock")
}

// qualified is the name of a tenant's guest on this host.
func qualified(tenant, guest string) string {
	if tenant == DefaultTenant {
		return guest
	}
	return tenant + "." + guest // no name has a dot
}

// openTenant starts a tenant's toolstack.
func (b *Builder) openTenant(ctx context.Context, name string) error {
	path := APIPath(b.cfg.RunDir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return err
	}
	// Whoever comes is judged by the toolstack, by who they are.
	l, err := listen(path, 0o666)
	if err != nil {
		return err
	}
	t := &tenancy{b: b, name: name, listener: l, closed: make(chan struct{}), ends: map[string]protocol.Ended{}}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.start(ctx); err != nil {
		l.Close()
		return fmt.Errorf("toolstack of %s: %w", name, err)
	}
	b.mu.Lock()
	closing := b.closing
	if !closing {
		b.tenancies[name] = t
	}
	b.mu.Unlock()
	if closing {
		last := t.proc
		t.proc, t.peer, t.ending = nil, nil, true
		t.end(last)
		l.Close()
		return rpc.Errorf(rpc.Unavailable, "Redoubt is going down")
	}
	if d := b.cfg.Resets[services.Toolstack]; d > 0 {
		t.wg.Go(func() { every(d, t.closed, func() { t.reset() }) })
	}
	return nil
}

func (b *Builder) tenancy(name string) *tenancy {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.tenancies[name]
}

// start starts a toolstack and gives it the guests that run. t.mu is held.
func (t *tenancy) start(ctx context.Context) error {
	b := t.b
	dir := filepath.Join(b.cfg.StateDir, "guests")
	whose := ""
	if t.name != DefaultTenant {
		dir, whose = filepath.Join(b.cfg.StateDir, TenantsDir, t.name), t.name
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	p, err := b.procs.start(services.Toolstack, whose, dir, 0)
	if err != nil {
		return err
	}
	is := newTenure(services.Toolstack, p)
	if err := b.journal.record(b.journal.started(is, "tenant", t.name)); err != nil {
		p.Kill()
		return err
	}
	t.number++
	number := t.number
	peer := rpc.New(p.Control, t.handler(number))
	t.wg.Go(func() {
		_ = peer.Run(context.Background()) // why it ended is the process's to say
	})
	t.proc = p
	t.wg.Go(func() {
		<-p.Done()
		_ = peer.Close()
		b.journal.note(b.journal.ended(is, p.Err(), nil))
		t.replace(p)
	})
	tenant, err := b.ledger.tenant(t.name)
	if err == nil {
		_, err = peer.Call(ctx, protocol.MethodConfigure, protocol.ConfigureToolstack{
			Tenant: t.name, StateDir: services.StateDir, Operators: tenant.Operators, Viewers: tenant.Viewers,
		}, nil)
	}
	for _, g := range b.guestsOf(t.name) {
		if err == nil {
			err = t.adopt(ctx, peer, g)
		}
	}
	for _, e := range t.ends {
		if err == nil && b.guest(e.UUID) == nil { // else it was started again since
			err = peer.Notify(protocol.NoticeEnded, e)
		}
	}
	if err == nil { // callers find what there is, not what is still to be told
		_, err = peer.Call(ctx, protocol.MethodServe, struct{}{}, nil, t.listener)
	}
	if err != nil {
		t.proc = nil // its end is no death to follow
		p.Kill()
		<-p.Done()
		if perr := p.Err(); errors.Is(err, rpc.ErrGone) && perr != nil {
			err = perr
		}
		return err
	}
	t.peer = peer
	return nil
}

// tenant is what is written down of one.
func (l *ledger) tenant(name string) (Tenant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.tenants[name]
	if !ok {
		return t, rpc.Errorf(rpc.NotFound, "tenant %q: no such tenant", name)
	}
	return t, nil
}

// guestsOf are a tenant's guests that run.
func (b *Builder) guestsOf(tenant string) []*guest {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []*guest
	for _, g := range b.guests {
		if g.tenant == tenant {
			out = append(out, g)
		}
	}
	return out
}

// adopt gives a toolstack a guest that it did not start. One that is not quite started yet follows
// when it is.
func (t *tenancy) adopt(ctx context.Context, peer *rpc.Peer, g *guest) error {
	g.mu.Lock()
	in := protocol.Adopt{UUID: g.build.UUID, Emulator: g.emulator, Stopping: g.asked, Events: append([]protocol.Event(nil), g.timeline...)}
	run := g.run
	g.mu.Unlock()
	if run == nil {
		return nil
	}
	in.Domain = run.domain
	_, err := peer.Call(ctx, protocol.MethodAdopt, in, nil, g.ends...)
	return err
}

// replace follows a toolstack's end.
func (t *tenancy) replace(dead *process.Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.proc != dead {
		return
	}
	t.peer = nil
	for t.proc = nil; !t.ending && t.proc == nil; {
		if t.deaths.add(time.Now()) {
			t.b.log.Error("a toolstack dies again and again: it is given up; its guests run on", "tenant", t.name, "err", dead.Err())
			return
		}
		if err := t.start(context.Background()); err != nil {
			t.b.log.Error("toolstack", "tenant", t.name, "err", err)
		}
	}
}

// reset replaces the toolstack now.
func (t *tenancy) reset() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ending || t.peer == nil {
		return false
	}
	last := t.proc
	t.proc, t.peer = nil, nil
	t.end(last)
	if err := t.start(context.Background()); err != nil {
		t.b.log.Error("toolstack", "tenant", t.name, "err", err)
		t.proc = last
		t.wg.Go(func() { t.replace(last) }) // tries again within the bound
		return false
	}
	return true
}

func (t *tenancy) end(p *process.Process) {
	ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
	defer cancel()
	if err := p.Stop(ctx); err != nil {
		t.b.log.Warn("toolstack ended badly", "tenant", t.name, "err", err)
	}
}

// close ends it for good: nothing is asked for any more when it returns.
func (t *tenancy) close() {
	t.mu.Lock()
	t.ending = true
	close(t.closed)
	p := t.proc
	t.mu.Unlock()
	if p != nil {
		t.end(p)
	}
	t.wg.Wait()
	t.listener.Close()
}

// notify tells the toolstack, if there is one.
func (t *tenancy) notify(method string, v any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := v.(protocol.Ended); ok {
		t.ends[e.UUID] = e
	}
	if t.peer != nil {
		_ = t.peer.Notify(method, v) // one that is gone is told by the next adoption
	}
}

// forget drops what is kept of a guest that is destroyed.
func (t *tenancy) forget(uuid string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.ends, uuid)
}

// handler serves the toolstack of that number.
func (t *tenancy) handler(number int) rpc.Handler {
	recorded := t.b.recorded(t.name, func(ctx context.Context, r *rpc.Request) (any, error) {
		if err := t.b.awaitReady(ctx); err != nil {
			closeAll(r.Files)
			return nil, err
		}
		v, err := t.b.fromToolstack(ctx, t, r)
		if built, ok := v.(rpc.WithFiles); ok && err == nil && r.Method == protocol.MethodBuild {
			t.late(number, built)
		}
		return v, err
	})
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		if r.Method == protocol.NoticeDenied {
			return nil, t.note(r)
		}
		return recorded(ctx, r)
	}
}

// late gives a guest to the present toolstack if the one that asked for it is gone.
func (t *tenancy) late(number int, built rpc.WithFiles) {
	out, ok := built.Value.(protocol.Built)
	if !ok {
		return
	}
	g := t.b.guest(out.UUID)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.number != number && t.peer != nil && g != nil {
		if err := t.adopt(context.Background(), t.peer, g); err != nil {
			t.b.log.Warn("toolstack", "tenant", t.name, "err", err)
		}
	}
}

// note records a caller whom the toolstack turned away.
func (t *tenancy) note(r *rpc.Request) error {
	var in protocol.Denied
	if err := r.Decode(&in); err != nil {
		return err
	}
	n := int(t.denied.Add(1)) // without mu: a start may hold it and wait for an answer behind this
	if n <= maxRefusals || n&(n-1) == 0 {
		j := t.b.journal
		e := j.entry(ActCall, services.Toolstack, audit.Refused, "method", clip(in.Method, 128), "tenant", t.name, "count", strconv.Itoa(n))
		e.Actor = audit.Actor{Service: services.Toolstack, UID: in.Caller.UID, PID: in.Caller.PID}
		j.note(e)
	}
	return nil
}

// setTenant makes a tenant or changes it; its toolstack is replaced.
func (b *Builder) setTenant(ctx context.Context, in Tenant) error {
	b.tenantChange.Lock()
	defer b.tenantChange.Unlock()
	if err := b.ledger.set(in); err != nil {
		return err
	}
	if t := b.tenancy(in.Name); t != nil {
		t.reset()
		return nil
	}
	return b.openTenant(ctx, in.Name)
}

// removeTenant forgets a tenant without guests and ends its toolstack.
func (b *Builder) removeTenant(name string) error {
	b.tenantChange.Lock()
	defer b.tenantChange.Unlock()
	if err := b.ledger.remove(name); err != nil {
		return err
	}
	b.mu.Lock()
	t := b.tenancies[name]
	delete(b.tenancies, name)
	b.mu.Unlock()
	if t != nil {
		t.close()
	}
	err := os.Remove(APIPath(b.cfg.RunDir, name))
	return errors.Join(err, os.RemoveAll(filepath.Join(b.cfg.StateDir, TenantsDir, name)))
}

// closeTenants ends every toolstack, so that nothing new is asked for.
func (b *Builder) closeTenants() {
	b.mu.Lock()
	b.closing = true
	all := maps.Clone(b.tenancies)
	b.mu.Unlock()
	var wg sync.WaitGroup
	for _, t := range all {
		wg.Go(t.close)
	}
	wg.Wait()
}
