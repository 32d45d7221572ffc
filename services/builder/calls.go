package builder

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/emulator/choice"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/services/foreign"
	"redoubt.dev/redoubt/services/pciback/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// fromToolstack serves a tenant's toolstack. It acts on the guests of its own trust list only.
func (b *Builder) fromToolstack(ctx context.Context, t *tenancy, r *rpc.Request) (any, error) {
	switch r.Method {
	case protocol.MethodBuild, protocol.MethodDestroy, protocol.MethodOpen, protocol.MethodVars: // these check for themselves
	default:
		var of struct {
			UUID string `json:"uuid"`
		}
		if err := r.Decode(&of); err != nil {
			return nil, err
		}
		if err := b.ledger.Check(of.UUID, t.name); err != nil {
			return nil, err
		}
	}
	switch r.Method {
	case protocol.MethodBuild:
		return rpc.Answer(r, func(in protocol.Build) (any, error) { return b.build(ctx, t, in, r) })
	case protocol.MethodStop:
		return rpc.Answer(r, func(in protocol.Stop) (any, error) { return struct{}{}, b.stop(ctx, in) })
	case protocol.MethodDestroy:
		return rpc.Answer(r, func(in protocol.Destroy) (any, error) { return struct{}{}, b.destroy(ctx, t, in) })
	case protocol.MethodQuote:
		return rpc.Answer(r, func(in protocol.Quote) (any, error) { return b.quote(ctx, in) })
	case protocol.MethodInspect:
		return rpc.Answer(r, func(in protocol.Inspect) (any, error) { return b.inspect(ctx, in) })
	case protocol.MethodModules:
		return rpc.Answer(r, func(in protocol.Modules) (any, error) { return b.modules(ctx, in) })
	case protocol.MethodActivate:
		return rpc.Answer(r, func(in protocol.Activate) (any, error) {
			var out protocol.Activated
			err := b.vtpm.Call(ctx, r.Method, in, &out)
			return out, err
		})
	case protocol.MethodOpen:
		return b.handFile(t.name, r)
	case protocol.MethodVars:
		f, err := os.Open(qemu.VarsTemplate())
		if err != nil {
			return nil, rpc.Errorf(rpc.Unavailable, "boot.firmware: OVMF (Debian package ovmf): %v", err)
		}
		return rpc.WithFiles{Value: struct{}{}, Files: []*os.File{f}}, nil
	case protocol.MethodAttachConsole:
		return struct{}{}, nil // that it is asked is what the Builder must know
	}
	return b.validation(ctx, t.name, r)
}

// quote adds to the vTPM's evidence what only the guest's memory holds: the log of its
// firmware. It proves nothing by itself; the quote does.
func (b *Builder) quote(ctx context.Context, in protocol.Quote) (any, error) {
	g := b.guest(in.UUID)
	if g == nil {
		return nil, rpc.Errorf(rpc.Unavailable, "the guest is down")
	}
	var out protocol.Quoted
	if err := b.vtpm.Call(ctx, protocol.MethodQuote, in, &out); err != nil {
		return nil, err
	}
	if g.Build.Spec.Boot.Firmware != "" {
		var log protocol.GuestLog
		_, run, err := b.running(in.UUID)
		if err == nil {
			_, err = run.peer.Call(ctx, protocol.MethodReadLog, struct{}{}, &log)
		}
		if err != nil {
			b.log.Warn("firmware's event log", "guest", g.name(), "err", err)
		}
		out.Evidence.GuestLog = log.Log
	}
	return out, nil
}

// destroy destroys the vTPM of a guest that is down. One that was never built has none.
func (b *Builder) destroy(ctx context.Context, t *tenancy, in protocol.Destroy) error {
	owner := b.ledger.Owner(in.UUID)
	if owner == "" {
		return nil
	}
	if err := b.ledger.Check(in.UUID, t.name); err != nil {
		return err
	}
	if b.guest(in.UUID) != nil {
		return rpc.Errorf(rpc.Exists, "the guest runs: stop it first")
	}
	if err := b.vtpm.Call(ctx, protocol.MethodDestroy, in, nil); err != nil {
		return err
	}
	t.forget(in.UUID)
	if err := b.validations.Forget(in.UUID); err != nil {
		return err
	}
	return b.ledger.Drop(in.UUID)
}

