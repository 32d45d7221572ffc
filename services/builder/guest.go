package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	blkback "redoubt.dev/redoubt/services/blkback/kept"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/emulator/choice"
	"redoubt.dev/redoubt/services/emulator/kept"
	inspected "redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/measure"
	"redoubt.dev/redoubt/services/pciback/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

// A guest is one that was built and is not down. Its fields are fixed when it is made, save
// those beneath mu.
type guest struct {
	kept.Guest
	storage *blkback.Storage // nil without disks
	nics    *nics            // nil without any
	bus     *asked.Assignment
	log     []byte     // event log of the measurements, once made; they are the same at each reboot
	keeping sync.Mutex // over keeping it as it is

	inspected inspected.Guest
	mu        sync.Mutex
	timeline  []protocol.Event
	run       *run
	asked     bool          // the operator asked for the end
	insist    time.Time     // from when on that is not asked for any more
	lost      string        // why the vTPM failed before run was there
	down      chan struct{} // closed when the guest is down for good
}

// name is what it is called on this host.
func (g *guest) name() string { return g.Build.Spec.Name }

// memory is how much it has, in bytes.
func (g *guest) memory() uint64 { return uint64(g.Build.Spec.Memory) }

// A run is one emulator process of a guest; a reboot makes a new one.
type run struct {
	domain  tree.Domain
	memory  *os.File         // the guest's; nil once it has ended. The guest's keeping is over it
	again   bool             // it has ended, and the guest is being started again; the same
	proc    *process.Process // nil of one that ended with the last Builder
	peer    *rpc.Peer
	heard   chan struct{}  // closed when all the emulator said was taken in
	is      audit.Instance // in the audit log
	changed func()         // has the guest kept as it is now

	mu     sync.Mutex
	qemu   bool           // its QEMU was asked for
	pid    int            // QEMU's; 0: none
	asked  int            // it asked for so many back ends
	exit   *protocol.Exit // the emulator's own word
	failed string         // why the Builder ended it, if it did
}

// pauseAfter is how long a guest may wait at its gate before it is paused and its clock
// stopped: guests' watchdogs fire at about 20 s.
const pauseAfter = 10 * time.Second

