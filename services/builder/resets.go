package builder

import (
	"context"
	"slices"
	"strings"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
)

// resets replaces this Builder on its timer.
func (b *Builder) resets(ctx context.Context) {
	every := b.cfg.Resets[services.Builder]
	if every == 0 {
		return
	}
	b.wg.Go(func() {
		t := time.NewTimer(every)
		defer t.Stop()
		select {
		case <-t.C:
			b.log.Error("the Builder is not replaced", "err", b.replace())
		case <-ctx.Done():
		}
	})
}

// replace has another Builder follow this one, between two starts of guests. It returns only where that cannot be recorded.
func (b *Builder) replace() error {
	b.starts.Lock()
	defer b.starts.Unlock()
	if err := b.journal.Record(b.journal.Entry(ActReplace, services.Builder, audit.Done)); err != nil {
		return err
	}
	b.cfg.Reset()
	return nil
}

// ActReplace ends a Builder that runs well, to be followed by another one.
const ActReplace = "replace"

// reset replaces a service's processes now: all, or those that one guest depends on.
func (b *Builder) reset(in protocol.Reset) (done protocol.ResetDone, err error) {
	var all []interface{ Reset() bool }
	b.mu.Lock()
	wanted := map[*tenancy]bool{}
	for _, g := range b.guests {
		if in.Guest == "" || g.name() == in.Guest {
			wanted[b.tenancies[g.Tenant]] = true
			if in.Service == services.BlkBack && g.storage != nil {
				all = append(all, g.storage)
			}
		}
	}
	for _, t := range b.tenancies {
		switch {
		case in.Guest != "" && !wanted[t]:
		case in.Service == services.Toolstack:
			all = append(all, t)
		case in.Service == services.NetBack:
			all = append(all, t.network)
		}
	}
	b.mu.Unlock()
	if !slices.Contains(services.Resettable, in.Service) {
		return done, rpc.Errorf(rpc.Invalid, "%q is not replaced under its guests; services: %s", in.Service, strings.Join(services.Resettable, ", "))
	}
	if in.Service == services.Builder {
		if in.Guest != "" {
			return done, rpc.Errorf(rpc.Invalid, "there is one Builder for all guests: leave the guest out")
		}
		return done, b.replace()
	}
	if in.Service == services.VTPM {
		if in.Guest != "" {
			return done, rpc.Errorf(rpc.Invalid, "there is one vTPM manager for all guests: leave the guest out")
		}
		all = append(all, b.vtpm)
	}
	for _, r := range all {
		if r.Reset() {
			done.Replaced++
		}
	}
	return done, nil
}
