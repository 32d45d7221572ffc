package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"redoubt.dev/redoubt/block"
)

// Block device: virtio 1.2 §5.2.

// Features (§5.2.3).
const (
	blkSegMax      uint64 = 1 << 2
	blkReadOnly    uint64 = 1 << 5
	blkSize        uint64 = 1 << 6
	blkFlush       uint64 = 1 << 9
	blkDiscard     uint64 = 1 << 13
	blkWriteZeroes uint64 = 1 << 14
)

// Request types (§5.2.6).
const (
	blkIn       = 0
	blkOut      = 1
	blkDoFlush  = 4
	blkGetID    = 8
	blkDiscards = 11
	blkZeroes   = 13
)

// Status bytes (§5.2.6).
const (
	blkOK          = 0
	blkIOError     = 1
	blkUnsupported = 2
)

// BlockQueueSize is the length of a block device's queue.
const BlockQueueSize = 256

const (
	sector        = 512
	blkQueueSize  = BlockQueueSize
	blkHeader     = 16
	blkIDLength   = 20
	blkWorkers    = 4       // requests in flight at the image
	blkMaxRange   = 1 << 16 // sectors of one discard or write-zeroes segment: 32 MiB
	blkMaxRanges  = 16      // segments of one request
	blkRangeSize  = 16
	blkConfigSize = 60
)

// A Block is the back end of a virtio block device over an image.
//
// Requests are carried out by a fixed number of workers, in any order, as the specification
// allows. What needs no worker has none, because handing over costs more than the request: a read of
// what is in memory, and a write where nothing else is under way. A flush covers every request answered before it was made. A driver that does not take
// the flush feature gets write-through: each write is flushed before its answer (§5.2.6.2).
type Block struct {
	image  block.Vectored
	serial string
	jobs   chan *blkRequest
	busy   atomic.Int32 // requests that the workers have
	wg     sync.WaitGroup

	mu      sync.Mutex
	through bool

	gate    sync.RWMutex // read: a request is carried out; written: none is
	dropped bool
}

// NewBlock takes over image; serial (at most 20 bytes) is the disk's identity in the guest. It
// owns a few goroutines, ended by Close.
func NewBlock(image block.Image, serial string) (*Block, error) {
	if len(serial) > blkIDLength {
		return nil, fmt.Errorf("virtio-blk: serial %q is longer than %d bytes", serial, blkIDLength)
	}
	if image.Size()%sector != 0 || image.Size() == 0 {
		return nil, fmt.Errorf("virtio-blk: image of %d bytes: must be whole sectors of %d", image.Size(), sector)
	}
	b := &Block{image: block.AsVectored(image), serial: serial, jobs: make(chan *blkRequest)}
	for range blkWorkers {
		b.wg.Add(1)
		go b.work()
	}
	return b, nil
}

// Info implements Backend.
func (b *Block) Info() Info {
	f := blkSegMax | blkSize | blkFlush | blkDiscard | blkWriteZeroes
	if b.image.ReadOnly() {
		f = blkSegMax | blkSize | blkReadOnly | blkFlush
	}
	return Info{Name: "virtio-blk", ID: 2, Class: 0x018000, Features: f, Queues: []uint16{blkQueueSize}}
}

// ReadConfig implements Backend (§5.2.4).
func (b *Block) ReadConfig(offset uint64, p []byte) {
	if offset >= blkConfigSize {
		return
	}
	var c [blkConfigSize]byte
	le := binary.LittleEndian
	le.PutUint64(c[0:], uint64(b.image.Size())/sector)
	le.PutUint32(c[12:], blkQueueSize-2) // seg_max: header and status take one each
	le.PutUint32(c[20:], sector)
	le.PutUint16(c[34:], 1)
	le.PutUint32(c[36:], blkMaxRange)
	le.PutUint32(c[40:], blkMaxRanges)
	le.PutUint32(c[44:], 1)
	le.PutUint32(c[48:], blkMaxRange)
	le.PutUint32(c[52:], blkMaxRanges)
	c[56] = 1
	copy(p, c[offset:])
}

// Start implements Backend.
func (b *Block) Start(features uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.through = features&blkFlush == 0
}

// Stop implements Backend: requests end by themselves.
func (b *Block) Stop() {}

// Close implements Backend.
func (b *Block) Close() error {
	close(b.jobs)
	b.wg.Wait()
	return b.image.Close()
}

// Drop has every request answered with an I/O error from now on, or ends that. When it returns none is under way that was
// made before.
func (b *Block) Drop(dropped bool) {
	b.gate.Lock()
	defer b.gate.Unlock()
	b.dropped = dropped
}

// Handle implements Backend. It waits for a free worker: the ring holds the rest.
func (b *Block) Handle(_ int, c *Chain) error {
	r, err := parseBlock(c)
	if err != nil {
		return err
	}
	if b.cached(r) || r.kind == blkOut && b.busy.Load() == 0 {
		b.finish(r)
		return nil
	}
	b.busy.Add(1)
	b.jobs <- r
	return nil
}

// cached carries out a read that need not wait.
func (b *Block) cached(r *blkRequest) bool {
	if r.kind != blkIn {
		return false
	}
	total := Length(r.in)
	off, ok := b.inside(r.sector, total)
	b.gate.RLock()
	defer b.gate.RUnlock()
	r.done = ok && !b.dropped && total%sector == 0 && b.image.ReadCached(r.in, off)
	return r.done
}

