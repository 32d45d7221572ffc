// Package bootstrapper is the Bootstrapper: it knows in which order services are started and
// nothing else. It asks the Builder for each one as soon as all that it needs is ready, those that
// do not need one another at once, and leaves when all are ready.
package bootstrapper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// order is which services may be started when: a state machine without a clock. A service is asked
// for once, after all that it needs has become ready.
type order struct {
	waiting map[string][]string // a service, and what it still waits for
	started int                 // asked for and not ready
}

// errOrder is a list of services that cannot all be started.
var errOrder = errors.New("services that need one another, one another's absence, or one twice")

// newOrder refuses a list with a circle, a service twice, or one that needs what is not in it.
func newOrder(list []protocol.Bootable) (*order, error) {
	o := &order{waiting: map[string][]string{}}
	for _, b := range list {
		if _, twice := o.waiting[b.Name]; twice {
			return nil, fmt.Errorf("%w: %s", errOrder, b.Name)
		}
		o.waiting[b.Name] = slices.Clone(b.Needs)
	}
	// What would be started if all went well is everything, or the list is no order.
	dry := &order{waiting: map[string][]string{}}
	for name, needs := range o.waiting {
		dry.waiting[name] = slices.Clone(needs)
	}
	for next := dry.next(); len(next) > 0; {
		var more []string
		for _, name := range next {
			more = append(more, dry.ready(name)...)
		}
		next = more
	}
	if len(dry.waiting) > 0 {
		return nil, errOrder
	}
	return o, nil
}

// next are the services to be asked for now, by name; each is returned once.
func (o *order) next() []string {
	var out []string
	for name, needs := range o.waiting {
		if len(needs) == 0 {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	for _, name := range out {
		delete(o.waiting, name)
	}
	o.started += len(out)
	return out
}

// ready takes in that a service is ready and returns what is to be asked for then.
func (o *order) ready(name string) []string {
	o.started--
	for other, needs := range o.waiting {
		o.waiting[other] = slices.DeleteFunc(needs, func(n string) bool { return n == name })
	}
	return o.next()
}

// done reports whether there is nothing left to do.
func (o *order) done() bool { return len(o.waiting) == 0 && o.started == 0 }

// Serve runs the service until its control connection or ctx ends.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	var peer *rpc.Peer
	peer = rpc.New(control, func(ctx context.Context, r *rpc.Request) (any, error) {
		if r.Method != protocol.MethodBoot {
			return nil, rpc.Errorf(rpc.Refused, "bootstrapper: no call %q", r.Method)
		}
		var in protocol.Boot
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		return struct{}{}, boot(ctx, in.Services, func(ctx context.Context, name string) error {
			log.Info("start", "asked", name)
			_, err := peer.Call(ctx, protocol.MethodStartService, protocol.StartService{Name: name}, nil)
			return err
		})
	})
	return peer.Run(ctx)
}

// boot starts all services; start returns when one is ready. The first failure is the whole's, after
// what was asked for has come or failed.
func boot(ctx context.Context, list []protocol.Bootable, start func(context.Context, string) error) error {
	o, err := newOrder(list)
	if err != nil {
		return err
	}
	type end struct {
		name string
		err  error
	}
	ends := make(chan end)
	ask := func(names []string) {
		for _, name := range names {
			go func() { ends <- end{name, start(ctx, name)} }() // taken below, each one
		}
	}
	ask(o.next())
	var failed error
	for !o.done() && (failed == nil || o.started > 0) {
		e := <-ends
		if e.err != nil && failed == nil {
			failed = e.err // says which one
		}
		if next := o.ready(e.name); failed == nil {
			ask(next)
		} else {
			o.started -= len(next)
		}
	}
	return failed
}
