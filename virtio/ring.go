package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"redoubt.dev/redoubt/pci"
)

// MaxQueueSize is the largest queue this package offers; the limit of split rings is 32768
// (virtio 1.2 §2.7).
const MaxQueueSize = 1024

// maxChain is the largest payload in bytes of one chain: more is nobody's request.
const maxChain = 64 << 20

// Descriptor flags (virtio 1.2 §2.7.5).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
	descSize     = 16
)

// Ring flags (virtio 1.2 §2.7.6, §2.7.8).
const (
	availNoInterrupt = 1
	usedNoNotify     = 1
)

// ErrRing says that the driver broke the rules of a virtqueue. The device then needs a reset.
var ErrRing = errors.New("virtqueue broken by the driver")

// A ring is one split virtqueue (virtio 1.2 §2.7) seen from the device. It is not safe for
// concurrent use. Everything in the rings and in descriptors is the guest's: each value is
// loaded once and checked before use.
type ring struct {
	mem                 pci.Memory
	size                uint16 // a power of two
	desc, avail, used   []byte
	eventIdx, indirect  bool
	lastAvail, usedNext uint16
	busy                []bool // heads that were taken and not given back
	quiet               bool   // without eventIdx: the driver was asked not to notify
	fence               uint32
}

// newRing checks alignment (virtio 1.2 §2.7) and that the areas are in memory.
func newRing(mem pci.Memory, size uint16, desc, avail, used uint64, eventIdx, indirect bool) (*ring, error) {
	if size == 0 || size&(size-1) != 0 || size > MaxQueueSize {
		return nil, fmt.Errorf("%w: size %d", ErrRing, size)
	}
	if desc%16 != 0 || avail%2 != 0 || used%4 != 0 {
		return nil, fmt.Errorf("%w: areas at %#x, %#x, %#x are not aligned", ErrRing, desc, avail, used)
	}
	r := &ring{mem: mem, size: size, eventIdx: eventIdx, indirect: indirect, busy: make([]bool, size)}
	var err error
	if r.desc, err = mem.Slice(desc, descSize*uint64(size)); err != nil {
		return nil, fmt.Errorf("%w: descriptors: %w", ErrRing, err)
	}
	if r.avail, err = mem.Slice(avail, 6+2*uint64(size)); err != nil {
		return nil, fmt.Errorf("%w: driver area: %w", ErrRing, err)
	}
	if r.used, err = mem.Slice(used, 6+8*uint64(size)); err != nil {
		return nil, fmt.Errorf("%w: device area: %w", ErrRing, err)
	}
	return r, nil
}

// take gives the next chain, nil when there is none.
func (r *ring) take() (*Chain, error) {
	next := uint16(loadHeader(r.avail) >> 16)
	if next == r.lastAvail {
		return nil, nil
	}
	if next-r.lastAvail > r.size {
		return nil, fmt.Errorf("%w: available index %d, %d were taken, the ring has %d", ErrRing, next, r.lastAvail, r.size)
	}
	head := load16(r.avail[4+2*int(r.lastAvail%r.size):])
	if head >= r.size {
		return nil, fmt.Errorf("%w: head %d of %d", ErrRing, head, r.size)
	}
	if r.busy[head] {
		return nil, fmt.Errorf("%w: head %d made available twice", ErrRing, head)
	}
	c := &Chain{head: head}
	if err := r.walk(c, r.desc, head, false); err != nil {
		return nil, err
	}
	r.busy[head] = true
	r.lastAvail++
	return c, nil
}

// walk follows the chain from index at in table. A chain has at most as many descriptors as
// the queue (§2.7.5.3.1), which ends loops.
func (r *ring) walk(c *Chain, table []byte, at uint16, inner bool) error {
	entries := len(table) / descSize
	for n := 0; ; n++ {
		if n >= entries || n >= int(r.size) {
			return fmt.Errorf("%w: chain %d is longer than %d descriptors", ErrRing, c.head, n)
		}
		if int(at) >= entries {
			return fmt.Errorf("%w: chain %d goes to descriptor %d of %d", ErrRing, c.head, at, entries)
		}
		var d [descSize]byte
		copy(d[:], table[int(at)*descSize:])
		addr, length := binary.LittleEndian.Uint64(d[0:]), binary.LittleEndian.Uint32(d[8:])
		flags, next := binary.LittleEndian.Uint16(d[12:]), binary.LittleEndian.Uint16(d[14:])
		if flags&descIndirect != 0 {
			if inner || !r.indirect || flags&(descNext|descWrite) != 0 {
				return fmt.Errorf("%w: chain %d: indirect descriptor %d with flags %#x", ErrRing, c.head, at, flags)
			}
			return r.walkIndirect(c, addr, length)
		}
		if err := r.add(c, addr, length, flags&descWrite != 0); err != nil {
			return err
		}
		if flags&descNext == 0 {
			return nil
		}
		at = next
	}
}

