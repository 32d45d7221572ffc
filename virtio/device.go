// Package virtio is the modern virtio transport over PCI (virtio 1.2 §4.1) and the devices of
// the native monitor: block, entropy and a host–guest byte channel.
//
// A [Device] is the transport of one function: registers, split virtqueues, doorbells and
// interrupts. A [Backend] is what the function does. Each queue has a goroutine that sleeps in
// its doorbell's eventfd, takes chains and hands them to the back end; nothing runs on a vCPU's
// thread but register reads and writes, which return at once.
//
// The driver is hostile. A broken rule of a queue sets DEVICE_NEEDS_RESET (§2.1.2) and stops the
// device until the driver resets it: it never crashes, never spins, and never touches memory
// outside the guest's RAM. A queue holds at most its size in requests, a chain at most 64 MiB.
//
// Deviation: no VIRTIO_PCI_CAP_PCI_CFG capability (§4.1.4.9). It is for firmware that cannot map
// a BAR; the native monitor boots kernels directly.
package virtio

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/pci"
)

// Feature bits of the transport (virtio 1.2 §6).
const (
	FeatureIndirect uint64 = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx uint64 = 1 << 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1 uint64 = 1 << 32 // VIRTIO_F_VERSION_1

	transportFeatures = FeatureIndirect | FeatureEventIdx | FeatureVersion1
)

// Info is what is fixed about a back end.
type Info struct {
	Name     string   // for errors: "virtio-blk"
	ID       uint16   // device type (virtio 1.2 §5)
	Class    uint32   // PCI class
	Features uint64   // beyond the transport's
	Queues   []uint16 // the largest size of each, a power of two ≤ MaxQueueSize
	// InOrder promises that chains are given back in the order in which they were made available.
	// Then the used index alone says which are done. Such a back end is a QueueServer.
	InOrder bool
}

// A Backend is a device type.
//
// The transport calls Start, then Handle from one goroutine a queue, then Stop; then perhaps
// Start again (the driver reset the device), at last Close. A Handle that runs or begins while
// Stop runs, or shortly after, gives its chain back at once.
type Backend interface {
	Info() Info
	// ReadConfig fills p from the device configuration at offset; p is zeroed. It may be called
	// at any time.
	ReadConfig(offset uint64, p []byte)
	// Start tells that the driver is ready and which features it took.
	Start(features uint64)
	// Handle takes over a chain: it or somebody later calls Done. It may block until Stop. An
	// error means that the driver broke the device's rules: the chain was not taken over and
	// the device needs a reset.
	Handle(queue int, c *Chain) error
	// Stop makes blocked Handles return and has every chain taken over given back soon; the
	// transport waits for that. It may be called again without Start.
	Stop()
	// Close ends the back end for good; it is stopped.
	Close() error
}

// Device status (virtio 1.2 §2.1).
const (
	statusDriverOK   = 4
	statusFeaturesOK = 8
	statusNeedsReset = 64
)

// A Device is the virtio function of one back end; it implements pci.Device. See the package's
// description for its guarantees.
type Device struct {
	backend  Backend
	remote   Remote // nil unless another process serves the queues
	info     Info
	features uint64 // offered
	mem      pci.Memory
	function *pci.Function
	bells    []*os.File // an eventfd a queue
	wg       sync.WaitGroup
	restart  chan struct{} // 1 buffered: the controller has something to do
	stopped  chan struct{} // closed by Close

	stop     sync.Mutex     // over one quiesce; above mu
	inflight sync.WaitGroup // chains taken and not given back

	mu       sync.Mutex // registers; above queue.mu
	status   uint8
	reset    bool // asked for and not done: status does not read 0 yet
	started  bool // Backend.Start was called, Stop not yet
	starting bool // a remote's queues are to be handed over
	isr      uint8
	devSel   uint32
	drvSel   uint32
	accepted uint64 // driver's features
	cfgVec   uint16
	sel      uint16
	queues   []*queue
	err      error
}

// noVector is VIRTIO_MSI_NO_VECTOR.
const noVector = 0xffff

// queue is one virtqueue's registers, and its ring while the device runs.
type queue struct {
	max    uint16
	size   uint16
	vector uint16
	enable bool
	area   [3]uint64 // descriptors, driver, device

	mu   sync.Mutex // the ring
	ring *Ring      // nil unless the device runs
}

