// Package kept is the Builder's side of the vTPM service: it keeps the manager running beneath the
// guests it serves.
//
// The manager may die at any moment, and on a timer it does. What it cannot take with it is here: for
// each guest a journal (package journal), the manager's end of the emulator's TPM channel, and its
// ends of the engine's channels and lifeline. The next manager inherits them and goes on where the
// last one was; the guest's command waits meanwhile. A guest whose vTPM was not ready has it
// created and measured anew, for it was not let in; one whose vTPM is lost is failed closed. All of it
// outlives the Builder, too ([Left]).
package kept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/journal"
)

// Options of a Manager. Those without a remark are required.
type Options struct {
	Log     *slog.Logger
	Journal *audit.Journal
	Every   time.Duration  // how often it is replaced; 0: never by itself
	Kept    *fdstore.Store // outlives the Builder; may be nil
	Left    Devices        // of a Builder that died

	Start     func() (keeper.Process, error)                // starts the service
	Configure func(context.Context, *keeper.Instance) error // tells it what it must know
	Handler   rpc.Handler                                   // serves what it asks, but Keep
	Guests    func() []string                               // those that depend on it: all
	Leftovers func(ctx context.Context, kept []int) error   // waits for the end of all other engines
	Again     func(uuid string, d tree.Domain)              // the attached guest's vTPM must be provisioned anew
	Gone      func(uuid string)                             // the manager of the attached guest is gone
	Fail      func(uuid, reason string)                     // the guest must be failed closed
	Lost      func(error)                                   // it cannot be kept running
}

// A Manager keeps the service running, from Begin to Close. Its methods may be called concurrently,
// those of one guest one after the other.
type Manager struct {
	o      Options
	keeper *keeper.Keeper

	wg sync.WaitGroup // guests that are being inherited

	// mu is taken for moments only, also by who holds the keeper's lock.
	mu      sync.Mutex
	number  uint64 // of the manager there is or was last
	closing bool
	devices map[string]*device
}

// stage is how far a guest's start has come, as the Builder has made it.
type stage int

const (
	alone       stage = iota // no emulator is attached
	attached                 // one is, and provisioning it is about to begin
	provisioned              // that was done
)

// A device is a guest's vTPM.
type device struct {
	journal *os.File
	attach  protocol.Attach
	channel *os.File   // the manager's end; nil while alone
	engine  []*os.File // control, data, lifeline, output; nil while there is none
	pid     int        // the engine's
	stage   stage
	ready   uint64        // number of the manager that inherited it ready
	settled chan struct{} // closed when the last manager has inherited it, or not; nil before the second
}

// dropEngine gives the engine up, which ends with it.
func (m *Manager) dropEngine(uuid string, d *device) {
	ipc.CloseAll(d.engine)
	d.engine, d.pid = nil, 0
	_ = m.save(uuid, d) // kept by nobody, it ends all the same
}

// dropChannel follows the end of the emulator.
func (m *Manager) dropChannel(uuid string, d *device) {
	d.closeChannel()
	_ = m.save(uuid, d)
}

func (d *device) closeChannel() {
	if d.channel != nil {
		d.channel.Close()
		d.channel = nil
	}
	d.stage = alone
}

const (
	// inheritLimit bounds what a new manager may take for one guest: it may have to wait for a command,
	// which the engine's own limit bounds.
	inheritLimit = 150 * time.Second
	// settleTime is how long the others wait for such a guest: one that makes a key takes seconds.
	settleTime = 2 * time.Second
)

// New makes a Manager, which starts nothing yet.
func New(o Options) *Manager {
	m := &Manager{o: o, devices: map[string]*device{}}
	maps.Copy(m.devices, o.Left)
	m.keeper = keeper.New(keeper.Options{
		Service: services.VTPM, Log: o.Log, Journal: o.Journal, Final: true,
		Start: func() (keeper.Process, error) {
			p, err := o.Start()
			return process{p, m}, err
		},
		Handler: func(i *keeper.Instance) rpc.Handler {
			return calls.Watched(o.Journal, services.VTPM, "", m.handler(i))
		},
		Ready: m.ready,
		Record: func(i *keeper.Instance) (all []audit.Entry) {
			for _, g := range o.Guests() {
				all = append(all, o.Journal.Linked(g, i.Name))
			}
			return all
		},
		Guests: o.Guests,
		Ended:  m.ended,
		Lost:   o.Lost, Every: o.Every, Drain: time.Minute,
	})
	return m
}

// Begin starts the service. Functions of Options are called before it returns: what they begin may use the Manager.
func (m *Manager) Begin(ctx context.Context) error {
	m.keeper.Lock()
	defer m.keeper.Unlock()
	return m.keeper.Begin(ctx)
}