// start runs one emulator process and everything that belongs to it. It returns when the
// guest's kernel is about to run; the vTPM's side goes on in a goroutine of its own.
func (b *Builder) start(ctx context.Context, g *guest) (_ *run, err error) {
	d, err := b.domain()
	defer func() {
		if err != nil {
			b.forget(d)
		}
	}()
	if err != nil {
		return nil, err
	}
	r := &run{domain: d, heard: make(chan struct{}), changed: func() { b.keepChange(g) }}
	msg := protocol.Start{
		Name: g.name(), Emulator: g.Emulator, Domain: d, CPUs: g.Build.Spec.CPUs,
		Memory: uint64(g.Build.Spec.Memory), Cmdline: g.Build.Spec.Boot.Cmdline,
		Firmware: g.Build.Spec.Boot.Firmware, PauseAfter: pauseAfter, KVM: choice.HaveKVM(), Modules: g.Build.Spec.Modules.Policy(),
		Exits: g.Build.Spec.Validated().Exits / 8 / uint64(g.Build.Spec.CPUs), Status: g.Build.Spec.Validated().Status,
	}
	var give, own []*os.File
	defer func() { ipc.CloseAll(own) }()
	add := func(name string, f *os.File) {
		if f != nil {
			msg.Files = append(msg.Files, name)
			give = append(give, f)
		}
	}
	mem, err := memfd.New("guest memory", int64(g.memory()))
	if err != nil {
		return nil, err
	}
	r.memory = mem
	defer func() {
		if err != nil {
			mem.Close()
		}
	}()
	add(protocol.FileMemory, mem)
	add(protocol.FileKernel, g.Kernel)
	add(protocol.FileInitrd, g.Initrd)
	add(protocol.FileProfile, g.Profile)
	add(protocol.FileConsole, g.Console)
	add(protocol.FileChannel, g.Channel)
	if g.Build.Spec.Boot.Firmware == spec.OVMF {
		add(protocol.FileCode, g.Firmware)
		add(protocol.FileVars, g.Vars)
	}
	fronts, err := g.storage.Attach(ctx, d, mem)
	if err != nil {
		return nil, err
	}
	for _, f := range fronts {
		own = append(own, f)
		add(protocol.FileBlock, f)
	}
	if fronts, err = g.nics.attach(r, mem); err != nil {
		return nil, err
	}
	for _, f := range fronts {
		own = append(own, f)
		add(protocol.FileNetwork, f)
	}
	if g.Emulator == spec.QEMU {
		for range fronts {
			door, entrance, err := b.door()
			if err != nil {
				return nil, err
			}
			own = append(own, door, entrance)
			add(protocol.FileDoor, door)
			add(protocol.FileEntrance, entrance)
		}
	}
	if g.Emulator == spec.Native {
		kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		own = append(own, kvm)
		add(protocol.FileKVM, kvm)
	}
	if err := b.depends(ctx, g, d); err != nil {
		return nil, err
	}
	if err := b.store.Announce(ctx, d); err != nil {
		return nil, err
	}
	st, number, err := b.store.Connect(ctx, d)
	if err != nil {
		return nil, err
	}
	own = append(own, st)
	add(protocol.FileStore, st)
	tpm := !g.Build.Spec.TPM.Disabled
	if tpm {
		front, back, err := ipc.Files()
		if err != nil {
			return nil, err
		}
		own = append(own, front, back)
		add(protocol.FileTPM, front)
		// The engine's work can begin before the emulator's: it does not wait for it.
		err = b.vtpm.Attach(ctx, protocol.Attach{
			UUID: g.Build.UUID, Domain: d, Deadline: time.Duration(g.Build.Spec.TPM.Timeout),
			NoGate: g.Build.Options.NoGate, Poll: g.Build.Options.Poll, Fresh: true,
		}, back)
		if err != nil {
			return nil, err
		}
	}
	if tpm && g.Build.Options.VTPMFirst {
		if err := b.provision(ctx, g, d); err != nil {
			return nil, err
		}
	}
	r.proc, err = b.procs.Start(services.Emulator, launch.Order{Whose: g.name(), Memory: g.memory()})
	if err != nil {
		return nil, err
	}
	r.is = audit.NewInstance(services.Emulator, r.proc.PID())
	b.hear(g, r)
	b.wg.Go(r.listen)
	if tpm && !g.Build.Options.VTPMFirst {
		b.wg.Go(func() {
			if err := b.provision(context.Background(), g, d); err != nil {
				r.fail(fmt.Sprintf("vTPM: %v", err))
			}
		})
	}
	err = b.handOver(g, r, slices.Contains(msg.Files, protocol.FileKVM))
	if err == nil {
		msg.PCI, err = g.bus.Wait(ctx)
	}
	if err == nil {
		if _, err = r.peer.Call(ctx, protocol.MethodStart, msg, nil, give...); err != nil {
			err = r.startError(err)
		}
	}
	if err != nil {
		r.proc.Kill()
		<-r.proc.Done()
		b.journal.Note(b.journal.Ended(r.is, r.proc.Err(), []string{g.name()}))
		return nil, err
	}
	g.storage.Runs(r)
	g.nics.setRun(r)
	b.store.Hold(d, number, r.peer, func(err error) { r.fail(err.Error()) })
	return r, nil
}

// startQEMU starts the QEMU of an emulator that asks for it, once.
func (r *run) startQEMU(b *Builder, g *guest, req *rpc.Request) (any, error) {
	r.mu.Lock()
	again := r.qemu
	r.qemu = true
	r.mu.Unlock()
	if again {
		ipc.CloseAll(req.Files)
		return nil, rpc.Errorf(rpc.Refused, "builder: an emulator has one QEMU")
	}
	i := services.Instance{Label: services.QEMU + "-" + g.name(), Memory: uint64(g.Build.Spec.Memory), KVM: choice.HaveKVM(), NICs: len(g.Build.Spec.NICs) > 0}
	if i.KVM {
		st, err := os.Stat("/dev/kvm")
		if err != nil {
			ipc.CloseAll(req.Files)
			return nil, err
		}
		if i.KVMGroup = launch.Owner(st)[1]; i.KVMGroup == 0 || st.Mode().Perm()&0o060 != 0o060 {
			ipc.CloseAll(req.Files)
			return nil, rpc.Errorf(rpc.Unavailable, "/dev/kvm belongs to no group: give it one, as udev does (chgrp kvm /dev/kvm; chmod 660 /dev/kvm)")
		}
	}
	if err := b.handQEMU(g, r, i.KVM); err != nil {
		ipc.CloseAll(req.Files)
		return nil, err
	}
	started, err := b.procs.Program(req, services.QEMU, i)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pid = started.PID
	return started, err
}

// startError prefers the emulator's own last words to the broken connection they caused.
func (r *run) startError(err error) error {
	if !errors.Is(err, rpc.ErrGone) {
		return err
	}
	<-r.proc.Done()
	if perr := r.proc.Err(); perr != nil {
		return perr
	}
	return err
}