// New makes the device and the PCI function around it, to be put on a bus. The device takes over
// the back end, but not when New fails.
func New(backend Backend) (*Device, *pci.Function, error) {
	info := backend.Info()
	d := &Device{
		backend: backend, info: info, features: info.Features | transportFeatures,
		restart: make(chan struct{}, 1), stopped: make(chan struct{}), cfgVec: noVector,
	}
	spec := pci.Spec{
		Name: info.Name, Vendor: 0x1af4, Device: 0x1040 + info.ID, SubVendor: 0x1af4, SubID: info.ID,
		Class: info.Class, Revision: 1, BARSize: barSize, Vectors: len(info.Queues) + 1,
		Capabilities: capabilities(), Implementation: d,
	}
	for i, max := range info.Queues {
		if max == 0 || max&(max-1) != 0 || max > MaxQueueSize {
			return nil, nil, errors.Join(fmt.Errorf("%s: queue %d of size %d", info.Name, i, max), d.closeBells())
		}
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return nil, nil, errors.Join(fmt.Errorf("%s: eventfd: %w", info.Name, err), d.closeBells())
		}
		bell := os.NewFile(uintptr(fd), info.Name)
		d.bells = append(d.bells, bell)
		d.queues = append(d.queues, &queue{max: max, size: max, vector: noVector})
		spec.Doorbells = append(spec.Doorbells, pci.Doorbell{Offset: notifyOffset + uint64(i)*notifyStride, Size: 2, File: bell})
	}
	f, err := pci.NewFunction(spec)
	if err != nil {
		return nil, nil, errors.Join(err, d.closeBells())
	}
	return d, f, nil
}