// ended tells the guests, and sees that what the manager asked for is done.
func (m *Manager) ended(i *keeper.Instance) {
	m.mu.Lock()
	var all []string
	for uuid, d := range m.devices {
		if d.channel != nil && !m.closing {
			all = append(all, uuid)
		}
	}
	m.mu.Unlock()
	for _, uuid := range all {
		m.o.Gone(uuid)
	}
	<-i.Heard()
}

// process is the manager's. To ask it to end is to have it shut all engines down, which it is told before
// its connection ends; one that is replaced is killed, which it is made for.
type process struct {
	keeper.Process
	m *Manager
}

func (p process) Stop(ctx context.Context) error {
	p.m.mu.Lock()
	closing := p.m.closing
	p.m.mu.Unlock()
	if closing {
		told := rpc.New(p.Conn(), nil)
		told.Bound(time.Second)
		_ = told.Notify(protocol.NoticeShutdown, struct{}{}) // or it is gone
		return p.Process.Stop(ctx)
	}
	p.Kill()
	<-p.Done()
	return nil
}

// Close ends the manager and with it all engines, in order within the grace.
func (m *Manager) Close(grace time.Duration) {
	m.mu.Lock()
	m.closing = true
	m.mu.Unlock()
	m.keeper.Close(grace)
	m.wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	for uuid, d := range m.devices {
		m.forget(uuid, d)
	}
}

// Reset replaces a manager that runs well.
func (m *Manager) Reset() bool { return m.keeper.Reset() }

// Instance is the manager in force, as the audit log names it.
func (m *Manager) Instance(ctx context.Context) (audit.Instance, error) {
	i, err := m.keeper.Current(ctx)
	if err != nil {
		return audit.Instance{}, err
	}
	return i.Name, nil
}

// Call makes a call that may be made twice, to this manager or the next.
func (m *Manager) Call(ctx context.Context, method string, in, out any) error {
	return m.keeper.Call(ctx, func(i *keeper.Instance) error {
		_, err := i.Peer.Call(ctx, method, in, out)
		return err
	})
}

// Attach has the manager serve an emulator, whose channel's other end is back, the caller's.
func (m *Manager) Attach(ctx context.Context, in protocol.Attach, back *os.File) error {
	own, err := ipc.Duplicate(back)
	if err != nil {
		return err
	}
	in.Files = protocol.Files{protocol.FileTPM, protocol.FileJournal}
	memory, err := m.attached(in, own[0])
	if err != nil {
		ipc.CloseAll(own)
		return err
	}
	return m.keeper.Call(ctx, func(i *keeper.Instance) error {
		_, err := i.Peer.Call(ctx, protocol.MethodAttach, in, nil, back, memory)
		return err
	})
}

// attached notes it, before it is said: whatever manager comes next is told.
func (m *Manager) attached(in protocol.Attach, channel *os.File) (memory *os.File, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.devices[in.UUID]
	if d == nil {
		d = &device{}
		if d.journal, err = journal.Create(); err != nil {
			return nil, err
		}
		m.devices[in.UUID] = d
	}
	d.closeChannel()
	d.attach, d.channel, d.stage, d.ready = in, channel, attached, 0
	if err := m.save(in.UUID, d); err != nil {
		d.channel = nil // the caller's
		return nil, err
	}
	return d.journal, nil
}

// Provision has f create and measure the vTPM of an attached guest, and again at the next manager
// where this one dies over it.
func (m *Manager) Provision(ctx context.Context, uuid string, f func(*rpc.Peer) error) error {
	err := m.keeper.Call(ctx, func(i *keeper.Instance) error {
		m.mu.Lock()
		d := m.devices[uuid]
		m.mu.Unlock()
		if d == nil {
			return rpc.Errorf(rpc.Unavailable, "the guest is down")
		}
		ready, err := m.inherited(ctx, i, d)
		if err != nil || ready { // what f did was all that was to be done, and this one inherited it
			return err
		}
		return f(i.Peer)
	})
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.devices[uuid]; d != nil && d.stage == attached {
		d.stage = provisioned
	}
	return nil // what is kept says attached: who follows provisions it where that was not done
}

