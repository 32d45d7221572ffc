package virtio

import (
	"errors"
	"fmt"
	"os"

	"redoubt.dev/redoubt/pci"
)

// A Remote is a device type whose queues another process serves (vhost-user): this process has
// the registers only. Doorbells and interrupts are eventfds between that process and KVM.
type Remote interface {
	Info() Info
	// ReadConfig is as a Backend's.
	ReadConfig(offset uint64, p []byte)
	// Start hands over the queues that the driver has enabled, and the features it took.
	Start(features uint64, queues []RemoteQueue) error
	// Stop takes the queues back: when it returns nothing touches their memory any more. It may
	// be called without Start.
	Stop()
	// Close ends the device for good; it is stopped.
	Close() error
}

// A RemoteQueue is one queue as the driver has set it up. Areas are guest-physical addresses of
// the descriptor, driver and device area. The files are the transport's.
type RemoteQueue struct {
	Index      int
	Size       uint16
	Areas      [3]uint64
	Kick, Call *os.File
}

// NewRemote makes the device and the PCI function around it; see New.
func NewRemote(r Remote) (*Device, *pci.Function, error) {
	d, f, err := New(remote{r})
	if err == nil {
		d.remote = r
	}
	return d, f, err
}

// remote is a Remote as the rest of the transport sees it.
type remote struct{ Remote }

func (remote) Start(uint64)             {} // begin does that
func (remote) Handle(int, *Chain) error { return errors.New("not this process's queue") }

// begin hands the queues over once the driver is ready. It runs on the controller's goroutine: a
// vCPU does not wait for another process.
func (d *Device) begin() {
	d.stop.Lock() // no reset meanwhile
	defer d.stop.Unlock()
	d.mu.Lock()
	start := d.starting && !d.reset
	d.starting = false
	var queues []RemoteQueue
	for i, q := range d.queues {
		if q.enable {
			queues = append(queues, RemoteQueue{i, q.size, q.area, d.bells[i], d.function.VectorFile(int(q.vector))})
		}
	}
	features := d.accepted
	d.mu.Unlock()
	if !start {
		return
	}
	err := d.checkRemote(queues)
	if err == nil {
		err = d.remote.Start(features, queues)
	}
	if err != nil {
		d.fail(err)
	}
}

// checkRemote refuses what the rings of this process would refuse.
func (d *Device) checkRemote(queues []RemoteQueue) error {
	if !d.function.BusMaster() {
		return fmt.Errorf("%w: started without bus mastering", ErrRing)
	}
	for _, q := range queues {
		if q.Call == nil {
			return fmt.Errorf("%w: queue %d has no interrupt", ErrRing, q.Index)
		}
		if _, err := NewRing(d.mem, q.Size, q.Areas, 0); err != nil {
			return fmt.Errorf("queue %d: %w", q.Index, err)
		}
	}
	return nil
}
