package virtio

import (
	"errors"
	"testing"

	"redoubt.dev/redoubt/pci"
)

// elsewhere notes what a remote is told.
type elsewhere struct {
	refuse  error
	started chan []RemoteQueue
	stopped chan struct{}
}

func (e *elsewhere) Info() Info {
	return Info{Name: "elsewhere", ID: 2, Queues: []uint16{16, 16}}
}
func (e *elsewhere) ReadConfig(uint64, []byte) {}
func (e *elsewhere) Start(features uint64, queues []RemoteQueue) error {
	if features != plain {
		return errors.New("other features")
	}
	e.started <- queues
	return e.refuse
}
func (e *elsewhere) Stop()        { e.stopped <- struct{}{} }
func (e *elsewhere) Close() error { return nil }

func remoteGuest(t *testing.T, refuse error) (*guest, *elsewhere) {
	e := &elsewhere{refuse: refuse, started: make(chan []RemoteQueue, 1), stopped: make(chan struct{}, 4)}
	return newGuestOf(t, func() (*Device, *pci.Function, error) { return NewRemote(e) }), e
}

// TestRemote: queues, doorbells and interrupts are handed over, and taken back by a reset before
// the driver learns that it is done; then the device starts anew.
func TestRemote(t *testing.T) {
	g, e := remoteGuest(t, nil)
	for round := range 3 {
		qs := g.start(plain, 16)
		got := <-e.started
		if len(got) != 2 {
			t.Fatalf("%d queues", len(got))
		}
		for i, q := range got {
			if q.Index != i || q.Size != 16 || q.Areas != [3]uint64{qs[i].desc, qs[i].avail, qs[i].used} || q.Kick == nil || q.Call == nil {
				t.Errorf("queue %d: %+v", i, q)
			}
		}
		qs[0].kick()
		var b [8]byte
		if _, err := got[0].Kick.Read(b[:]); err != nil || b[0] == 0 { // nobody here takes it
			t.Errorf("round %d: kick %v, %v", round, b, err)
		}
		g.reset()
		<-e.stopped
	}
	if err := g.dev.Err(); err != nil {
		t.Error(err)
	}
}

// TestRemoteRefuses: what the other process does not take needs a reset, and so do queues
// outside memory, which it never sees.
func TestRemoteRefuses(t *testing.T) {
	g, e := remoteGuest(t, errors.New("no"))
	g.start(plain, 16)
	<-e.started
	g.waitNeedsReset()
	g.reset()

	g, e = remoteGuest(t, nil)
	g.negotiate(plain)
	g.write(regConfigVector, 2, 0)
	q := g.queue(0, 16)
	q.desc = ramBase + 4<<20
	g.program(q)
	g.write(regStatus, 1, 15)
	g.waitNeedsReset()
	select {
	case q := <-e.started:
		t.Errorf("handed over: %+v", q)
	default:
	}
}