// inherited waits until it is known whether a manager has inherited a device ready.
func (m *Manager) inherited(ctx context.Context, i *keeper.Instance, d *device) (bool, error) {
	m.mu.Lock()
	settled := d.settled
	m.mu.Unlock()
	if settled != nil {
		select {
		case <-settled:
		case <-i.Done():
			return false, rpc.ErrGone
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return d.ready == i.Number, nil
}

// Release says that a guest's emulator is gone. With keep another one follows; else the vTPM ends.
func (m *Manager) Release(ctx context.Context, uuid string, keep bool) error {
	m.mu.Lock()
	d := m.devices[uuid]
	if d != nil {
		m.dropChannel(uuid, d)
	}
	m.mu.Unlock()
	err := m.Call(ctx, protocol.MethodRelease, protocol.Release{UUID: uuid, Keep: keep}, nil)
	if keep || d == nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(uuid, d)
	return err
}

// handler serves what a manager says.
func (m *Manager) handler(i *keeper.Instance) rpc.Handler {
	return func(ctx context.Context, r *rpc.Request) (any, error) {
		if r.Method == protocol.MethodKeep {
			return struct{}{}, m.keep(i, r)
		}
		return m.o.Handler(ctx, r)
	}
}

// keep takes an engine into keeping.
func (m *Manager) keep(i *keeper.Instance, r *rpc.Request) error {
	var in protocol.Keep
	if err := r.Decode(&in); err != nil {
		return err
	}
	byName, err := in.Files.Take(r)
	if err != nil {
		return err
	}
	var files []*os.File
	for _, n := range engineFiles {
		if len(byName[n]) != 1 {
			ipc.CloseAll(r.Files)
			return rpc.Errorf(rpc.Invalid, "keep: one %s is needed", n)
		}
		files = append(files, byName[n][0])
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.devices[in.UUID]
	if d == nil || i.Number < m.number || len(files) != len(r.Files) {
		ipc.CloseAll(r.Files)
		return rpc.Errorf(rpc.Refused, "keep: no such guest, or the manager was replaced")
	}
	ipc.CloseAll(d.engine)
	d.engine, d.pid = files, in.PID
	return m.save(in.UUID, d)
}

var engineFiles = protocol.Files{protocol.FileControl, protocol.FileData, protocol.FileLifeline, protocol.FileOutput}

// ready tells a new manager what it must know, and has it inherit all guests.
func (m *Manager) ready(ctx context.Context, i *keeper.Instance) error {
	m.mu.Lock()
	m.number = i.Number // from now on the last one's engines are not taken into keeping
	var kept []int
	all := map[string]*device{}
	for uuid, d := range m.devices {
		all[uuid] = d
		if d.pid != 0 {
			kept = append(kept, d.pid)
		}
	}
	m.mu.Unlock()
	// An engine that the last one had not given away ends with it, and then its state is free.
	if err := m.o.Leftovers(ctx, kept); err != nil {
		return err
	}
	if err := m.o.Configure(ctx, i); err != nil {
		return err
	}
	errs := make(chan error, len(all))
	for uuid, d := range all {
		settled := make(chan struct{})
		m.mu.Lock()
		d.settled = settled
		m.mu.Unlock()
		m.wg.Go(func() { // ends with the manager at the latest
			defer close(settled)
			err := m.inherit(i, uuid, d)
			if err != nil {
				m.o.Log.Warn("vTPM manager", "guest", uuid, "err", err)
			}
			errs <- err
		})
	}
	late := time.NewTimer(settleTime)
	defer late.Stop()
	for range all {
		select {
		case err := <-errs:
			if err != nil {
				return err
			}
		case <-late.C: // a guest whose vTPM takes its time holds up nobody else
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// inherit has a new manager inherit one guest. An error says that the manager is of no use, or gone.
func (m *Manager) inherit(i *keeper.Instance, uuid string, d *device) error {
	in, files, err := m.inheritance(uuid, d)
	if err == nil && files == nil {
		return nil
	}
	defer ipc.CloseAll(files)
	ctx, cancel := context.WithTimeout(context.Background(), inheritLimit)
	defer cancel()
	var out protocol.Inherited
	if err == nil {
		_, err = i.Peer.Call(ctx, protocol.MethodInherit, in, &out, files...)
	}
	if errors.Is(err, rpc.ErrGone) {
		return fmt.Errorf("inherit the vTPM of %s: %w", uuid, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.devices[uuid] != d || m.number != i.Number { // its guest or the manager ended meanwhile
		return nil
	}
	switch {
	case err != nil:
		m.o.Log.Warn("a vTPM is lost with its manager", "guest", uuid, "err", err)
		m.dropEngine(uuid, d)
		m.o.Fail(uuid, fmt.Sprintf("lost with its manager: %v", err))
	case out.Ready:
		d.ready = i.Number
	default:
		if in.PID == d.pid {
			m.dropEngine(uuid, d)
		}
		if d.stage == provisioned {
			d.stage = attached
			m.o.Again(uuid, d.attach.Domain)
		}
	}
	return nil
}

// inheritance is what there is of a guest, as copies; none where there is nothing.
func (m *Manager) inheritance(uuid string, d *device) (in protocol.Inherit, files []*os.File, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.devices[uuid] != d || d.channel == nil && d.engine == nil {
		return in, nil, nil
	}
	in = protocol.Inherit{Attach: d.attach, PID: d.pid}
	in.Files = protocol.Files{protocol.FileJournal}
	from := []*os.File{d.journal}
	if d.channel != nil {
		in.Files, from = append(in.Files, protocol.FileTPM), append(from, d.channel)
	}
	if d.engine != nil {
		in.Files, from = append(in.Files, engineFiles...), append(from, d.engine...)
	}
	files, err = ipc.Duplicate(from...)
	return in, files, err
}
