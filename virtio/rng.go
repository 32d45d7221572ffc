package virtio

import (
	"crypto/rand"
	"sync"
	"time"
)

// Entropy device: virtio 1.2 §5.4.

const (
	rngChunk = 4096                  // bytes given for one request, at most
	rngRate  = 1 << 20               // bytes a second, at most
	rngBurst = 50 * time.Millisecond // how far a guest may run ahead of the rate
)

// An RNG is the back end of an entropy device: the host kernel's generator (getrandom), at most
// 1 MiB a second so that a guest's greed costs the host little.
type RNG struct {
	mu   sync.Mutex
	stop chan struct{} // closed by Stop; nil while stopped
	free time.Time     // when what was given so far is paid for
}

// NewRNG makes an entropy device.
func NewRNG() *RNG { return &RNG{} }

// Info implements Backend.
func (r *RNG) Info() Info {
	return Info{Name: "virtio-rng", ID: 4, Class: 0x00ff00, Queues: []uint16{64}}
}

// ReadConfig implements Backend: there is none.
func (r *RNG) ReadConfig(uint64, []byte) {}

// Start implements Backend.
func (r *RNG) Start(uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stop = make(chan struct{})
}

// Stop implements Backend.
func (r *RNG) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stop != nil {
		close(r.stop)
		r.stop = nil
	}
}

// Close implements Backend.
func (r *RNG) Close() error { return nil }

// Handle implements Backend: it fills what there is, then waits until that is paid for.
func (r *RNG) Handle(_ int, c *Chain) error {
	n := min(Length(c.Writable), rngChunk)
	part, _ := Cut(c.Writable, n)
	for _, p := range part {
		if _, err := rand.Read(p); err != nil { // does not fail on Linux ≥ 5.6
			return err
		}
	}
	c.Done(uint32(n))
	r.pay(int(n))
	return nil
}

// pay waits as long as n bytes cost beyond the burst.
func (r *RNG) pay(n int) {
	r.mu.Lock()
	now := time.Now()
	if r.free.Before(now) {
		r.free = now
	}
	r.free = r.free.Add(time.Duration(n) * time.Second / rngRate)
	wait, stop := r.free.Sub(now)-rngBurst, r.stop
	r.mu.Unlock()
	if wait <= 0 || stop == nil {
		return
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-stop:
	}
}
