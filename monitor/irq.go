package monitor

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
	"redoubt.dev/redoubt/kvm"
	"redoubt.dev/redoubt/pci"
	"redoubt.dev/redoubt/pci/topology"
)

// interrupts owns the machine's interrupt routing table. It implements pci.Interrupts: a line
// is an eventfd, bound to a GSI of its own while it is unmasked.
type interrupts struct {
	vm *kvm.VM

	mu     sync.Mutex
	routes []kvm.Route // the I/O APIC's pins, then a message a line
	used   [topology.Routes]bool
}

func newInterrupts(vm *kvm.VM) (*interrupts, error) {
	t := &interrupts{vm: vm}
	for pin := range uint32(ioapicPins) {
		t.routes = append(t.routes, kvm.Route{GSI: pin, Pin: pin})
	}
	return t, vm.SetRoutes(t.routes)
}

// NewLine implements pci.Interrupts.
func (t *interrupts) NewLine(gsi uint32) (pci.Line, error) {
	if gsi < topology.FirstRoute || gsi-topology.FirstRoute >= topology.Routes {
		return nil, fmt.Errorf("interrupt route %d: want %d to %d", gsi, topology.FirstRoute, topology.FirstRoute+topology.Routes-1)
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.used[gsi-topology.FirstRoute] {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("interrupt route %d is taken", gsi)
	}
	t.used[gsi-topology.FirstRoute] = true
	return &line{table: t, gsi: gsi, file: os.NewFile(uintptr(fd), "irq")}, nil
}

// route sets the message of a GSI, and tells the kernel only where it changed.
func (t *interrupts) route(gsi uint32, msg kvm.Message) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.routes {
		r := &t.routes[i]
		if r.GSI != gsi {
			continue
		}
		if *r.Message == msg {
			return nil
		}
		old := r.Message
		r.Message = &msg
		if err := t.vm.SetRoutes(t.routes); err != nil {
			r.Message = old
			return err
		}
		return nil
	}
	t.routes = append(t.routes, kvm.Route{GSI: gsi, Message: &msg})
	if err := t.vm.SetRoutes(t.routes); err != nil {
		t.routes = t.routes[:len(t.routes)-1]
		return err
	}
	return nil
}

// release drops a GSI's route and lets it be used again.
func (t *interrupts) release(gsi uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.used[gsi-topology.FirstRoute] = false
	for i, r := range t.routes {
		if r.GSI == gsi {
			t.routes = append(t.routes[:i], t.routes[i+1:]...)
			return
		}
	}
}

// line implements pci.Line.
type line struct {
	table *interrupts
	gsi   uint32
	file  *os.File

	mu     sync.Mutex // above interrupts.mu
	open   bool
	closed bool
}

func (l *line) File() *os.File { return l.file }

// errClosed answers a call on a line that was closed.
var errClosed = errors.New("interrupt line is closed")

func (l *line) Unmask(address uint64, data uint32) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errClosed
	}
	if err := l.table.route(l.gsi, kvm.Message{Address: address, Data: data}); err != nil {
		return err
	}
	if l.open {
		return nil
	}
	if err := l.table.vm.AssignIRQFD(l.file, l.gsi); err != nil {
		return err
	}
	l.open = true
	return nil
}

func (l *line) Mask() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mask()
}

func (l *line) mask() error {
	if !l.open {
		return nil
	}
	if err := l.table.vm.DeassignIRQFD(l.file, l.gsi); err != nil {
		return err
	}
	l.open = false
	return nil
}

// Pending asks the eventfd itself: it keeps what arrives while masked.
func (l *line) Pending() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open || l.closed {
		return false
	}
	p := []unix.PollFd{{Fd: int32(l.file.Fd()), Events: unix.POLLIN}}
	n, err := eintr.Value(func() (int, error) { return unix.Poll(p, 0) })
	return err == nil && n == 1
}

func (l *line) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	err := l.mask()
	l.closed = true
	l.table.release(l.gsi)
	return errors.Join(err, l.file.Close())
}

// doorbells implements pci.Doorbells.
type doorbells struct{ vm *kvm.VM }

func (d doorbells) AddDoorbell(gpa uint64, b pci.Doorbell) error {
	return d.vm.AssignIOEventFD(b.File, gpa, b.Size)
}

func (d doorbells) RemoveDoorbell(gpa uint64, b pci.Doorbell) error {
	return d.vm.DeassignIOEventFD(b.File, gpa, b.Size)
}
