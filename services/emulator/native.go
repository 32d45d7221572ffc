package emulator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/monitor"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/vtpm/frontend"
)

// nativeMachine is a guest under our own monitor. The monitor is made in Run, once the TPM's
// front end exists.
type nativeMachine struct {
	g       *guest
	console net.Conn
	modules *isolate.Modules // nil: they are the guest's kernel's

	mu sync.Mutex
	m  *monitor.Machine // nil before Run
}

func newNative(g *guest) (machine, error) {
	modules, err := g.modules()
	if err != nil {
		return nil, err
	}
	f := one(g.files, protocol.FileConsole)
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	return &nativeMachine{g: g, console: c, modules: modules}, nil
}

var errNotRunning = errors.New("the guest does not run yet")

// with calls f with the monitor, if there is one.
func (n *nativeMachine) with(f func(*monitor.Machine) error) error {
	n.mu.Lock()
	m := n.m
	n.mu.Unlock()
	if m == nil {
		return errNotRunning
	}
	return f(m)
}

func (n *nativeMachine) Pause() error       { return n.with((*monitor.Machine).Pause) }
func (n *nativeMachine) Resume() error      { return n.with((*monitor.Machine).Resume) }
func (n *nativeMachine) PowerButton() error { return n.with((*monitor.Machine).PowerButton) }

// Masked implements machine.
func (n *nativeMachine) Masked() (masked []int, err error) {
	err = n.with(func(m *monitor.Machine) (err error) {
		masked, err = m.Masked()
		return err
	})
	return masked, err
}

// SetEventLog may come before the machine is made, when the vTPM is the faster side.
func (n *nativeMachine) SetEventLog(log []byte) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.m == nil {
		n.g.early = append([]byte(nil), log...)
		return nil
	}
	return n.m.SetEventLog(log)
}

// ReadEventLog: no firmware, no log of its own.
func (n *nativeMachine) ReadEventLog() ([]byte, error) {
	return nil, errors.New("the native monitor runs no firmware")
}

func (n *nativeMachine) Run(ctx context.Context, tpm *frontend.Frontend, started func()) protocol.Exit {
	crashed := func(err error) protocol.Exit {
		return protocol.Exit{Outcome: protocol.Crashed, Reason: err.Error()}
	}
	devices, err := n.g.devices()
	if err != nil {
		return crashed(err)
	}
	input := make(chan []byte)
	output := newLineWriter(n.console)
	events := moduleEvents{tell: func(text string) { n.g.service.event(protocol.EventModule, text) }}
	refused := make(chan string, 1)
	if policy := n.g.in.Modules; policy != nil && policy.Response == spec.PauseWhenRefused {
		events.halt = func(why string) {
			select {
			case refused <- why:
			default: // it is about to be paused
			}
		}
	}
	exited := make(chan struct{}, 1)
	cfg := monitor.Config{
		KVM: one(n.g.files, protocol.FileKVM), Memory: one(n.g.files, protocol.FileMemory),
		MemoryBytes: n.g.in.Memory, VCPUs: n.g.in.CPUs,
		Kernel: one(n.g.files, protocol.FileKernel), Initrd: one(n.g.files, protocol.FileInitrd),
		Cmdline: n.g.in.Cmdline, Devices: devices,
		ConsoleOut: output, ConsoleIn: input,
		Modules: n.modules, OnModule: events.event,
		ExitsEvery: n.g.in.Exits, OnExits: func() {
			select {
			case exited <- struct{}{}:
			default: // it is about to be told
			}
		},
		OnTPMAccess: func() {
			n.g.xenbus.connect()
			n.g.service.event(protocol.EventFirstAccess, "")
		},
		OnEvent: func(e monitor.Event) {
			if e == monitor.EventStarted {
				started()
			}
		},
	}
	if tpm != nil {
		cfg.TPM = tpm
	}
	m, err := monitor.New(cfg)
	if err != nil {
		return crashed(err)
	}
	n.mu.Lock()
	n.m = m
	err = nil
	if n.g.early != nil {
		err = m.SetEventLog(n.g.early)
	}
	n.mu.Unlock()
	if err != nil {
		return crashed(errors.Join(err, m.Close()))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		n.read(ctx, input)
	}()
	if tpm != nil {
		go func() { // a vTPM that fails while the guest is idle fails the guest
			select {
			case <-tpm.Done():
				cancel()
			case <-ctx.Done():
			}
		}()
	}
	var telling sync.WaitGroup
	telling.Go(func() { n.tellExits(ctx, m, exited) })
	telling.Go(func() { n.halts(ctx, refused) })
	out, err := m.Run(ctx)
	cancel()
	output.Flush()
	n.console.Close()
	<-reading
	telling.Wait()
	if err = errors.Join(err, m.Close()); err != nil {
		return crashed(err)
	}
	exit := protocol.Exit{Outcome: outcomes[out.Kind], Reason: out.Reason}
	if out.Kind == monitor.Stopped && n.g.service.ctx.Err() == nil {
		exit.Outcome = protocol.Crashed // the vTPM's end; explain says why
	}
	return exit
}

// tellExits tells how often the guest's processors have left it, whenever that is asked for.
func (n *nativeMachine) tellExits(ctx context.Context, m *monitor.Machine, exited <-chan struct{}) {
	for {
		select {
		case <-exited:
			_ = n.g.service.peer.Notify(protocol.NoticeExits, protocol.Exits{Count: m.Exits()}) // one that is lost is followed by another
		case <-ctx.Done():
			return
		}
	}
}

// outcomes: a triple fault is a crash, not a reboot: our guests have a reset register.
var outcomes = map[monitor.Kind]protocol.Outcome{
	monitor.PowerOff: protocol.PowerOff, monitor.Reboot: protocol.Reboot,
	monitor.TripleFault: protocol.Crashed, monitor.Stopped: protocol.Stopped, monitor.Crash: protocol.Crashed,
}

// read passes on what is typed until the console is closed.
func (n *nativeMachine) read(ctx context.Context, input chan<- []byte) {
	defer close(input)
	buf := make([]byte, 4096)
	for {
		k, err := n.console.Read(buf)
		if err != nil {
			return
		}
		select {
		case input <- append([]byte(nil), buf[:k]...):
		case <-ctx.Done():
			return
		}
	}
}

func (n *nativeMachine) Close() error {
	n.console.Close()
	return nil
}
