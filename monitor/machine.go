package monitor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/kvm"
	"redoubt.dev/redoubt/monitor/serial"
	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/vtpm/crb"
)

// A Machine is one guest. New builds it, Run runs it once, Close frees it.
//
// Lock order: Machine.ring, serial port; Machine.mu, pci.Bus and the interrupt table stand alone.
// None is held over Execute.
type Machine struct {
	cfg    Config
	vm     *kvm.VM
	mem    *memory
	ecam   []byte
	tpmRAM []byte
	vcpus  []*vcpu
	irqs   *interrupts
	bus    *pci.Bus
	serial *serial.Port
	tpm    *crb.Device        // nil: none
	fence  *isolate.Isolation // nil: none

	coalesced bool       // console writes may wait in the kernel's ring
	ring      sync.Mutex // over draining it

	pieces map[piece]uint32 // RAM, and its memory slots
	free   []uint32         // slots below the highest that was used

	events [numEvents]atomic.Bool

	mu      sync.Mutex
	changed *sync.Cond // any of the below, or a vCPU's still
	started bool
	ended   bool
	closed  bool
	stop    bool
	closing sync.WaitGroup // over the transport's Close, begun with stop
	outcome Outcome        // the first one, once stop is set
	paused  bool
	held    bool // one vCPU changes what the others see: see hold
	clock   frozenClock
}

// New builds the machine and loads the kernel; no vCPU runs yet. Its errors name the part of
// cfg that does not fit; after one, Devices that were attached are closed.
func New(cfg Config) (m *Machine, err error) {
	m = &Machine{cfg: cfg, pieces: map[piece]uint32{}}
	m.changed = sync.NewCond(&m.mu)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("monitor: %w", err), m.Close())
			m = nil
		}
	}()
	if err := m.check(); err != nil {
		return m, err
	}
	sys, err := kvm.New(cfg.KVM)
	if err != nil {
		return m, err
	}
	err = sys.Require(kvm.UserMemory, kvm.IRQRouting, kvm.IRQFD, kvm.IOEventFD, kvm.AdjustClock,
		kvm.ReadOnlyMemory, kvm.ImmediateExit, kvm.ClockControl)
	if err != nil {
		return m, err
	}
	if m.vm, err = sys.CreateVM(); err != nil {
		return m, err
	}
	if err := m.mapRegions(); err != nil {
		return m, err
	}
	if err := m.vm.SetPrivatePages(identityMapAddr, tssAddr); err != nil {
		return m, err
	}
	if err := m.vm.CreateIRQChip(); err != nil {
		return m, err
	}
	if m.irqs, err = newInterrupts(m.vm); err != nil {
		return m, err
	}
	if err := m.makeDevices(sys); err != nil {
		return m, err
	}
	entry, err := m.loadKernel()
	if err != nil {
		return m, err
	}
	if err := m.makeVCPUs(sys, entry); err != nil {
		return m, err
	}
	return m, m.makeFence(sys)
}

func (m *Machine) check() error {
	c := &m.cfg
	switch {
	case c.KVM == nil || c.Memory == nil || c.Kernel == nil:
		return errors.New("KVM, Memory and Kernel are required")
	case c.VCPUs < 1 || c.VCPUs > MaxVCPUs:
		return fmt.Errorf("%d vCPUs: want 1 to %d", c.VCPUs, MaxVCPUs)
	case c.MemoryBytes < MinMemory || c.MemoryBytes > MaxMemory || c.MemoryBytes%(2<<20) != 0:
		return fmt.Errorf("memory of %d bytes: want a multiple of 2 MiB from 128 MiB to 1 TiB", c.MemoryBytes)
	case c.Modules != nil && c.TPM == nil:
		return errors.New("modules can be isolated only in a guest with a TPM")
	}
	if c.ConsoleOut == nil {
		c.ConsoleOut = io.Discard
	}
	return nil
}

func (m *Machine) mapRegions() error {
	var err error
	if m.mem, err = mapMemory(m.cfg.Memory, m.cfg.MemoryBytes); err != nil {
		return err
	}
	if m.ecam, err = anonymous(pci.ECAMSize); err != nil {
		return err
	}
	if m.tpmRAM, err = anonymous(crb.BufferSize); err != nil {
		return err
	}
	err = errors.Join(m.punch(nil), m.vm.SetMemory(slotECAM, kvm.ReadOnly, ecamBase, m.ecam))
	if m.cfg.TPM != nil {
		err = errors.Join(err, m.vm.SetMemory(slotTPM, 0, crb.Buffer, m.tpmRAM))
	}
	return err
}

func (m *Machine) makeDevices(sys *kvm.System) error {
	m.serial = serial.New(consoleWriter{m}, func(high bool) {
		// It fails only when the machine is going away.
		_ = m.vm.SetLine(gsiSerial, high)
	})
	if n, err := sys.Check(kvm.CoalescedPIO); err != nil {
		return err
	} else if n > 0 {
		if err := m.vm.CoalescePort(portSerial); err != nil {
			return err
		}
		m.coalesced = true
	}
	var err error
	if m.cfg.TPM != nil {
		m.tpm, err = crb.New(transport{m}, m.tpmRAM, m.tpmAccessed, func() { m.event(EventTPMCommand) })
		if err != nil {
			return err
		}
	}
	host := pci.Host{Memory: m.mem, Interrupts: m.irqs, Doorbells: doorbells{m.vm}}
	if m.bus, err = pci.NewBus(host, m.ecam); err != nil {
		return err
	}
	return m.bus.Build(m.cfg.Devices...)
}