// fromVTPM serves the vTPM service.
func (b *Builder) fromVTPM(_ context.Context, r *rpc.Request) (any, error) {
	switch r.Method {
	case foreign.Method:
		// Its group is the manager's, which looks into the directory.
		manager, err := services.Find(services.VTPM)
		if err != nil {
			return nil, err
		}
		return b.procs.Program(r, services.SWTPM, services.Instance{
			Label: services.SWTPM, GID: b.procs.User(manager), StateDir: b.vtpmDir(),
		})
	case protocol.NoticeEvent:
		return rpc.Answer(r, func(e protocol.Event) (any, error) {
			if g := b.guest(e.UUID); g != nil {
				b.event(g, e)
			} else if t := b.tenancy(b.ledger.Owner(e.UUID)); t != nil {
				t.notify(protocol.NoticeEvent, e)
			}
			return nil, nil
		})
	case protocol.NoticeFailed:
		return rpc.Answer(r, func(f protocol.Failed) (any, error) {
			if g := b.guest(f.UUID); g != nil {
				g.vtpmFailed(f.Reason)
			}
			return nil, nil
		})
	}
	return nil, rpc.Errorf(rpc.Refused, "builder: no call %q", r.Method)
}

// fromEmulator serves one emulator's notices. It faces the guest: nothing it says is more
// than its own event or its own end.
func (b *Builder) fromEmulator(g *guest, r *run) rpc.Handler {
	return func(ctx context.Context, req *rpc.Request) (any, error) {
		switch req.Method {
		case foreign.Method:
			if g.Emulator != spec.QEMU {
				break
			}
			return r.startQEMU(b, g, req)
		case protocol.MethodBackEnd:
			return b.backEnd(ctx, g, r, req)
		case protocol.NoticeEvent:
			return rpc.Answer(req, func(e protocol.Event) (any, error) {
				b.event(g, protocol.Event{Kind: clip(e.Kind, 64), Text: clip(e.Text, 512), Time: e.Time})
				return nil, nil
			})
		case protocol.NoticeExits:
			return rpc.Answer(req, func(e protocol.Exits) (any, error) {
				b.validations.Exited(g.Build.UUID, e.Count)
				return nil, nil
			})
		case protocol.MethodOutcome:
			return rpc.Answer(req, func(e protocol.Exit) (any, error) {
				r.mu.Lock()
				if r.exit == nil {
					r.exit = &protocol.Exit{Outcome: e.Outcome, Reason: clip(e.Reason, 1024)}
				}
				r.mu.Unlock()
				r.changed()
				return struct{}{}, nil
			})
		}
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from an emulator", req.Method)
	}
}

func clip(s string, n int) string { return s[:min(len(s), n)] }

func (b *Builder) guest(uuid string) *guest {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.guests[uuid]
}

// maxTimeline bounds the events of a guest that a new toolstack is told.
const maxTimeline = 256

// event tells the toolstack; the time is now where the event has none.
func (b *Builder) event(g *guest, e protocol.Event) {
	e.UUID = g.Build.UUID
	e.Time = cmp.Or(e.Time, time.Now())
	g.mu.Lock()
	if n := len(g.timeline); n < maxTimeline {
		e.Number = n + 1
		g.timeline = append(g.timeline, e)
		kept.KeepMoment(b.kept, n, e)
	}
	g.mu.Unlock()
	if t := b.tenancy(g.Tenant); t != nil {
		t.notify(protocol.NoticeEvent, e)
	}
}

