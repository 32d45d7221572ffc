package builder

import (
	"context"
	"errors"
	"os"
	"strings"

	"redoubt.dev/redoubt/ipc/rpc"
	inspected "redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/validator"
	"redoubt.dev/redoubt/spec"
)

// validated is a guest as package validator has it.
type validated struct {
	b *Builder
	g *guest
}

func (v validated) UUID() string { return v.g.Build.UUID }
func (v validated) Name() string { return v.g.name() }
func (v validated) Owner() (tenant, name string) {
	return v.g.Tenant, strings.TrimPrefix(v.g.name(), v.g.Tenant+".")
}
func (v validated) Spec() *spec.Guest { return &v.g.Build.Spec }

func (v validated) Hold(ctx context.Context, in protocol.Hold, files ...*os.File) (out protocol.Held, err error) {
	_, r, err := v.b.running(v.UUID())
	if err == nil {
		_, err = r.peer.Call(ctx, protocol.MethodHold, in, &out, files...)
	}
	return out, err
}

func (v validated) LetGo(ctx context.Context, who protocol.Holder) (out protocol.WasHeld, err error) {
	_, r, err := v.b.running(v.UUID())
	if err == nil {
		_, err = r.peer.Call(ctx, protocol.MethodLetGo, protocol.LetGo{Who: who}, &out)
	}
	return out, err
}

func (v validated) Snapshot(ctx context.Context, validated, force bool, stopped, begun *os.File) (protocol.Snapshotted, error) {
	return v.g.storage.Snapshot(ctx, validated, force, stopped, begun)
}

func (v validated) DropSnapshot(ctx context.Context) error { return v.g.storage.DropSnapshot(ctx) }

func (v validated) View() ([]inspected.Disk, error) { return v.g.storage.View() }

func (v validated) Restrict(ctx context.Context) error {
	return errors.Join(v.g.nics.restrict(), v.g.storage.Restrict(ctx))
}

func (v validated) Fail(reason string) {
	v.g.mu.Lock()
	r := v.g.run
	v.g.mu.Unlock()
	if r != nil {
		r.fail(reason)
	}
}

func (v validated) Tell(kind, text string) { v.b.event(v.g, protocol.Event{Kind: kind, Text: text}) }

// asValidated is a guest that runs; nil for one that does not.
func (b *Builder) asValidated(uuid string) validator.Guest {
	if g := b.guest(uuid); g != nil {
		return validated{b, g}
	}
	return nil
}

// specOf is a guest's spec while it runs.
func (b *Builder) specOf(uuid string) *spec.Guest {
	if g := b.guest(uuid); g != nil {
		return &g.Build.Spec
	}
	return &spec.Guest{}
}

// validation answers what the toolstack asks of guests' disks and of what is in force against them.
func (b *Builder) validation(ctx context.Context, tenant string, r *rpc.Request) (any, error) {
	m := b.validations
	switch r.Method {
	case protocol.MethodPause:
		return rpc.Answer(r, func(in protocol.Control) (any, error) { return struct{}{}, b.pause(ctx, in.UUID) })
	case protocol.MethodResume:
		return rpc.Answer(r, func(in protocol.Control) (any, error) { return struct{}{}, b.resumeGuest(ctx, in.UUID) })
	case protocol.MethodQuarantine:
		return rpc.Answer(r, func(in protocol.Control) (any, error) {
			return struct{}{}, m.Quarantine(ctx, tenant, in, b.asValidated(in.UUID))
		})
	case protocol.MethodReleaseGuest:
		return rpc.Answer(r, func(in protocol.Control) (any, error) { return struct{}{}, m.Release(ctx, in, b.asValidated(in.UUID)) })
	case protocol.MethodValidate:
		return rpc.Answer(r, func(in protocol.Validate) (any, error) { return m.Validate(ctx, in, r) })
	case protocol.MethodValidation:
		return rpc.Answer(r, func(in protocol.Control) (any, error) { return m.Status(in, b.specOf(in.UUID)) })
	case protocol.MethodCreateBaseline:
		return rpc.Answer(r, func(in protocol.CreateBaseline) (any, error) { return m.Create(ctx, in) })
	case protocol.MethodBaseline:
		return rpc.Answer(r, func(in protocol.Baseline) (any, error) { return m.Get(in) })
	case protocol.MethodSignBaseline:
		return rpc.Answer(r, func(in protocol.SignBaseline) (any, error) {
			if g := b.guest(in.UUID); g != nil {
				return m.Sign(ctx, in, &g.Build.Spec)
			} // else nobody here knows who may
			return nil, rpc.Errorf(rpc.Unavailable, "the guest is down: who may sign its baseline says its spec while it runs")
		})
	case protocol.MethodAcceptBaseline:
		return rpc.Answer(r, func(in protocol.AcceptBaseline) (any, error) { return m.Accept(ctx, in) })
	}
	return nil, rpc.Errorf(rpc.Refused, "builder: no call %q", r.Method)
}

// pause holds a guest for the operator.
func (b *Builder) pause(ctx context.Context, uuid string) error {
	g, _, err := b.running(uuid)
	if err != nil {
		return err
	}
	if _, err = (validated{b, g}).Hold(ctx, protocol.Hold{Who: protocol.HolderOperator}); err == nil {
		b.event(g, protocol.Event{Kind: protocol.EventHeld, Text: "by the operator"})
	}
	return err
}

// resumeGuest ends that.
func (b *Builder) resumeGuest(ctx context.Context, uuid string) error {
	g, _, err := b.running(uuid)
	if err != nil {
		return err
	}
	was, err := (validated{b, g}).LetGo(ctx, protocol.HolderOperator)
	if err == nil && was.Took > 0 {
		b.event(g, protocol.Event{Kind: protocol.EventResumed, Text: "by the operator"})
	}
	return err
}
