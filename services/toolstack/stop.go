package toolstack

import (
	"context"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// stop ends a guest. One that this toolstack has started is known to the Builder only when that is over.
func (t *Toolstack) stop(ctx context.Context, name string, grace time.Duration) (*guest, error) {
	g, err := t.find(name)
	if err != nil {
		return nil, err
	}
	up := false
	if err := g.await(ctx, func() bool {
		if g.launching {
			return false
		}
		if up = g.up(); up {
			g.stopping()
		}
		return true
	}); err != nil || !up {
		return g, err
	}
	// What comes of it is heard here, though the caller hangs up.
	_, err = t.builder.Call(context.WithoutCancel(ctx), protocol.MethodStop,
		protocol.Stop{UUID: g.saved.UUID, Name: name, Grace: grace, Caller: caller(ctx)}, nil)
	g.stopped(err)
	if err != nil {
		return nil, err
	}
	return g, g.await(ctx, func() bool { return !g.up() })
}

// stopping says that the Builder is asked to stop the guest. mu is held.
func (g *guest) stopping() {
	g.stops++
	if g.state != Stopping {
		g.before = g.state
		g.set(Stopping, "")
	}
}

// stopped is its answer. A guest that nobody stops is what it was, or what it has become meanwhile.
func (g *guest) stopped(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stops--
	if err != nil && g.state == Stopping && g.stops == 0 && g.before != "" {
		g.set(g.before, "")
	}
}

// remove destroys a guest that is down. A caller that hangs up does not leave half of that behind: it is finished without them.
func (t *Toolstack) remove(ctx context.Context, name string) error {
	g, err := t.find(name)
	if err != nil {
		return err
	}
	if err := g.remove(name); err != nil {
		return err
	}
	// The vTPM first: a record without a vTPM can be removed again, a vTPM without a record not.
	_, err = t.builder.Call(context.WithoutCancel(ctx), protocol.MethodDestroy,
		protocol.Destroy{UUID: g.saved.UUID, Name: name, Caller: caller(ctx)}, nil)
	t.mu.Lock()
	defer t.mu.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removing = false
	if err == nil {
		t.forget(g)
	}
	return err
}

// remove has nobody take the guest up while it is removed.
func (g *guest) remove(name string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.up():
		return rpc.Errorf(rpc.Exists, "guest %q is running: stop it first (`redoubt stop %s`)", name, name)
	case g.launching: // it has ended already
		return errLaunching(name)
	case g.removing:
		return errRemoved(name)
	case g.gone: // since it was looked up
		return rpc.Errorf(rpc.NotFound, "guest %q: no such guest (see `redoubt ps --all`)", name)
	}
	g.removing = true
	return nil
}
