package virtio

import "os"

// A Delegate is a back end whose queues the kernel runs (vhost), in order.
type Delegate interface {
	Backend
	// RunQueue hands a queue over, from the used index that its ring shows. What it is given stays
	// valid until stop has returned; then nothing touches the queue's memory any more.
	RunQueue(q DelegatedQueue) (stop func() error, err error)
}

// A DelegatedQueue is a queue as the transport knows it. The files are the transport's.
type DelegatedQueue struct {
	Index      int
	Size, Base uint16 // Base is the next available and the next used entry
	Areas      [3][]byte
	Memory     []MappedMemory // all of the guest's
	Kick, Call *os.File
}

// MappedMemory is a range of guest memory in this process.
type MappedMemory struct {
	Guest uint64
	Data  []byte
}
