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
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

// A guest is one that was built and is not down. Its fields are fixed when it is made, save
// those beneath mu.
type guest struct {
	build    protocol.Build
	tenant   string
	emulator spec.Emulator
	kernel   *os.File // sealed copies of what the toolstack gave
	initrd   *os.File
	firmware *os.File // sealed copy of the firmware image, for a guest that boots through it
	vars     *os.File // OVMF's variable store of this guest
	disks    []*os.File
	bases    []*os.File // of those that are overlays, nil for others
	storage  *storage   // nil without disks
	nics     *nics      // nil without any
	bus      *assignment
	console  *os.File
	channel  *os.File
	ends     []*os.File // the toolstack's ends of both, and the console's log, for the next toolstack
	log      []byte     // event log of the measurements, once made; they are the same at each reboot

	mu       sync.Mutex
	timeline []protocol.Event
	run      *run
	asked    bool          // the operator asked for the end
	lost     string        // why the vTPM failed before run was there
	down     chan struct{} // closed when the guest is down for good
}

// name is what it is called on this host.
func (g *guest) name() string { return g.build.Spec.Name }

// memory is how much it has, in bytes.
func (g *guest) memory() uint64 { return uint64(g.build.Spec.Memory) }

// A run is one emulator process of a guest; a reboot makes a new one.
type run struct {
	domain tree.Domain
	proc   *process.Process
	peer   *rpc.Peer
	heard  chan struct{}  // closed when all the emulator said was taken in
	qemu   bool           // its QEMU was asked for; beneath mu
	asked  int            // it asked for so many back ends; beneath mu
	is     audit.Instance // in the audit log

	mu     sync.Mutex
	exit   *protocol.Exit // the emulator's own word
	failed string         // why the Builder ended it, if it did
}

// pauseAfter is how long a guest may wait at its gate before it is paused and its clock
// stopped: guests' watchdogs fire at about 20 s.
const pauseAfter = 10 * time.Second

func (g *guest) close() {
	for _, f := range slices.Concat([]*os.File{g.kernel, g.initrd, g.firmware, g.vars, g.console, g.channel}, g.disks, g.bases, g.ends) {
		if f != nil {
			f.Close()
		}
	}
}

// start runs one emulator process and everything that belongs to it. It returns when the
// guest's kernel is about to run; the vTPM's side goes on in a goroutine of its own.
func (b *Builder) start(ctx context.Context, g *guest) (_ *run, err error) {
	b.mu.Lock()
	d := b.next
	b.next++
	b.mu.Unlock()
	r := &run{domain: d, heard: make(chan struct{})}
	msg := protocol.Start{
		Name: g.name(), Emulator: g.emulator, Domain: d, CPUs: g.build.Spec.CPUs,
		Memory: uint64(g.build.Spec.Memory), Cmdline: g.build.Spec.Boot.Cmdline,
		Firmware: g.build.Spec.Boot.Firmware, PauseAfter: pauseAfter, KVM: haveKVM(),
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
	own = append(own, mem)
	add(protocol.FileMemory, mem)
	add(protocol.FileKernel, g.kernel)
	add(protocol.FileInitrd, g.initrd)
	add(protocol.FileConsole, g.console)
	add(protocol.FileChannel, g.channel)
	if g.build.Spec.Boot.Firmware == spec.OVMF {
		add(protocol.FileCode, g.firmware)
		add(protocol.FileVars, g.vars)
	}
	fronts, err := g.storage.attach(ctx, r, mem)
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
	if g.emulator == spec.QEMU {
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
	if g.emulator == spec.Native {
		kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		own = append(own, kvm)
		add(protocol.FileKVM, kvm)
	}
	defer func() {
		if err != nil {
			b.store.Forget(d)
		}
	}()
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
	tpm := !g.build.Spec.TPM.Disabled
	if tpm {
		front, back, err := ipc.Files()
		if err != nil {
			return nil, err
		}
		own = append(own, front, back)
		add(protocol.FileTPM, front)
		// The engine's work can begin before the emulator's: it does not wait for it.
		err = b.vtpm.Attach(ctx, protocol.Attach{
			UUID: g.build.UUID, Domain: d, Deadline: time.Duration(g.build.Spec.TPM.Timeout),
			NoGate: g.build.Options.NoGate, Poll: g.build.Options.Poll,
		}, back)
		if err != nil {
			return nil, err
		}
	}
	if tpm && g.build.Options.VTPMFirst {
		if err := b.provision(ctx, g, d); err != nil {
			return nil, err
		}
	}
	r.proc, err = b.procs.Start(services.Emulator, launch.Order{Whose: g.name(), Memory: g.memory()})
	if err != nil {
		return nil, err
	}
	r.is = audit.NewInstance(services.Emulator, r.proc.PID())
	r.peer = rpc.New(r.proc.Control, calls.Watched(b.journal, services.Emulator, g.name(), b.fromEmulator(g, r)))
	b.wg.Go(func() {
		defer close(r.heard)
		_ = r.peer.Run(context.Background())
	})
	if tpm && !g.build.Options.VTPMFirst {
		b.wg.Go(func() {
			if err := b.provision(context.Background(), g, d); err != nil {
				r.fail(fmt.Sprintf("vTPM: %v", err))
			}
		})
	}
	err = b.handOver(g, r, slices.Contains(msg.Files, protocol.FileKVM))
	if err == nil {
		msg.PCI, err = g.bus.wait(ctx)
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
	g.storage.setRun(r)
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
	i := services.Instance{Label: services.QEMU + "-" + g.name(), Memory: uint64(g.build.Spec.Memory), KVM: haveKVM(), NICs: len(g.build.Spec.NICs) > 0}
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
	return b.procs.Program(req, services.QEMU, i)
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
	return b.vtpm.Provision(ctx, g.build.UUID, func(manager *rpc.Peer) error {
		var created protocol.Created
		_, err := manager.Call(ctx, protocol.MethodCreate, protocol.Create{
			UUID: g.build.UUID, Name: g.name(), Delay: g.build.Options.VTPMDelay,
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
			UUID: g.build.UUID, Log: g.log, GuestLog: g.build.Spec.Boot.Firmware == "",
		}, nil)
		return err
	})
}

// setRun makes r the guest's running emulator, which ends at once if the vTPM failed before.
func (g *guest) setRun(r *run) {
	g.mu.Lock()
	g.run = r
	lost := g.lost
	g.lost = ""
	g.mu.Unlock()
	if lost != "" {
		r.fail("vTPM: " + lost)
	}
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
	_ = r.peer.Notify(protocol.MethodEnd, struct{}{})
	r.killLater()
}

// killLater makes sure that an emulator that was told to end does.
func (r *run) killLater() {
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
	asked := g.isAsked()
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.failed != "":
		return protocol.Exit{Outcome: protocol.Crashed, Reason: r.failed}
	case r.exit != nil && r.exit.Outcome == protocol.Stopped && !asked:
		return protocol.Exit{Outcome: protocol.Crashed, Reason: "the emulator was ended from outside"}
	case r.exit != nil:
		return *r.exit
	case asked:
		return protocol.Exit{Outcome: protocol.Stopped, Reason: "ended by the operator"}
	}
	reason := "the emulator ended without a word"
	if err := r.proc.Err(); err != nil {
		reason = err.Error()
	}
	return protocol.Exit{Outcome: protocol.Crashed, Reason: reason}
}
