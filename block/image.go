// Package block is what a guest's disk is made of.
package block

// An Image is a disk. The monitor's block device drives one; today a raw file behind it,
// later a storage service.
//
// All methods may be called by several goroutines. Offsets and lengths are in bytes and are
// checked by the caller against Size; an Image checks again and fails with an error, never
// with a partial transfer.
type Image interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// Flush makes every completed write survive a power loss.
	Flush() error
	// Discard tells that a range is no longer used; it reads as zeros afterwards.
	Discard(off, n int64) error
	Size() int64
	ReadOnly() bool
	Close() error
}

// A Vectored image moves several buffers, that together are one range of the disk, in one call.
type Vectored interface {
	Image
	ReadVector(p [][]byte, off int64) error
	WriteVector(p [][]byte, off int64) error
	// ReadCached is ReadVector where no device has to be waited for. If it returns false nothing is
	// said about the range, and p holds anything.
	ReadCached(p [][]byte, off int64) bool
}