func (d *Device) closeBells() error {
	var errs []error
	for _, b := range d.bells {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

// Attach implements pci.Device: the goroutines begin.
func (d *Device) Attach(mem pci.Memory, f *pci.Function) error {
	d.mem, d.function = mem, f
	for i := range d.queues {
		if d.remote != nil {
			break // the doorbells are another process's to read
		}
		d.wg.Add(1)
		go d.serve(i)
	}
	d.wg.Add(1)
	go d.control()
	return nil
}

// Close implements pci.Device.
func (d *Device) Close() error {
	d.mu.Lock()
	d.reset = true
	d.mu.Unlock()
	d.quiesce()
	close(d.stopped)
	err := d.closeBells()
	d.wg.Wait()
	return errors.Join(err, d.backend.Close())
}

// Err is why the device needs a reset; nil while it does not.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// ConfigChanged tells the driver to read the device configuration again.
func (d *Device) ConfigChanged() {
	d.mu.Lock()
	v := d.configInterrupt()
	d.mu.Unlock()
	d.signal(v)
}

// configInterrupt is the vector to signal after d.mu is given up.
func (d *Device) configInterrupt() uint16 {
	if d.status&statusDriverOK == 0 {
		return noVector
	}
	d.isr |= isrConfig
	return d.cfgVec
}

func (d *Device) signal(vector uint16) {
	if vector == noVector {
		return
	}
	if err := d.function.Signal(int(vector)); err != nil && !errors.Is(err, os.ErrClosed) {
		d.fail(err)
	}
}

// fail stops the device until the driver resets it (virtio 1.2 §2.1.2).
func (d *Device) fail(err error) {
	d.mu.Lock()
	vector := uint16(noVector)
	if d.err == nil {
		d.err = fmt.Errorf("%s: %w", d.info.Name, err)
		d.status |= statusNeedsReset
		vector = d.configInterrupt()
	}
	d.mu.Unlock()
	if b, ok := d.backend.(QueueServer); ok { // which may be waiting with a chain
		for i := range d.queues {
			b.StopQueue(i)
		}
	}
	if vector != noVector {
		_ = d.function.Signal(int(vector)) // a second failure changes nothing
	}
}

// serve owns one queue: it sleeps in the doorbell.
func (d *Device) serve(i int) {
	defer d.wg.Done()
	var count [8]byte
	for {
		if _, err := d.bells[i].Read(count[:]); err != nil {
			return // closed
		}
		d.run(i)
	}
}

// run takes chains until there are none, the device stops, or a rule is broken. A driver that
// never stops adding keeps only its own queue's goroutine busy.
func (d *Device) run(i int) {
	if !d.function.BusMaster() {
		return
	}
	if b, ok := d.backend.(QueueServer); ok {
		if err := d.serveQueue(i, b); err != nil {
			d.fail(err)
		}
		return
	}
	for {
		c, err := d.take(i)
		if err == nil && c != nil {
			if err = d.backend.Handle(i, c); err != nil {
				d.inflight.Done()
			}
		}
		if err != nil {
			d.fail(err)
			return
		}
		if c == nil {
			return
		}
	}
}

// take gives the queue's next chain, nil when there is none or the device does not run.
func (d *Device) take(i int) (*Chain, error) {
	if !d.runs() {
		return nil, nil
	}
	q := d.queues[i]
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.ring
	if r == nil {
		return nil, nil
	}
	c, err := r.Next()
	if c == nil || err != nil {
		return nil, err
	}
	d.inflight.Add(1) // under q.mu: before quiesce takes the ring away and waits
	c.OnDone(func(c *Chain, written uint32) {
		q.mu.Lock()
		interrupt := r.Put(c, written)
		q.mu.Unlock()
		if interrupt {
			d.queueInterrupt(q)
		}
		d.inflight.Done()
	})
	return c, nil
}

// serveQueue lets the back end take the queue's chains by itself.
func (d *Device) serveQueue(i int, b QueueServer) error {
	if !d.runs() {
		return nil
	}
	q := d.queues[i]
	q.mu.Lock()
	r := q.ring
	if r == nil {
		q.mu.Unlock()
		return nil
	}
	d.inflight.Add(1) // as in take
	q.mu.Unlock()
	defer d.inflight.Done()
	return b.ServeQueue(i, NewQueue(r, func() { d.queueInterrupt(q) }))
}

func (d *Device) runs() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.started && !d.reset && d.err == nil
}

func (d *Device) queueInterrupt(q *queue) {
	d.mu.Lock()
	vector := q.vector
	d.isr |= isrQueue
	d.mu.Unlock()
	d.signal(vector)
}

// driverOK builds the rings and starts the back end. d.mu is held.
func (d *Device) driverOK() error {
	if d.remote != nil {
		d.started, d.starting = true, true
		d.wake()
		return nil
	}
	for i, q := range d.queues {
		if !q.enable {
			continue
		}
		r, err := NewRing(d.mem, q.size, q.area, d.accepted)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		q.mu.Lock()
		q.ring = r
		q.mu.Unlock()
	}
	d.backend.Start(d.accepted)
	if b, ok := d.backend.(QueueServer); ok {
		for i := range d.queues {
			b.StartQueue(i)
		}
	}
	d.started = true
	return nil
}

// control owns resets: they wait for requests in flight, which a vCPU must not.
func (d *Device) control() {
	defer d.wg.Done()
	for {
		select {
		case <-d.restart:
			d.begin()
			d.quiesce()
			d.mu.Lock()
			if d.reset {
				d.clear()
			}
			d.mu.Unlock()
		case <-d.stopped:
			return
		}
	}
}

// quiesce stops the back end and lets the rings go: afterwards nothing of this device touches
// guest memory.
func (d *Device) quiesce() {
	d.stop.Lock()
	defer d.stop.Unlock()
	d.mu.Lock()
	started := d.started && d.reset
	d.mu.Unlock()
	if !started {
		return
	}
	for _, q := range d.queues {
		q.mu.Lock()
		q.ring = nil
		q.mu.Unlock()
	}
	if b, ok := d.backend.(QueueServer); ok {
		for i := range d.queues {
			b.StopQueue(i)
		}
	}
	d.backend.Stop()
	d.inflight.Wait()
	d.mu.Lock()
	d.started = false
	d.mu.Unlock()
}

// clear is the state after a reset. d.mu is held.
func (d *Device) clear() {
	d.status, d.reset, d.isr, d.err = 0, false, 0, nil
	d.devSel, d.drvSel, d.accepted, d.cfgVec, d.sel = 0, 0, 0, noVector, 0
	for _, q := range d.queues {
		q.size, q.vector, q.enable, q.area = q.max, noVector, false, [3]uint64{}
	}
}
