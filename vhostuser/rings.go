package vhostuser

import (
	"sync/atomic"
	"time"
)

// Rings tells of a device that [Serve] serves; see [NewRings].
type Rings struct {
	of   atomic.Pointer[session]
	done chan struct{} // has room for one: a request was answered since somebody looked
}

// NewRings is for one device, which may be served by several connections in turn.
func NewRings() *Rings { return &Rings{done: make(chan struct{}, 1)} }

// InFlight is how many requests the driver has made that are not answered: what is in the available rings and not in the
// used ones; 0 where no queue runs. It may be asked by any goroutine; what it counts is the guest's word, and changes while the guest runs.
func (r *Rings) InFlight() (n int) {
	s := r.of.Load()
	if s == nil {
		return 0
	}
	for _, q := range s.queues {
		q.mu.Lock()
		if q.ring != nil {
			n += q.ring.InFlight()
		}
		q.mu.Unlock()
	}
	return n
}

// Drain waits until no request is in flight, at most until the deadline, and returns how many are. One goroutine may wait at a time.
func (r *Rings) Drain(deadline time.Time) int {
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	for {
		n := r.InFlight()
		if n == 0 {
			return 0
		}
		select {
		case <-r.done:
		case <-t.C:
			return r.InFlight()
		}
	}
}

// answered tells whoever waits.
func (r *Rings) answered() {
	if r == nil {
		return
	}
	select {
	case r.done <- struct{}{}:
	default: // it is about to look
	}
}
