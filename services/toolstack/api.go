package toolstack

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"time"

	"connectrpc.com/connect"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// api is the outer API over a Toolstack.
type api struct{ t *Toolstack }

// status gives an error its code.
func status(err error) error {
	if err == nil {
		return nil
	}
	code := connect.CodeInternal
	var se *spec.Error
	switch {
	case errors.As(err, &se):
		code = connect.CodeInvalidArgument
	case errors.Is(err, rpc.ErrGone): // the next Builder's toolstack knows what became of it
		return connect.NewError(connect.CodeAborted, errors.New("the Builder was replaced over this: ask again"))
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	case errors.Is(err, context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	default:
		switch rpc.KindOf(err) {
		case rpc.Invalid:
			code = connect.CodeInvalidArgument
		case rpc.NotFound:
			code = connect.CodeNotFound
		case rpc.Exists:
			code = connect.CodeFailedPrecondition
		case rpc.Refused:
			code = connect.CodePermissionDenied
		case rpc.Unavailable:
			code = connect.CodeUnavailable
		}
	}
	return connect.NewError(code, err)
}

var states = map[State]v1.State{
	Starting: v1.State_STATE_STARTING, Running: v1.State_STATE_RUNNING, Stopping: v1.State_STATE_STOPPING,
	Stopped: v1.State_STATE_STOPPED, Failed: v1.State_STATE_FAILED,
}

func (g *guest) proto(timeline bool) *v1.Guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	s, err := json.Marshal(g.saved.Spec)
	if err != nil {
		s = []byte("{}")
	}
	out := &v1.Guest{
		Name: g.saved.Spec.Name, Uuid: g.saved.UUID, State: states[g.state], Reason: g.reason,
		Emulator: string(g.emulator), Domain: g.domain, SpecJson: string(s),
		VtpmInstance: uint32(g.saved.Instance), EkSha256: g.saved.EKSHA256, Starts: g.starts,
	}
	if timeline {
		for _, e := range g.timeline {
			out.Timeline = append(out.Timeline, event(g.saved.Spec.Name, e.Event))
		}
	}
	return out
}

func event(name string, e protocol.Event) *v1.Event {
	return &v1.Event{TimeUnixNano: e.Time.UnixNano(), Guest: name, Kind: e.Kind, Text: e.Text}
}

// maxDelay bounds the delay that tests may ask for.
const maxDelay = 10 * time.Minute

func (a *api) Run(ctx context.Context, r *v1.RunRequest) (*v1.RunResponse, error) {
	var s *spec.Guest
	if r.Spec != "" {
		var err error
		if s, err = spec.Parse(strings.NewReader(r.Spec)); err != nil {
			return nil, status(err)
		}
	}
	opt := protocol.Options{
		NoGate: r.UnsafeNoGate, VTPMFirst: r.UnsafeVtpmFirst,
		VTPMDelay: time.Duration(r.UnsafeVtpmDelayMs) * time.Millisecond,
		Poll:      time.Duration(r.UnsafePollMs) * time.Millisecond,
	}
	if opt.VTPMDelay > maxDelay || opt.Poll > maxDelay {
		return nil, status(rpc.Errorf(rpc.Invalid, "unsafe-vtpm-delay: the most is %v", maxDelay))
	}
	g, err := a.t.run(ctx, s, r.Name, opt)
	if err != nil {
		return nil, status(err)
	}
	return &v1.RunResponse{Guest: g.proto(true)}, nil
}

func (a *api) List(context.Context, *v1.ListRequest) (*v1.ListResponse, error) {
	out := &v1.ListResponse{}
	for _, g := range a.t.list() {
		out.Guests = append(out.Guests, g.proto(false))
	}
	return out, nil
}

func (a *api) Get(_ context.Context, r *v1.GetRequest) (*v1.GetResponse, error) {
	g, err := a.t.find(r.Name)
	if err != nil {
		return nil, status(err)
	}
	return &v1.GetResponse{Guest: g.proto(true)}, nil
}

func (a *api) Stop(ctx context.Context, r *v1.StopRequest) (*v1.StopResponse, error) {
	g, err := a.t.stop(ctx, r.Name, time.Duration(r.GraceMs)*time.Millisecond)
	if err != nil {
		return nil, status(err)
	}
	return &v1.StopResponse{Guest: g.proto(false)}, nil
}

func (a *api) Remove(ctx context.Context, r *v1.RemoveRequest) (*v1.RemoveResponse, error) {
	return &v1.RemoveResponse{}, status(a.t.remove(ctx, r.Name))
}

// maxInput bounds one message typed at a console.
const maxInput = 4096