// build makes a guest and starts it.
func (b *Builder) build(ctx context.Context, t *tenancy, in protocol.Build, r *rpc.Request) (_ any, err error) {
	files, err := in.Files.Take(r)
	if err != nil {
		return nil, err
	}
	g := &guest{Guest: kept.Guest{Build: in, Tenant: t.name}, down: make(chan struct{})}
	claimed := false
	defer func() {
		for _, all := range files {
			ipc.CloseAll(all)
		}
		if !claimed {
			if g.bus != nil {
				g.bus.End()
			}
			g.Close()
		}
	}()
	if err := in.Spec.Complete(); err != nil {
		return nil, rpc.Errorf(rpc.Invalid, "%v", err)
	}
	in.Spec.Name = services.GuestName(t.name, in.Spec.Name)
	if g.Emulator, err = choice.Of(&in.Spec); err != nil {
		return nil, err
	}
	g.Build = in
	if len(files[protocol.FileDisk]) != len(in.Spec.Disks) || len(files[protocol.FileBase]) != overlays(in.Spec.Disks) ||
		len(files[protocol.FileKernel]) > 1 || len(files[protocol.FileInitrd]) > 1 || len(files[protocol.FileProfile]) > 1 ||
		(len(files[protocol.FileProfile]) == 1) != (in.Spec.Modules != nil && in.Spec.Modules.Profile != "") ||
		(len(files[protocol.FileKernel]) == 1) != (in.Spec.Boot.Kernel != "") ||
		(len(files[protocol.FileVars]) == 1) != (in.Spec.Boot.Firmware == spec.OVMF) {
		return nil, rpc.Errorf(rpc.Invalid, "build: the descriptors do not match the spec")
	}
	if err := b.validations.MayStart(t.name, in.UUID, in.Spec.Name); err != nil {
		return nil, err
	}
	if err := b.ledger.Claim(in.UUID, t.name); err != nil {
		return nil, err
	}
	if err := b.claim(g); err != nil {
		return nil, err
	}
	g.bus = b.assign(g)
	console, ends, err := b.console(in.Spec.Name)
	if err != nil {
		b.unclaim(g)
		return nil, err
	}
	g.Console, g.Channel, g.Ends = console[0], console[1], ends
	answer, err := ipc.Duplicate(ends...)
	if err != nil {
		b.unclaim(g)
		return nil, err
	}
	defer func() {
		if err != nil {
			ipc.CloseAll(answer)
		}
	}()
	if err := g.take(files); err != nil {
		b.unclaim(g)
		return nil, err
	}
	var run *run
	g.storage = b.newStorage(g)
	if err = g.storage.Open(ctx, nil); err == nil {
		g.nics, err = t.network.add(g)
	}
	b.starts.RLock()
	defer b.starts.RUnlock()
	if err == nil {
		err = g.Keep(b.kept)
	}
	if err == nil {
		run, err = b.start(ctx, g)
	}
	if err == nil {
		err = b.setRun(g, run)
	}
	if err != nil {
		b.unkeep(g)
		g.nics.close()
		g.storage.End()
		b.release(g, false)
		b.journal.Note(b.journal.Entry(audit.ActGuestEnd, g.name(), audit.Done, "uuid", g.Build.UUID, "reason", err.Error()))
		b.unclaim(g)
		return nil, err
	}
	claimed = true
	b.validations.Begin(validated{b, g})
	b.wg.Go(func() { b.supervise(g) })
	return rpc.WithFiles{Value: protocol.Built{UUID: in.UUID, Domain: run.domain, Emulator: g.Emulator}, Files: answer}, nil
}

// assign begins to have a guest's bus assigned.
func (b *Builder) assign(g *guest) *asked.Assignment {
	machine, msix := topology.Native, true
	if g.Emulator == spec.QEMU {
		machine, msix = topology.QEMU, choice.HaveKVM()
	}
	s := &g.Build.Spec
	return b.pcibacks.Assign(g.name(), topology.Guest(machine, len(s.Disks), len(s.NICs), msix))
}

func (b *Builder) claim(g *guest) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closing {
		return rpc.Errorf(rpc.Unavailable, "Redoubt is going down")
	}
	if b.guests[g.Build.UUID] != nil {
		return rpc.Errorf(rpc.Exists, "the guest runs already")
	}
	b.guests[g.Build.UUID] = g
	return nil
}

func (b *Builder) unclaim(g *guest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.guests, g.Build.UUID)
}

// take keeps what the guest is made of: sealed copies of what is measured, the rest as it is.
func (g *guest) take(files map[string][]*os.File) error {
	var err error
	for _, m := range []struct {
		name, field string
		to          **os.File
	}{
		{protocol.FileKernel, "boot.kernel", &g.Kernel},
		{protocol.FileInitrd, "boot.initrd", &g.Initrd},
		{protocol.FileProfile, "modules.profile", &g.Profile},
	} {
		if f := files[m.name]; len(f) == 1 {
			if *m.to, err = memfd.Sealed(m.field, f[0]); err != nil {
				return err
			}
		}
	}
	if fw := g.Build.Spec.Boot.Firmware; fw != "" {
		image, err := os.Open(qemu.FirmwareImage(qemu.Firmware(fw)))
		if err != nil {
			return fmt.Errorf("boot.firmware: %w", err)
		}
		defer image.Close()
		if g.Firmware, err = memfd.Sealed("boot.firmware", image); err != nil {
			return err
		}
	}
	if v := files[protocol.FileVars]; len(v) == 1 {
		g.Vars = v[0]
		delete(files, protocol.FileVars)
	}
	g.Disks = files[protocol.FileDisk]
	delete(files, protocol.FileDisk)
	g.takeBases(files)
	return g.makeChanges()
}
