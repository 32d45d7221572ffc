package locked

import (
	"sync/atomic"
	"unsafe"
)

// Swap changes memory that other processors write, b of 1, 2, 4 or 8 bytes, by f: now is stored in the place of was if nobody
// has stored another value meanwhile, else f is asked again. It is false where f says that was will not do, or where b crosses
// a word of 8 bytes, which no processor would change at once either.
func Swap(b []byte, f func(was uint64) (now uint64, ok bool)) bool {
	at := uintptr(unsafe.Pointer(&b[0]))
	off := at % 8
	if int(off)+len(b) > 8 {
		return false
	}
	// The word around it: guest memory begins and ends with pages.
	p := (*uint64)(unsafe.Add(unsafe.Pointer(&b[0]), -int(off)))
	mask := ^uint64(0) >> (64 - 8*len(b))
	for {
		word := atomic.LoadUint64(p)
		now, ok := f(word >> (8 * off) & mask)
		if !ok {
			return false
		}
		if atomic.CompareAndSwapUint64(p, word, word&^(mask<<(8*off))|now&mask<<(8*off)) {
			return true
		}
	}
}

// Store stores b, which another processor sees whole or not at all, where it does not cross a word of 8 bytes.
func Store(to, b []byte) {
	v := uint64(0)
	for n := range b {
		v |= uint64(b[n]) << (8 * n)
	}
	at := uintptr(unsafe.Pointer(&to[0]))
	switch {
	case len(b) == 8 && at%8 == 0:
		atomic.StoreUint64((*uint64)(unsafe.Pointer(&to[0])), v)
	case len(b) == 4 && at%4 == 0:
		atomic.StoreUint32((*uint32)(unsafe.Pointer(&to[0])), uint32(v))
	case len(b) > 0 && len(b) < 4 && Swap(to[:len(b)], func(uint64) (uint64, bool) { return v, true }):
	default:
		copy(to, b)
	}
}
