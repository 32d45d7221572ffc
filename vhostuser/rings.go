package vhostuser

import "sync/atomic"

// Rings tells of a device that [Serve] serves. The zero value is one of a device without rings.
type Rings struct{ of atomic.Pointer[session] }

// InFlight is how many requests the driver has made that are not answered: what is in the available rings and not in the
// used ones. It may be asked by any goroutine; what it counts is the guest's word, and changes while the guest runs.
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
