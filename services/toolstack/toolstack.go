package toolstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"connectrpc.com/connect"

	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// Serve runs the service until its control connection or ctx ends.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	debug.SetMemoryLimit(softMemory)
	t := &Toolstack{
		log: log, guests: map[string]*guest{}, byUUID: map[string]*guest{},
		events: newBroadcast[moment](),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var server sync.WaitGroup
	t.builder = rpc.New(control, func(_ context.Context, r *rpc.Request) (any, error) {
		switch r.Method {
		case protocol.MethodConfigure:
			return struct{}{}, t.configure(r)
		case protocol.MethodServe:
			l, err := t.listener(r)
			if err != nil {
				return nil, err
			}
			server.Go(func() {
				if err := t.serve(ctx, l); err != nil {
					log.Error("API", "err", err)
					cancel()
				}
			})
			return struct{}{}, nil
		case protocol.MethodAdopt:
			return struct{}{}, t.adopt(r)
		case protocol.NoticeEvent:
			var e protocol.Event
			if err := r.Decode(&e); err != nil {
				return nil, err
			}
			t.event(e)
			return nil, nil
		case protocol.NoticeEnded:
			var e protocol.Ended
			if err := r.Decode(&e); err != nil {
				return nil, err
			}
			t.ended(e)
			return nil, nil
		}
		return nil, rpc.Errorf(rpc.Refused, "toolstack: no call %q", r.Method)
	})
	err := t.builder.Run(ctx)
	cancel()
	server.Wait()
	return err
}

func (t *Toolstack) configure(r *rpc.Request) error {
	defer closeFiles(r.Files)
	var in protocol.ConfigureToolstack
	if err := r.Decode(&in); err != nil {
		return err
	}
	if t.dir != "" {
		return rpc.Errorf(rpc.Invalid, "toolstack: configured twice")
	}
	t.dir = in.StateDir
	t.roles = &roles{in.Tenant, in.Operators, in.Viewers, func(d protocol.Denied) {
		if err := t.builder.Notify(protocol.NoticeDenied, d); err != nil {
			t.log.Warn("the Builder does not learn of a call that was refused", "method", d.Method, "uid", d.Caller.UID)
		}
	}}
	if err := t.load(); err != nil {
		return fmt.Errorf("guests: %w", err)
	}
	return nil
}

// listener takes the API's socket.
func (t *Toolstack) listener(r *rpc.Request) (net.Listener, error) {
	defer closeFiles(r.Files)
	if len(r.Files) != 1 || t.dir == "" {
		return nil, rpc.Errorf(rpc.Invalid, "toolstack: to serve before it is configured, or without a socket")
	}
	return net.FileListener(r.Files[0])
}

// serve runs the outer API: Connect over HTTP on the Unix socket, whose mode says who may
// come. HTTP/2 without TLS is for the console's two-way stream.
func (t *Toolstack) serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	path, h := redoubtv1connect.NewGuestServiceHandler(&api{t}, connect.WithConditionalHandlerOptions(bounds))
	mux.Handle(path, admit(t.roles, maxSending, h))
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	base, abandon := context.WithCancel(context.Background())
	defer abandon()
	s := &http.Server{
		Handler: mux, Protocols: &p, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10, IdleTimeout: time.Minute,
		BaseContext: func(net.Listener) context.Context { return base },
		ConnContext: withCaller, ConnState: newCrowd(t.roles.knows).state,
	}
	var closing sync.WaitGroup
	stop := context.AfterFunc(ctx, func() {
		closing.Go(func() {
			abandon() // long streams end at once
			c, done := context.WithTimeout(context.Background(), 2*time.Second)
			defer done()
			if s.Shutdown(c) != nil {
				_ = s.Close() // what does not end is cut off
			}
		})
	})
	err := s.Serve(l)
	if !stop() {
		closing.Wait()
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// attestable finds a guest that can be quoted.
func (t *Toolstack) attestable(name string) (*guest, error) {
	g, err := t.find(name)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.saved.Spec.TPM.Disabled:
		return nil, rpc.Errorf(rpc.Unavailable, "guest %q has no TPM: it cannot be attested", name)
	case !g.up():
		return nil, rpc.Errorf(rpc.Unavailable, "guest %q is %s: start it first (`redoubt run %s`)", name, g.state, name)
	}
	return g, nil
}

func (t *Toolstack) nameOf(uuid string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.byUUID[uuid]; g != nil {
		return g.saved.Spec.Name
	}
	return ""
}
