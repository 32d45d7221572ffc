package builder

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	blkback "redoubt.dev/redoubt/services/blkback/kept"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/services/pciback/asked"
	"redoubt.dev/redoubt/services/protocol"
	vtpm "redoubt.dev/redoubt/services/vtpm/kept"
	"redoubt.dev/redoubt/store/tree"
)

// A Builder that follows one which died goes on with its guests. Of the processes it left, emulators, their
// QEMUs and engines go on, and did so meanwhile; all others are ended before anything else is started
// and are started again as after their own death, which every service survives:
//
//  1. inherit: guests are known again; their emulators are told that the vTPM manager is gone, so that no
//     guest's command meets its driver's time-out; everything that is nobody's is ended;
//  2. resume: emulators are heard again, and BlkBacks started;
//  3. boot: the store, with its contents; the manager, which inherits the engines; toolstacks and NetBacks;
//  4. followInherited: guests whose emulator has ended meanwhile are rebooted or end.
//
// A guest that was being started for the first time is not gone on with: who asked for it is gone, too.

// inherit takes over what the last Builder has left, if there was one.
func (b *Builder) inherit() (alive audit.Alive, err error) {
	if e, ok := b.left.Take(domainsEntry); ok {
		if err := e.Decode(&b.domains, 0); err != nil {
			return alive, err
		}
	}
	for _, uuid := range kept.Left(b.left) {
		g, err := b.inheritGuest(uuid)
		if err != nil {
			b.log.Error("a guest is lost with the last Builder", "guest", uuid, "err", err)
		}
		if g == nil {
			continue
		}
		b.guests[uuid] = g
		alive.Guests = append(alive.Guests, g.name())
		alive.Instances = append(alive.Instances, g.run.is.ID)
	}
	b.devices, err = vtpm.Left(b.left,
		func(uuid string) bool { return b.guests[uuid] != nil },
		func(a protocol.Attach) bool { r := b.guests[a.UUID].run; return !r.again && r.domain == a.Domain },
		func(pid int) error { return b.procs.InheritProgram(b.left, pid) })
	if err != nil {
		return alive, err
	}
	return alive, b.procs.EndLeft(b.left)
}

// inheritGuest goes on with one guest; nil for one that never ran.
func (b *Builder) inheritGuest(uuid string) (*guest, error) {
	made, s, timeline, err := kept.Take(b.left, uuid)
	if s == nil || err != nil {
		kept.Drop(b.kept, uuid, 0) // its disks, and the locks on them, are not to be the Supervisor's for ever
		return nil, err
	}
	g := &guest{Guest: made, down: make(chan struct{}), asked: s.Asked, timeline: timeline, bus: asked.Assigned(s.PCI)}
	r := &run{domain: s.Domain, memory: s.Memory, heard: make(chan struct{}), is: s.Instance, exit: s.Exit, failed: s.Failed, again: s.Over}
	r.changed = func() { b.keepChange(g) }
	r.qemu, r.pid, r.asked = true, s.QEMU, maxBackEnds // what it may ask for before its guest runs it has had
	g.run = r
	if r.again {
		return g, nil
	}
	proc, err := b.procs.Inherit(b.left, s.PID)
	if err != nil {
		return g, nil //nolint:nilerr // it ended with the last Builder, or after it
	}
	r.proc = proc
	// At once: until the next manager is there a guest under QEMU is to be held still. One that takes nothing
	// holds up nobody.
	b.wg.Go(func() { _ = rpc.New(proc.Control, nil).Notify(protocol.NoticeVTPMLost, struct{}{}) })
	if s.QEMU != 0 {
		if err := b.procs.InheritProgram(b.left, s.QEMU); err != nil {
			b.log.Warn("QEMU", "guest", g.name(), "err", err)
		}
	}
	return g, nil
}

// errUnseen is the end of an emulator that no Builder saw.
var errUnseen = errors.New("the emulator ended while there was no Builder")

// resume hears inherited emulators again, and gives guests their disks.
func (b *Builder) resume(ctx context.Context) {
	for _, g := range b.guests {
		r := g.run
		var with blkback.Emulator // nil: it is gone
		if r.proc == nil {
			r.peer = rpc.Gone()
			close(r.heard)
		} else {
			with = r
			b.hear(g, r)
			r.peer.Follow(b.generation)
			b.wg.Go(r.listen)
			failed := r.failed != ""
			b.wg.Go(func() {
				_ = r.peer.Notify(protocol.NoticeResumed, struct{}{}) // or it is gone
				if failed {
					r.end()
				}
			})
		}
		g.storage = b.newStorage(g)
		b.wg.Go(func() {
			if err := g.storage.Open(ctx, with); err != nil {
				r.fail(fmt.Sprintf("storage: %v", err))
			}
		})
	}
}

// holdInherited has inherited emulators given connections to the store, and what nobody uses any more
// taken out of it.
func (b *Builder) holdInherited() {
	for _, g := range b.guests {
		if r := g.run; r.proc != nil {
			b.store.Hold(r.domain, 0, r.peer, func(err error) { r.fail(err.Error()) })
		}
	}
	b.mu.Lock()
	unused := map[tree.Domain]bool{}
	maps.Copy(unused, b.domains.Open)
	for _, g := range b.guests {
		delete(unused, g.run.domain)
	}
	b.mu.Unlock()
	for d := range unused {
		b.forget(d)
	}
}

// followInherited sees inherited guests through from here on.
func (b *Builder) followInherited() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, g := range b.guests {
		r := g.run
		b.validations.Begin(validated{b, g})
		b.wg.Go(func() {
			if r.proc == nil {
				exit := r.lastWord(g.isAsked(), errUnseen)
				if !b.follow(g, r, exit) {
					return
				}
			}
			b.supervise(g)
		})
	}
}

// inherit takes over the namespace and the network devices of inherited guests. The lock is held.
func (n *networking) inherit() error {
	if e, ok := n.b.left.Take(networkEntry(n.tenant)); ok {
		if err := e.Decode(new(string), 1); err != nil {
			e.Close()
			return err
		}
		n.ns = network.NamespaceOf(e.Files[0])
	}
	for _, g := range n.b.guestsOf(n.tenant) {
		config, tuns, err := kept.TakeNICs(n.b.left, g.Build.UUID)
		if err != nil {
			return fmt.Errorf("%s: %w", g.name(), err)
		}
		if config == nil {
			continue
		}
		s := &nics{n: n, g: g, config: config, tuns: tuns}
		if r := g.run; r.proc != nil {
			own, err := ipc.Duplicate(r.memory)
			if err != nil {
				return err
			}
			s.memory, s.domain, s.run = own[0], r.domain, r
		}
		n.guests = append(n.guests, s)
		g.nics = s
	}
	return nil
}
