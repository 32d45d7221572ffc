package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"sync"
)

// Why something is not read. [ErrChecksum] is also [ErrCorrupt].
var (
	ErrNotExt      = errors.New("not an ext2, ext3 or ext4 file system")
	ErrUnsupported = errors.New("not supported")
	ErrCorrupt     = errors.New("damaged")
	ErrChecksum    = fmt.Errorf("%w: its checksum is wrong", ErrCorrupt)
	// ErrEffort says that something would take more time or memory than a file system of this size may.
	ErrEffort = errors.New("takes more than a file system of this size may")
)

// at says what is wrong where, in bytes from the beginning of the device.
func at(offset int64, kind error, format string, args ...any) error {
	return fmt.Errorf("%s (byte %d): %w", fmt.Sprintf(format, args...), offset, kind)
}

// Options bound what reading may take. The zero value is right for most.
type Options struct {
	// MaxMemory bounds in bytes, about, what a replayed journal, a [FS.Walk] and a [FS.Check] keep, each; 0 is 1 GiB, which is
	// enough for some ten million names. What would take more fails with [ErrEffort].
	MaxMemory int64
	// Cache bounds in bytes the metadata blocks that are kept; 0 is 8 MiB.
	Cache int64
}

// An FS is an open file system.
type FS struct {
	r        io.ReaderAt
	size     int64 // of the device
	sb       *super
	replayed map[uint64]replayed // blocks whose contents are in the journal
	cache    cache
	memory   int64
}

// Open opens the file system on a device of size bytes, and replays its journal in memory if it needs that.
// The device must not change while the file system is used.
func Open(r io.ReaderAt, size int64, o Options) (*FS, error) {
	if o.MaxMemory <= 0 {
		o.MaxMemory = 1 << 30
	}
	if o.Cache <= 0 {
		o.Cache = 8 << 20
	}
	f := &FS{r: r, size: size, memory: min(o.MaxMemory, 4<<30-1)}
	if size < superOffset+superSize {
		return nil, at(superOffset, ErrNotExt, "device of %d bytes", size)
	}
	b := make([]byte, superSize)
	if err := f.readDevice(b, superOffset); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	var err error
	if f.sb, err = parseSuper(b, size); err != nil {
		return nil, err
	}
	f.cache.limit = max(16, int(o.Cache/f.sb.blockSize/2))
	if f.sb.incompat&incompatRecover == 0 {
		return f, nil
	}
	if err := f.replay(); err != nil {
		return nil, err
	}
	return f, nil
}

// Info is what a file system says of itself.
type Info struct {
	UUID      [16]byte
	Label     string
	BlockSize int64
	Blocks    uint64
	Inodes    uint32
	Features  []string // by the names of mke2fs(8), compatible ones first
	Replayed  int      // blocks taken from the journal
}

// Info returns what the superblock says, after the journal's replay.
func (f *FS) Info() Info {
	s := f.sb
	return Info{
		UUID: s.uuid, Label: s.label, BlockSize: s.blockSize, Blocks: s.blocks, Inodes: s.inodes, Replayed: len(f.replayed),
		Features: slices.Concat(featureNames(s.compat, compatNames, "compat"), featureNames(s.incompat, incompatNames, "incompat"),
			featureNames(s.ro, roNames, "ro_compat")),
	}
}

// Replayed yields the places whose contents were taken from the journal, in ascending order: whoever knows what
// changed on the device between two openings must count these of both among it, for a block can change by its
// transaction's commit alone.
func (f *FS) Replayed() iter.Seq[Range] {
	return func(yield func(Range) bool) {
		for _, b := range slices.Sorted(maps.Keys(f.replayed)) {
			if !yield(Range{f.sb.offset(b), f.sb.blockSize}) {
				return
			}
		}
	}
}

// A Range is a range of bytes of the device.
type Range struct{ Offset, Length int64 }

// readDevice reads what is on the device, whole.
func (f *FS) readDevice(p []byte, off int64) error {
	if off < 0 || off > f.size || int64(len(p)) > f.size-off {
		return at(off, ErrCorrupt, "%d bytes outside the device of %d", len(p), f.size)
	}
	if n, err := f.r.ReadAt(p, off); n < len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("read %d of %d bytes at byte %d: %w", n, len(p), off, err)
	}
	return nil
}

// read reads what is on the device once the journal was replayed, whole.
func (f *FS) read(p []byte, off int64) error {
	if off < 0 || off > f.size || int64(len(p)) > f.size-off {
		return at(off, ErrCorrupt, "%d bytes outside the device of %d", len(p), f.size)
	}
	if len(f.replayed) == 0 {
		return f.readDevice(p, off)
	}
	bs := f.sb.blockSize
	for len(p) > 0 {
		// As many blocks as are where they belong are read at once.
		n := int64(0)
		for n < int64(len(p)) {
			if _, ok := f.replayed[uint64((off+n)/bs)]; ok {
				break
			}
			n += bs - (off+n)%bs
		}
		n = min(n, int64(len(p)))
		if n > 0 {
			if err := f.readDevice(p[:n], off); err != nil {
				return err
			}
		} else {
			n = min(bs-off%bs, int64(len(p)))
			if err := f.readReplayed(p[:n], off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readReplayed reads from one block that the journal holds.
func (f *FS) readReplayed(p []byte, off int64) error {
	r, within := f.replayed[uint64(off/f.sb.blockSize)], off%f.sb.blockSize
	if err := f.readDevice(p, f.sb.offset(r.place)+within); err != nil {
		return err
	}
	if r.escaped && within < 4 {
		var magic [4]byte
		binary.BigEndian.PutUint32(magic[:], journalMagic)
		copy(p, magic[within:])
	}
	return nil
}

// block returns a block of metadata; nobody changes it.
func (f *FS) block(n uint64) ([]byte, error) {
	if n >= f.sb.blocks {
		return nil, at(f.sb.offset(min(n, f.sb.blocks)), ErrCorrupt, "block %d of %d", n, f.sb.blocks)
	}
	if b, ok := f.cache.get(n); ok {
		return b, nil
	}
	b := make([]byte, f.sb.blockSize)
	if err := f.read(b, f.sb.offset(n)); err != nil {
		return nil, err
	}
	f.cache.put(n, b)
	return b, nil
}

// A cache keeps blocks in two generations: the older one is dropped when the younger is full, what is used of it
// moves on. That is nearly as good as keeping the order of use, and bounded as well.
type cache struct {
	mu         sync.Mutex
	limit      int // blocks of a generation
	young, old map[uint64][]byte
}

func (c *cache) get(n uint64) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b, ok := c.young[n]; ok {
		return b, true
	}
	b, ok := c.old[n]
	if ok {
		c.add(n, b)
	}
	return b, ok
}

func (c *cache) put(n uint64, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(n, b)
}

// add needs mu.
func (c *cache) add(n uint64, b []byte) {
	if c.young == nil || len(c.young) >= c.limit {
		c.young, c.old = make(map[uint64][]byte), c.young
	}
	c.young[n] = b
}

// drop forgets all: what was read before the journal was replayed.
func (c *cache) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.young, c.old = nil, nil
}