func (a *api) Console(ctx context.Context, s *connect.BidiStream[v1.ConsoleRequest, v1.ConsoleResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	g, err := a.t.of(first.Name, false, "")
	if err != nil {
		return status(err)
	}
	con := g.console
	if first.Channel {
		con = g.channel
	}
	// The Builder records who comes, or refuses.
	attach := protocol.AttachConsole{UUID: g.saved.UUID, Name: first.Name, Channel: first.Channel, Caller: caller(ctx)}
	if _, err := a.t.builder.Call(ctx, protocol.MethodAttachConsole, attach, nil); err != nil {
		return status(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Output, and the guest's end, in a goroutine of its own; typing in this one.
	done := make(chan struct{})
	go func() {
		defer close(done)
		cancel(a.output(ctx, g, con, true, func(b []byte) error { return s.Send(&v1.ConsoleResponse{Output: b}) }))
	}()
	typed := make(chan error, 1)
	go func() { // ends with the stream, at the latest when this handler returns
		for m := first; ; {
			if len(m.Input) > maxInput {
				typed <- rpc.Errorf(rpc.Invalid, "console: %d bytes at once, the most is %d", len(m.Input), maxInput)
				return
			}
			if len(m.Input) > 0 {
				if err := con.write(m.Input); err != nil && !errors.Is(err, net.ErrClosed) {
					typed <- err
					return
				}
			}
			var err error
			if m, err = s.Receive(); err != nil {
				if !errors.Is(err, io.EOF) { // nothing more is typed; what is printed still goes out
					typed <- err
				}
				return
			}
		}
	}()
	select {
	case err = <-typed:
		cancel(nil)
	case <-done:
		err = nil
	}
	<-done
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return status(err)
}

// output sends the scrollback and, with follow, what comes until the guest is down.
func (a *api) output(ctx context.Context, g *guest, con *console, follow bool, send func([]byte) error) error {
	place := int64(0)
	for {
		g.mu.Lock()
		up, state := g.up(), g.changed
		g.mu.Unlock()
		// Read after the state: what a guest printed before it was down is not missed.
		out, next, more := con.from(place)
		place = next
		if len(out) > 0 {
			if err := send(out); err != nil {
				return err
			}
			continue
		}
		if !follow || !up {
			return nil
		}
		select {
		case <-more:
		case <-state:
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *api) Logs(ctx context.Context, r *v1.LogsRequest, s *connect.ServerStream[v1.LogsResponse]) error {
	g, err := a.t.find(r.Name)
	if err != nil {
		return status(err)
	}
	return status(a.output(ctx, g, g.console, r.Follow, func(b []byte) error { return s.Send(&v1.LogsResponse{Output: b}) }))
}

func (a *api) Events(ctx context.Context, r *v1.EventsRequest, s *connect.ServerStream[v1.EventsResponse]) error {
	if r.Name != "" {
		if _, err := a.t.find(r.Name); err != nil {
			return status(err)
		}
	}
	sub := a.t.events.subscribe()
	defer sub.close()
	// What happened before the subscription is in the timelines; what happened in between is in both.
	told := map[uint64]bool{}
	for _, e := range a.t.history(r.Name) {
		if err := s.Send(&v1.EventsResponse{Event: event(a.t.nameOf(e.UUID), e.Event)}); err != nil {
			return err
		}
		told[e.seq] = true
	}
	if !r.Follow {
		return nil
	}
	err := sub.each(ctx, func(e moment) error {
		name := a.t.nameOf(e.UUID)
		if (r.Name != "" && name != r.Name) || told[e.seq] {
			return nil
		}
		return s.Send(&v1.EventsResponse{Event: event(name, e.Event)})
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return status(err)
}

func (a *api) Quote(ctx context.Context, r *v1.QuoteRequest) (*v1.QuoteResponse, error) {
	g, err := a.t.attestable(r.Name)
	if err != nil {
		return nil, status(err)
	}
	if len(r.Nonce) < 16 || len(r.Nonce) > 64 {
		return nil, status(rpc.Errorf(rpc.Invalid, "nonce: %d bytes: use 16 to 64", len(r.Nonce)))
	}
	var out protocol.Quoted
	in := protocol.Quote{UUID: g.saved.UUID, Name: r.Name, Nonce: r.Nonce, Caller: caller(ctx)}
	if _, err := a.t.builder.Call(ctx, protocol.MethodQuote, in, &out); err != nil {
		return nil, status(err)
	}
	if r.Ima { // after the quote: what it vouches for is there
		out.Evidence.IMA = a.t.measured(ctx, g, r.ImaAfter)
	}
	b, err := json.Marshal(out.Evidence)
	return &v1.QuoteResponse{Evidence: b}, status(err)
}

func (a *api) ActivateCredential(ctx context.Context, r *v1.ActivateCredentialRequest) (*v1.ActivateCredentialResponse, error) {
	g, err := a.t.attestable(r.Name)
	if err != nil {
		return nil, status(err)
	}
	if len(r.CredentialBlob) > maxInput || len(r.Secret) > maxInput {
		return nil, status(rpc.Errorf(rpc.Invalid, "credential: over %d bytes", maxInput))
	}
	var out protocol.Activated
	in := protocol.Activate{UUID: g.saved.UUID, Name: r.Name, CredentialBlob: r.CredentialBlob, Secret: r.Secret, Caller: caller(ctx)}
	if _, err := a.t.builder.Call(ctx, protocol.MethodActivate, in, &out); err != nil {
		return nil, status(err)
	}
	return &v1.ActivateCredentialResponse{Secret: out.Secret}, nil
}