// mtrrDefault: MTRRs enabled, memory is write-back by default (Intel SDM vol. 3 §11.11.2.1).
const (
	msrMTRRDefault  = 0x2ff
	mtrrDefaultType = 1<<11 | 6
)

func (m *Machine) makeVCPUs(sys *kvm.System, entry uint64) error {
	supported, err := sys.SupportedCPUID()
	if err != nil {
		return err
	}
	deadline, err := sys.Check(kvm.TSCDeadline)
	if err != nil {
		return err
	}
	for id := range m.cfg.VCPUs {
		c, err := m.vm.CreateVCPU(id)
		if err != nil {
			return err
		}
		m.vcpus = append(m.vcpus, &vcpu{VCPU: c, m: m, still: true})
		if err := c.SetCPUID(cpuid(supported, id, m.cfg.VCPUs, deadline > 0)); err != nil {
			return err
		}
		if err := c.SetMSRs([]kvm.MSR{{Index: msrMTRRDefault, Value: mtrrDefaultType}}); err != nil {
			return err
		}
	}
	// The others wait in the kernel for the guest to start them.
	return m.enterLongMode(m.vcpus[0].VCPU, entry)
}

// Run starts the vCPUs and returns when the last one has stopped. It may be called once. The
// error is for misuse; whatever happens to the guest is the Outcome.
func (m *Machine) Run(ctx context.Context) (Outcome, error) {
	m.mu.Lock()
	if m.started || m.closed {
		m.mu.Unlock()
		return Outcome{}, errors.New("monitor: a machine runs once")
	}
	m.started = true
	m.mu.Unlock()

	unwatch := context.AfterFunc(ctx, func() {
		m.end(Outcome{Stopped, context.Cause(ctx).Error()})
	})
	inputDone := make(chan struct{})
	var input, cpus sync.WaitGroup
	if m.cfg.ConsoleIn != nil {
		input.Go(func() { m.feedConsole(inputDone) })
	}
	m.event(EventStarted)
	for _, c := range m.vcpus {
		cpus.Go(c.loop)
	}
	cpus.Wait() // only stop ends them, so nothing joins closing from here on
	m.closing.Wait()
	unwatch()
	close(inputDone)
	m.serial.Close()
	input.Wait()
	m.drain(m.vcpus[0])
	m.event(EventEnded)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = true
	return m.outcome, nil
}

func (m *Machine) feedConsole(done <-chan struct{}) {
	for {
		select {
		case data, ok := <-m.cfg.ConsoleIn:
			if !ok || !m.serial.Receive(data) {
				return
			}
		case <-done:
			return
		}
	}
}

// end stops the machine; the first caller's outcome stands.
func (m *Machine) end(o Outcome) {
	m.mu.Lock()
	if m.stop {
		m.mu.Unlock()
		return
	}
	m.stop, m.outcome = true, o
	m.changed.Broadcast()
	for _, c := range m.vcpus {
		c.Kick()
	}
	if c, ok := m.cfg.TPM.(io.Closer); ok {
		// A goroutine of Run's: the caller may be the vCPU whose Execute the transport ends.
		m.closing.Go(func() { _ = c.Close() })
	}
	m.mu.Unlock()
	m.serial.Close()
}

// Close frees the machine; it must not be running. The Devices are closed with it.
func (m *Machine) Close() error {
	m.mu.Lock()
	if m.started && !m.ended {
		m.mu.Unlock()
		return errors.New("monitor: close of a running machine")
	}
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	m.mu.Unlock()
	var errs []error
	if m.fence != nil {
		errs = append(errs, m.fence.Close())
	}
	if m.bus != nil {
		errs = append(errs, m.bus.Close())
	}
	for _, c := range m.vcpus {
		errs = append(errs, c.Close())
	}
	if m.vm != nil {
		errs = append(errs, m.vm.Close())
	}
	if m.mem != nil {
		errs = append(errs, m.mem.close())
	}
	return errors.Join(append(errs, unmapAll(m.ecam, m.tpmRAM))...)
}

// PowerButton presses the power button; what the guest does about it is its own affair.
func (m *Machine) PowerButton() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started || m.ended {
		return errors.New("monitor: power button: the machine is not running")
	}
	return errors.Join(m.vm.SetLine(gsiEvent, true), m.vm.SetLine(gsiEvent, false))
}

// SetEventLog writes the TCG event log into the area that the TPM2 table names. The guest
// reads it after its first TPM reply: call it before.
func (m *Machine) SetEventLog(log []byte) error {
	if m.cfg.TPM == nil {
		return errors.New("monitor: event log: the machine has no TPM")
	}
	if len(log) > eventLogSize {
		return fmt.Errorf("monitor: event log of %d bytes, the area holds %d", len(log), eventLogSize)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return errors.New("monitor: event log: the machine is closed")
	}
	area := m.mem.low[eventLogAddr : eventLogAddr+eventLogSize]
	clear(area[copy(area, log):])
	return nil
}

func (m *Machine) event(e Event) {
	if m.events[e].CompareAndSwap(false, true) && m.cfg.OnEvent != nil {
		m.cfg.OnEvent(e)
	}
}

func (m *Machine) tpmAccessed() {
	m.event(EventTPMAccess)
	if m.cfg.OnTPMAccess != nil {
		m.cfg.OnTPMAccess()
	}
}

// consoleWriter marks the first byte.
type consoleWriter struct{ m *Machine }

func (w consoleWriter) Write(p []byte) (int, error) {
	w.m.event(EventFirstConsole)
	return w.m.cfg.ConsoleOut.Write(p)
}