func (b *Block) work() {
	defer b.wg.Done()
	for r := range b.jobs {
		b.finish(r)
		b.busy.Add(-1)
	}
}

// finish carries a request out, if that was not done yet, and answers it.
func (b *Block) finish(r *blkRequest) {
	status, n := byte(blkOK), uint32(Length(r.in))
	if !r.done {
		status, n = b.do(r)
	}
	r.status[0] = status
	if status != blkOK {
		n = 0
	}
	r.chain.Done(n + 1)
}

// A blkRequest is a parsed request: its header is copied, its payload is not.
type blkRequest struct {
	chain  *Chain
	kind   uint32
	sector uint64
	out    [][]byte // from the driver, after the header
	in     [][]byte // to the driver, before the status
	status []byte   // the last writable byte
	done   bool     // a read whose data is there
}

// parseBlock takes a request apart. The borders of descriptors mean nothing: the header is the
// first 16 readable bytes, the status the last writable one.
func parseBlock(c *Chain) (*blkRequest, error) {
	var h [blkHeader]byte
	if n := Gather(h[:], c.Readable); n < blkHeader {
		return nil, fmt.Errorf("%w: block request of %d bytes, its header has %d", ErrRing, n, blkHeader)
	}
	room := Length(c.Writable)
	if room == 0 {
		return nil, fmt.Errorf("%w: block request without room for its status", ErrRing)
	}
	r := &blkRequest{chain: c, kind: binary.LittleEndian.Uint32(h[0:]), sector: binary.LittleEndian.Uint64(h[8:])}
	_, r.out = Cut(c.Readable, blkHeader)
	var last [][]byte
	r.in, last = Cut(c.Writable, room-1)
	r.status = last[0][:1]
	return r, nil
}

// do carries a request out and returns its status and the bytes written before the status.
func (b *Block) do(r *blkRequest) (status byte, written uint32) {
	b.gate.RLock()
	defer b.gate.RUnlock()
	if b.dropped {
		return blkIOError, 0
	}
	switch r.kind {
	case blkIn:
		return b.transfer(r.sector, r.in, b.image.ReadVector)
	case blkOut:
		if b.image.ReadOnly() {
			return blkIOError, 0
		}
		status, _ = b.transfer(r.sector, r.out, b.image.WriteVector)
		return b.settle(status), 0
	case blkDoFlush:
		if b.image.Flush() != nil {
			return blkIOError, 0
		}
		return blkOK, 0
	case blkGetID:
		var id [blkIDLength]byte
		copy(id[:], b.serial)
		return blkOK, uint32(Scatter(r.in, id[:]))
	case blkDiscards, blkZeroes:
		return b.settle(b.ranges(r)), 0
	}
	return blkUnsupported, 0
}

// settle flushes after a change where the driver cannot.
func (b *Block) settle(status byte) byte {
	b.mu.Lock()
	through := b.through
	b.mu.Unlock()
	if status == blkOK && through && b.image.Flush() != nil {
		return blkIOError
	}
	return status
}

// inside reports whether n bytes at a sector are on the disk, and gives their offset.
func (b *Block) inside(at, n uint64) (off int64, ok bool) {
	size := uint64(b.image.Size())
	if at > size/sector || n > size-at*sector {
		return 0, false
	}
	return int64(at * sector), true
}

func (b *Block) transfer(at uint64, segments [][]byte, move func([][]byte, int64) error) (status byte, n uint32) {
	total := Length(segments)
	off, ok := b.inside(at, total)
	if !ok || total%sector != 0 || move(segments, off) != nil {
		return blkIOError, 0
	}
	return blkOK, uint32(total)
}

// ranges carries out a discard or write-zeroes request (§5.2.6). All segments are checked
// before the first is touched.
func (b *Block) ranges(r *blkRequest) byte {
	if b.image.ReadOnly() {
		return blkIOError
	}
	total := Length(r.out)
	if total == 0 || total%blkRangeSize != 0 || total > blkMaxRanges*blkRangeSize {
		return blkUnsupported
	}
	data := make([]byte, total)
	Gather(data, r.out)
	type span struct {
		off, n int64
		unmap  bool
	}
	var spans []span
	for ; len(data) > 0; data = data[blkRangeSize:] {
		at, n := binary.LittleEndian.Uint64(data), uint64(binary.LittleEndian.Uint32(data[8:]))
		flags := binary.LittleEndian.Uint32(data[12:])
		// Only write-zeroes has a flag (unmap), bit 0 (§5.2.6.2).
		if flags&^1 != 0 || (r.kind == blkDiscards && flags != 0) {
			return blkUnsupported
		}
		off, ok := b.inside(at, n*sector)
		if !ok || n > blkMaxRange {
			return blkIOError
		}
		spans = append(spans, span{off, int64(n * sector), r.kind == blkDiscards || flags&1 != 0})
	}
	for _, s := range spans {
		var err error
		if s.unmap {
			err = b.image.Discard(s.off, s.n)
		} else {
			err = b.zero(s.off, s.n)
		}
		if err != nil {
			return blkIOError
		}
	}
	return blkOK
}

// zeros is what write-zeroes writes where the driver wants the space kept.
var zeros [256 << 10]byte

func (b *Block) zero(off, n int64) error {
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if _, err := b.image.WriteAt(p, off); err != nil {
			return errors.Join(errors.New("write zeroes"), err)
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}
