package virtio

import (
	"sync/atomic"
	"unsafe"
)

// The guest's processors and this process share the rings. Index words are read and written
// with the width and the order that the other side relies on; a []byte cannot express either.
// Ordering: on amd64 loads are not reordered with loads nor stores with stores, and a
// sequentially consistent atomic store is a full barrier.

// loadHeader loads the flags (low half) and the index (high half) at the start of a ring.
func loadHeader(b []byte) uint32 {
	b = b[:4]
	p := unsafe.Pointer(&b[0])
	if uintptr(p)%4 != 0 { // the available ring may stand on an odd word (virtio 1.2 §2.7)
		return uint32(load16(b)) | uint32(load16(b[2:]))<<16
	}
	return atomic.LoadUint32((*uint32)(p))
}

// storeHeader stores both halves at once, after everything before it, and before everything
// after it. The used ring is aligned to 4 bytes; that was checked.
func storeHeader(b []byte, v uint32) {
	b = b[:4]
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[0])), v)
}

// load16 loads a word that the guest may be writing.
//
//go:norace
//go:noinline
func load16(b []byte) uint16 {
	b = b[:2]
	return *(*uint16)(unsafe.Pointer(&b[0]))
}

// store16 stores a word that the guest may be reading.
//
//go:norace
//go:noinline
func store16(b []byte, v uint16) {
	b = b[:2]
	*(*uint16)(unsafe.Pointer(&b[0])) = v
}