// provision is the vTPM's side of a start, beside the running kernel (steps 3–5): create the
// device, write its number, measure.
func (b *Builder) provision(ctx context.Context, g *guest, d tree.Domain) error {
	b.event(g, protocol.Event{Kind: protocol.EventVTPMAsked})
	measured := make(chan error, 1)
	go func() { measured <- g.measure() }()
	known := sync.OnceValue(func() error { return <-measured })
	return b.vtpm.Provision(ctx, g.Build.UUID, func(manager *rpc.Peer) error {
		var created protocol.Created
		_, err := manager.Call(ctx, protocol.MethodCreate, protocol.Create{
			UUID: g.Build.UUID, Name: g.name(), Delay: g.Build.Options.VTPMDelay,
		}, &created)
		if err == nil {
			err = b.store.Set(ctx, []state.Node{{Path: server.BackPath(d) + "/instance", Value: strconv.Itoa(created.Instance)}})
		}
		if merr := known(); merr != nil {
			err = errors.Join(err, merr)
		}
		if err != nil {
			return err
		}
		_, err = manager.Call(ctx, protocol.MethodMeasure, protocol.Measure{
			UUID: g.Build.UUID, Log: g.log, GuestLog: g.Build.Spec.Boot.Firmware == "",
		}, nil)
		return err
	})
}

// measure makes the event log of what the guest was given, once: a reboot gives it the same.
func (g *guest) measure() (err error) {
	if g.log == nil {
		g.log, err = measure.Log(&g.Guest)
	}
	return err
}

// setRun makes r the guest's running emulator, which ends at once if the vTPM failed before. From here on
// the guest outlives the Builder. After an error r has ended.
func (b *Builder) setRun(g *guest, r *run) error {
	g.mu.Lock()
	last := g.run
	g.run = r
	lost := g.lost
	g.lost = ""
	g.mu.Unlock()
	if err := b.keepRun(g); err != nil {
		g.mu.Lock()
		g.run = last
		g.mu.Unlock()
		r.proc.Kill()
		<-r.proc.Done()
		b.forget(r.domain)
		return err
	}
	if lost != "" {
		r.fail("vTPM: " + lost)
	}
	return nil
}

// vtpmFailed ends the guest: without its vTPM it must not go on.
func (g *guest) vtpmFailed(reason string) {
	g.mu.Lock()
	r := g.run
	if r == nil || r.ended() {
		g.lost = reason
		r = nil
	}
	g.mu.Unlock()
	if r != nil {
		r.fail("vTPM: " + reason)
	}
}

// ended reports whether the emulator process is gone: then a failure is that of the next one,
// which is being started.
func (r *run) ended() bool {
	if r.proc == nil {
		return true
	}
	select {
	case <-r.proc.Done():
		return true
	default:
		return false
	}
}

// fail ends a run because the guest must not go on.
func (r *run) fail(reason string) {
	r.mu.Lock()
	if r.failed == "" && r.exit == nil {
		r.failed = reason
	}
	r.mu.Unlock()
	r.changed()
	r.end()
}

// hear has the emulator's connection served, when listen does.
func (b *Builder) hear(g *guest, r *run) {
	r.peer = rpc.New(r.proc.Control, calls.Watched(b.journal, services.Emulator, g.name(), b.fromEmulator(g, r)))
	r.peer.Bound(keeper.Room)
}

// listen takes in what the emulator says. One that says nothing any more, or does not listen, ends.
func (r *run) listen() {
	_ = r.peer.Run(context.Background())
	close(r.heard)
	r.killLater()
}

// end makes sure that the emulator ends, and tells it to. It waits for nothing.
func (r *run) end() {
	r.killLater()
	if r.peer != nil { // as one that was inherited and not heard yet
		go func() { _ = r.peer.Notify(protocol.MethodEnd, struct{}{}) }() // ends with the emulator at the latest
	}
}

// killLater makes sure that an emulator that was told to end does.
func (r *run) killLater() {
	if r.proc == nil {
		return
	}
	t := time.AfterFunc(stopGrace/2, r.proc.Kill)
	go func() {
		<-r.proc.Done()
		t.Stop()
	}()
}

// outcome is how a run ended, from the emulator's own word where it left one.
func (r *run) outcome(g *guest) protocol.Exit {
	<-r.proc.Done()
	<-r.heard
	return r.lastWord(g.isAsked(), r.proc.Err())
}

// lastWord is how a run ended of which all that was said was heard; err is its process's end.
func (r *run) lastWord(asked bool, err error) protocol.Exit {
	r.mu.Lock()
	defer r.mu.Unlock()
	return kept.LastWord(r.failed, r.exit, asked, err)
}
