package validator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/response"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/verdict"
)

// ActRespond is a response in the audit log: detail reason.
const ActRespond = "respond"

// respond does what follows a verdict. Each response is in the ledger before it is in force, so that it survives whatever
// happens then; one that fails does not keep the next from being done.
func (m *Manager) respond(g Guest, r *verdict.Report) error {
	var errs []error
	reason := ""
	if len(r.Findings) > 0 {
		reason = clip(r.Findings[0].String())
	}
	for _, what := range r.Responses {
		if what == spec.Log {
			continue
		}
		begun := false
		err := calls.Act(m.Journal, ActRespond, g.Name(), func() error {
			begun = true
			return m.enforce(g, what, reason, "validation")
		})
		if !begun {
			g.Fail(fmt.Sprintf("%s could not be recorded: %v", what, err))
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
		errs = append(errs, err)
		g.Tell(protocol.EventValidation, string(what)+": "+reason)
	}
	return errors.Join(errs...)
}

// respondLimit is how long it may take to have a response in force, before the guest is ended instead.
const respondLimit = 20 * time.Second

// enforce has one response in force. Where that cannot be done the guest is ended: it must not go on without.
func (m *Manager) enforce(g Guest, what spec.Response, reason, by string) error {
	if err := m.note(g, what, reason, by); err != nil {
		g.Fail(fmt.Sprintf("%s could not be recorded: %v", what, err))
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), respondLimit)
	defer cancel()
	var err error
	switch what {
	case spec.Quarantine, spec.DropDevices:
		err = g.Restrict(ctx)
	case spec.Pause:
		_, err = g.Hold(ctx, protocol.Hold{Who: protocol.HolderVerdict})
	case spec.Revoke:
		err = m.Revoke(ctx, g.UUID(), true)
		g.Fail(fmt.Sprintf("validation: its vTPM is revoked: %s", reason))
	case spec.Stop:
		g.Fail(fmt.Sprintf("validation: %s", reason))
	}
	if err != nil {
		g.Fail(fmt.Sprintf("%s could not be put in force: %v", what, err))
	}
	return err
}

// note has a response in the ledger. A stop is over when the guest is.
func (m *Manager) note(g Guest, what spec.Response, reason, by string) error {
	if what == spec.Stop {
		return nil
	}
	return m.Ledger.Change(g.UUID(), func(r *response.Record) {
		r.Tenant, r.Name = g.Owner()
		switch what {
		case spec.Quarantine:
			r.Quarantined = true
		case spec.DropDevices:
			r.DevicesDropped = true
		case spec.Restrict:
			r.Restricted = true
		case spec.Pause:
			r.Paused = true
		case spec.Revoke:
			r.Revoked = true
		}
		r.Reason, r.By, r.Since = reason, by, time.Now().UTC()
	})
}

// Quarantine puts a guest, which g is nil for if it does not run, into quarantine.
func (m *Manager) Quarantine(ctx context.Context, tenant string, in protocol.Control, g Guest) error {
	err := m.Ledger.Change(in.UUID, func(r *response.Record) {
		r.Tenant, r.Name, r.Quarantined, r.Reason = tenant, in.Name, true, in.Reason
		r.By, r.Since = fmt.Sprintf("user %d", in.Caller.UID), time.Now().UTC()
	})
	switch {
	case err != nil:
		return rpc.Errorf(rpc.Invalid, "quarantine: %v", err)
	case g == nil:
		return nil
	}
	return g.Restrict(ctx)
}

// Release ends all that is in force against a guest, which g is nil for if it does not run.
func (m *Manager) Release(ctx context.Context, in protocol.Control, g Guest) error {
	r, _ := m.Ledger.Get(in.UUID)
	if r.Revoked { // first: what is in the ledger still keeps it from starting
		if err := m.Revoke(ctx, in.UUID, false); err != nil {
			return err
		}
	}
	if err := m.Ledger.Remove(in.UUID); err != nil || g == nil {
		return err
	}
	err := g.Restrict(ctx)
	if _, lerr := g.LetGo(ctx, protocol.HolderVerdict); err == nil {
		err = lerr
	}
	return err
}

// inForce is what the ledger has of a guest.
func (m *Manager) inForce(uuid string) (all []spec.Response, reason string, since *time.Time) {
	r, ok := m.Ledger.Get(uuid)
	if !ok {
		return nil, "", nil
	}
	for _, x := range []struct {
		is   bool
		what spec.Response
	}{{r.Quarantined, spec.Quarantine}, {r.DevicesDropped, spec.DropDevices}, {r.Restricted, spec.Restrict}, {r.Paused, spec.Pause}, {r.Revoked, spec.Revoke}} {
		if x.is {
			all = append(all, x.what)
		}
	}
	return all, r.Reason, &r.Since
}

// Dropped reports whether a verdict has dropped a guest's devices.
func (m *Manager) Dropped(uuid string) bool {
	r, _ := m.Ledger.Get(uuid)
	return r.DevicesDropped
}

// MayStart refuses the start of a guest against which something is in force that it would evade, and of all of a tenant whose
// guests are not to be started.
func (m *Manager) MayStart(tenant, uuid, name string) error {
	for _, g := range m.Ledger.All() {
		if g.Restricted && g.Tenant == tenant {
			return rpc.Errorf(rpc.Refused, "tenant %s may start no guests: %s deviates from its baseline (%s): `redoubt release %s` ends that", tenant, g.Name, g.Reason, g.Name)
		}
	}
	r, ok := m.Ledger.Get(uuid)
	switch {
	case !ok:
		return nil
	case r.Revoked:
		return rpc.Errorf(rpc.Refused, "its vTPM is revoked (%s): `redoubt release %s` gives it back", r.Reason, name)
	case r.Paused:
		return rpc.Errorf(rpc.Refused, "a verdict has paused it (%s): `redoubt release %s` lets it go on", r.Reason, name)
	}
	return nil
}
