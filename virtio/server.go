package virtio

// A QueueServer is a back end that takes its queues' chains by itself: several for one packet, or one
// and another before it interrupts the driver. The transport calls ServeQueue from one goroutine a
// queue, in place of Backend.Handle, when there may be chains.
type QueueServer interface {
	// StartQueue comes before the queue's first ServeQueue.
	StartQueue(queue int)
	// ServeQueue does what there is to do. It returns when Take gives no chain, with all chains given
	// back. An error means that the driver broke the device's rules, or that the device cannot go on:
	// it needs a reset.
	ServeQueue(queue int, q *Queue) error
	// StopQueue makes ServeQueue return soon, with what it has begun done or given back; other queues go on.
	StopQueue(queue int)
}

// A Queue is a running virtqueue in the hands of a QueueServer. It is not safe for concurrent use.
type Queue struct {
	ring   *Ring
	signal func()
}

// NewQueue is a transport's: signal interrupts the driver. The ring has no journal, and nobody else uses
// it until ServeQueue has returned.
func NewQueue(r *Ring, signal func()) *Queue { return &Queue{r, signal} }

// Size is the number of the ring's entries: no more chains can be taken at a time.
func (q *Queue) Size() int { return int(q.ring.size) }

// Take gives the next chain, nil when there is none: then the driver was asked to notify of one to come.
func (q *Queue) Take() (*Chain, error) { return q.ring.Next() }

// Put gives back the chains that were taken first, with one store of the used index: whatever happens to this
// process, the driver sees all of them or none.
func (q *Queue) Put(used ...Used) { q.ring.PutTogether(used) }

// Return gives back the chains that were taken last, in the order in which they were taken, as if they
// had not been.
func (q *Queue) Return(chains ...*Chain) {
	for i := len(chains) - 1; i >= 0; i-- {
		q.ring.Untake(chains[i])
	}
}

// Interrupt interrupts the driver if it wants that for what was put since the last call. It must not be
// left out before waiting for something.
func (q *Queue) Interrupt() {
	if q.ring.Interrupt() {
		q.signal()
	}
}

// A Used is a chain to be given back, with the number of bytes that were written at the start of its
// Writable.
type Used struct {
	Chain   *Chain
	Written uint32
}