func (r *ring) walkIndirect(c *Chain, addr uint64, length uint32) error {
	if length == 0 || length%descSize != 0 || length/descSize > MaxQueueSize {
		return fmt.Errorf("%w: chain %d: indirect table of %d bytes", ErrRing, c.head, length)
	}
	table, err := r.mem.Slice(addr, uint64(length))
	if err != nil {
		return fmt.Errorf("%w: chain %d: indirect table: %w", ErrRing, c.head, err)
	}
	return r.walk(c, table, 0, true)
}

func (r *ring) add(c *Chain, addr uint64, length uint32, writable bool) error {
	if !writable && len(c.Writable) > 0 { // §2.7.4.2
		return fmt.Errorf("%w: chain %d: readable part after writable", ErrRing, c.head)
	}
	if c.bytes += uint64(length); c.bytes > maxChain {
		return fmt.Errorf("%w: chain %d: more than %d bytes", ErrRing, c.head, maxChain)
	}
	if length == 0 {
		return nil
	}
	b, err := r.mem.Slice(addr, uint64(length))
	if err != nil {
		return fmt.Errorf("%w: chain %d: %w", ErrRing, c.head, err)
	}
	if writable {
		c.Writable = append(c.Writable, b)
	} else {
		c.Readable = append(c.Readable, b)
	}
	return nil
}

// hush asks the driver not to notify while chains are being taken anyway (§2.7.10). With event
// indexes that is the normal state between two rearms.
func (r *ring) hush() {
	if !r.eventIdx && !r.quiet {
		r.quiet = true
		r.publish()
	}
}

// rearm asks for a notification of the next chain and reports whether one came before the
// driver could have seen that.
func (r *ring) rearm() bool {
	if r.eventIdx {
		store16(r.used[4+8*int(r.size):], r.lastAvail)
		atomic.StoreUint32(&r.fence, 0) // the store above before the load below
	} else {
		r.quiet = false
		r.publish()
	}
	return uint16(loadHeader(r.avail)>>16) != r.lastAvail
}

// publish makes used entries and flags visible.
func (r *ring) publish() {
	v := uint32(r.usedNext) << 16
	if r.quiet {
		v |= usedNoNotify
	}
	storeHeader(r.used, v)
}

// put gives a chain back and reports whether the driver wants an interrupt for it (§2.7.7,
// §2.7.10).
func (r *ring) put(head uint16, written uint32) (interrupt bool) {
	e := r.used[4+8*int(r.usedNext%r.size):]
	binary.LittleEndian.PutUint32(e, uint32(head))
	binary.LittleEndian.PutUint32(e[4:], written)
	r.busy[head] = false
	old := r.usedNext
	r.usedNext++
	r.publish()
	if r.eventIdx {
		return load16(r.avail[4+2*int(r.size):]) == old
	}
	return loadHeader(r.avail)&availNoInterrupt == 0
}

// A Chain is one request: buffers in guest memory, which the guest may change at any time.
// Readable are the driver's words to the device, Writable the room for its answer. Descriptor
// borders mean nothing (virtio 1.2 §2.7.4.1).
type Chain struct {
	Readable, Writable [][]byte

	head  uint16
	bytes uint64
	done  func(*Chain, uint32)
}

// Done gives the chain back with the number of bytes written at the start of Writable. It must
// be called exactly once; the buffers must not be touched afterwards.
func (c *Chain) Done(written uint32) { c.done(c, written) }

// Length is the number of bytes in segments.
func Length(segments [][]byte) uint64 {
	var n uint64
	for _, s := range segments {
		n += uint64(len(s))
	}
	return n
}

// Cut splits segments behind the first n bytes; it copies no payload.
func Cut(segments [][]byte, n uint64) (head, tail [][]byte) {
	for i, s := range segments {
		if uint64(len(s)) > n {
			if n > 0 {
				head = append(head, s[:n])
			}
			return head, append([][]byte{s[n:]}, segments[i+1:]...)
		}
		head = append(head, s)
		n -= uint64(len(s))
	}
	return head, nil
}

// Gather copies from segments into p and returns how much there was.
func Gather(p []byte, segments [][]byte) int {
	n := 0
	for _, s := range segments {
		n += copy(p[n:], s)
	}
	return n
}

// Scatter copies p into segments and returns how much fitted.
func Scatter(segments [][]byte, p []byte) int {
	n := 0
	for _, s := range segments {
		n += copy(s, p[n:])
	}
	return n
}
