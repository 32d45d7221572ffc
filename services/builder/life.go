package builder

import (
	"context"
	"errors"
	"fmt"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/services/protocol"
)

// supervise waits for a guest's emulator, starts the next one at a reboot, and reports the end.
func (b *Builder) supervise(g *guest) {
	for {
		g.mu.Lock()
		run := g.run
		g.mu.Unlock()
		exit := run.outcome(g)
		b.journal.Note(b.journal.Ended(run.is, run.proc.Err(), []string{g.name()}))
		if !b.follow(g, run, exit) {
			return
		}
	}
}

// follow follows the end of a guest's emulator, and reports whether there is another one.
func (b *Builder) follow(g *guest, run *run, exit protocol.Exit) bool {
	run.peer.Close()
	g.storage.Detach()
	g.nics.detach()
	again := exit.Outcome == protocol.Reboot
	run.over(g, again)
	b.release(g, again)
	b.forget(run.domain)
	if again {
		b.event(g, protocol.Event{Kind: protocol.EventReboot, Text: exit.Reason})
		err := b.restart(g)
		if err == nil {
			return true
		}
		b.release(g, false) // it was kept for a start that did not come
		exit = protocol.Exit{Outcome: protocol.Crashed, Reason: fmt.Sprintf("reboot: %v", err)}
		if g.isAsked() {
			exit = protocol.Exit{Outcome: protocol.Stopped, Reason: "stopped while it rebooted"}
		}
	}
	b.validations.End(g.Build.UUID)
	g.nics.close()
	g.storage.End()
	b.journal.Note(b.journal.Entry(audit.ActGuestEnd, g.name(), audit.Done,
		"uuid", g.Build.UUID, "outcome", string(exit.Outcome), "reason", exit.Reason))
	g.Close()
	ended := protocol.Ended{UUID: g.Build.UUID, Outcome: exit.Outcome, Reason: exit.Reason}
	kept.KeepEnd(b.kept, g.Tenant, ended)
	b.unkeep(g) // before it can be started again
	b.unclaim(g)
	close(g.down)
	if t := b.tenancy(g.Tenant); t != nil {
		t.notify(protocol.NoticeEnded, ended)
	}
	return false
}

// release tells the vTPM service that a guest's emulator is gone.
func (b *Builder) release(g *guest, keep bool) {
	err := b.vtpm.Release(context.Background(), g.Build.UUID, keep)
	if err != nil {
		b.log.Warn("vTPM release", "guest", g.name(), "err", err)
	}
}

// restart gives a rebooting guest a new emulator, unless it was told to end meanwhile.
func (b *Builder) restart(g *guest) error {
	if g.isAsked() {
		return errors.New("the operator asked for the end")
	}
	b.starts.RLock()
	defer b.starts.RUnlock()
	next, err := b.start(context.Background(), g)
	if err != nil {
		return err
	}
	if err := b.setRun(g, next); err != nil {
		return err
	}
	if g.isAsked() { // asked while the new process was being made
		next.end()
	}
	return nil
}

func (g *guest) isAsked() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked
}

// patience is what is left of the grace, as who asked last for the end gave it.
func (g *guest) patience() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Until(g.insist)
}

// stop presses the power button and insists when the grace is over. One that comes later sets the grace anew.
func (b *Builder) stop(ctx context.Context, in protocol.Stop) error {
	g := b.guest(in.UUID)
	if g == nil {
		return nil // it is down already
	}
	g.mu.Lock()
	run := g.run
	if run != nil {
		g.asked, g.insist = true, time.Now().Add(in.Grace)
	}
	g.mu.Unlock()
	if run == nil {
		return rpc.Errorf(rpc.Unavailable, "the guest is being started: try again")
	}
	run.changed()
	if in.Grace > 0 {
		press, cancel := context.WithTimeout(ctx, in.Grace)
		_, err := run.peer.Call(press, protocol.MethodPowerButton, struct{}{}, nil)
		cancel()
		if err != nil && !errors.Is(err, rpc.ErrGone) {
			b.log.Warn("power button", "guest", g.name(), "err", err)
		}
		for left := g.patience(); left > 0; left = g.patience() {
			t := time.NewTimer(left)
			select {
			case <-g.down:
				return nil
			case <-t.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	g.mu.Lock()
	run = g.run // a reboot may have made a new one
	g.mu.Unlock()
	run.end()
	select {
	case <-g.down:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// endGuests ends every guest, for the Builder's own end. Nobody can ask for new ones then.
func (b *Builder) endGuests() {
	b.mu.Lock()
	b.closing = true
	var all []*guest
	for _, g := range b.guests {
		all = append(all, g)
	}
	b.mu.Unlock()
	for _, g := range all {
		if b.followed {
			b.wg.Go(func() { _ = b.stop(context.Background(), protocol.Stop{UUID: g.Build.UUID}) })
		} else if g.run.proc != nil { // this Builder has not come so far: nobody follows the emulator's end
			g.run.end()
		}
	}
	for _, g := range all {
		if b.followed {
			<-g.down
			continue
		}
		if g.run.proc != nil {
			<-g.run.proc.Done()
		}
		g.storage.End()
	}
}
