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

// A Journal is told of every chain as it is taken and given back, so that another process can
// take the ring up where this one was killed.
type Journal interface {
	Took(head uint16)       // before the chain is handed out
	Giving(head uint16)     // before its used entry is published
	Gave(head, used uint16) // after; used is the index published
}

// A Ring is one split virtqueue (virtio 1.2 §2.7) seen from the device. It is not safe for
// concurrent use. Everything in the rings and in descriptors is the guest's: each value is
// loaded once and checked before use.
type Ring struct {
	mem                 pci.Memory
	size                uint16 // a power of two
	desc, avail, used   []byte
	eventIdx, indirect  bool
	lastAvail, usedNext uint16
	busy                []bool   // heads that were taken and not given back
	again               []uint16 // heads to hand out before any new one: see Resume
	quiet               bool     // without eventIdx: the driver was asked not to notify
	told                uint16   // the used index when Interrupt was last asked
	fence               uint32
	journal             Journal // may be nil
}

// NewRing checks alignment (virtio 1.2 §2.7) and that the areas, at guest-physical addresses, are
// in memory. Of the features, indirect descriptors and event indexes count.
func NewRing(mem pci.Memory, size uint16, area [3]uint64, features uint64) (*Ring, error) {
	var at [3][]byte
	for i, n := range RingAreas(size) {
		var err error
		if at[i], err = mem.Slice(area[i], n); err != nil {
			return nil, fmt.Errorf("%w: %s area: %w", ErrRing, [3]string{"descriptor", "driver", "device"}[i], err)
		}
		if area[i]%areaAlign[i] != 0 {
			return nil, fmt.Errorf("%w: area at %#x is not aligned to %d", ErrRing, area[i], areaAlign[i])
		}
	}
	return NewRingAt(mem, size, at, features)
}

// areaAlign are the alignments of descriptor, driver and device area.
var areaAlign = [3]uint64{16, 2, 4}

// RingAreas are the lengths of the descriptor, driver and device area of a queue.
func RingAreas(size uint16) [3]uint64 {
	n := uint64(size)
	return [3]uint64{descSize * n, 6 + 2*n, 6 + 8*n}
}

// NewRingAt makes a ring whose areas are mapped already; their lengths are RingAreas(size) and
// the caller has checked their alignment.
func NewRingAt(mem pci.Memory, size uint16, area [3][]byte, features uint64) (*Ring, error) {
	if size == 0 || size&(size-1) != 0 || size > MaxQueueSize {
		return nil, fmt.Errorf("%w: size %d", ErrRing, size)
	}
	return &Ring{
		mem: mem, size: size, desc: area[0], avail: area[1], used: area[2], busy: make([]bool, size),
		eventIdx: features&FeatureEventIdx != 0, indirect: features&FeatureIndirect != 0,
	}, nil
}

// UsedIndex is the index that the used ring shows.
func (r *Ring) UsedIndex() uint16 { return uint16(loadHeader(r.used) >> 16) }

// InFlight is how many chains the driver has made available that are not used: what it says, at most the ring's size.
func (r *Ring) InFlight() int {
	return int(min(uint16(loadHeader(r.avail)>>16)-r.UsedIndex(), r.size))
}

// Positions are the next available entry to take and the next used entry to fill.
func (r *Ring) Positions() (available, used uint16) { return r.lastAvail, r.usedNext }

// Resume takes the ring up at a position. The heads of again were taken by another process and
// not given back: they are handed out again, in that order, before any new chain. The journal,
// if any, is told of everything from here on.
func (r *Ring) Resume(available, used uint16, again []uint16, j Journal) error {
	for _, h := range again {
		if h >= r.size {
			return fmt.Errorf("%w: head %d of %d to be resumed", ErrRing, h, r.size)
		}
	}
	r.lastAvail, r.usedNext, r.told, r.again, r.journal = available, used, used, again, j
	return nil
}

// Take gives the next chain, nil when there is none.
func (r *Ring) Take() (*Chain, error) {
	if len(r.again) > 0 {
		c, err := r.chain(r.again[0])
		if err != nil {
			return nil, err
		}
		r.again = r.again[1:]
		return c, nil
	}
	next := uint16(loadHeader(r.avail) >> 16)
	if next == r.lastAvail {
		return nil, nil
	}
	if next-r.lastAvail > r.size {
		return nil, fmt.Errorf("%w: available index %d, %d were taken, the ring has %d", ErrRing, next, r.lastAvail, r.size)
	}
	c, err := r.chain(load16(r.avail[4+2*int(r.lastAvail%r.size):]))
	if err != nil {
		return nil, err
	}
	r.lastAvail++
	return c, nil
}

// chain takes the chain that begins at head.
func (r *Ring) chain(head uint16) (*Chain, error) {
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
	if r.journal != nil {
		r.journal.Took(head)
	}
	return c, nil
}

// walk follows the chain from index at in table. A chain has at most as many descriptors as
// the queue (§2.7.5.3.1), which ends loops.
func (r *Ring) walk(c *Chain, table []byte, at uint16, inner bool) error {
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

func (r *Ring) walkIndirect(c *Chain, addr uint64, length uint32) error {
	if length == 0 || length%descSize != 0 || length/descSize > MaxQueueSize {
		return fmt.Errorf("%w: chain %d: indirect table of %d bytes", ErrRing, c.head, length)
	}
	table, err := r.mem.Slice(addr, uint64(length))
	if err != nil {
		return fmt.Errorf("%w: chain %d: indirect table: %w", ErrRing, c.head, err)
	}
	return r.walk(c, table, 0, true)
}

func (r *Ring) add(c *Chain, addr uint64, length uint32, writable bool) error {
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

// Next is what a queue's goroutine takes: the next chain, or nil after the driver was asked to
// notify of one to come.
func (r *Ring) Next() (*Chain, error) {
	c, err := r.Take()
	if c == nil && err == nil && r.Rearm() {
		c, err = r.Take()
	}
	if c != nil && err == nil {
		r.Hush()
	}
	return c, err
}

// Hush asks the driver not to notify while chains are being taken anyway (§2.7.10). With event
// indexes that is the normal state between two rearms.
func (r *Ring) Hush() {
	if !r.eventIdx && !r.quiet {
		r.quiet = true
		r.publish()
	}
}

// Rearm asks for a notification of the next chain and reports whether one came before the
// driver could have seen that.
func (r *Ring) Rearm() bool {
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
func (r *Ring) publish() {
	v := uint32(r.usedNext) << 16
	if r.quiet {
		v |= usedNoNotify
	}
	storeHeader(r.used, v)
}

// Untake takes back a Take: the next one gives the same chain again. It must be the last one taken,
// and the ring must have no journal.
func (r *Ring) Untake(c *Chain) {
	r.busy[c.head] = false
	r.lastAvail--
}

// Put gives a chain back and reports whether the driver wants an interrupt for it (§2.7.7,
// §2.7.10).
func (r *Ring) Put(c *Chain, written uint32) (interrupt bool) {
	r.fill(c, written)
	if r.journal != nil {
		r.journal.Giving(c.head)
	}
	r.publish()
	if r.journal != nil {
		r.journal.Gave(c.head, r.usedNext)
	}
	return r.Interrupt()
}

// PutTogether gives several chains back with one store of the used index: whatever happens to this
// process, the driver sees all of them or none. The ring must have no journal.
func (r *Ring) PutTogether(used []Used) {
	for _, u := range used {
		r.fill(u.Chain, u.Written)
	}
	r.publish()
}

// fill writes the next used entry, which is not published yet.
func (r *Ring) fill(c *Chain, written uint32) {
	e := r.used[4+8*int(r.usedNext%r.size):]
	binary.LittleEndian.PutUint32(e, uint32(c.head))
	binary.LittleEndian.PutUint32(e[4:], written)
	r.busy[c.head] = false
	r.usedNext++
}

// Interrupt reports whether the driver wants an interrupt for what was given back since the last
// call (§2.7.7, §2.7.10).
func (r *Ring) Interrupt() bool {
	since := r.usedNext - r.told
	r.told = r.usedNext
	if r.eventIdx {
		return r.usedNext-load16(r.avail[4+2*int(r.size):])-1 < since
	}
	return since != 0 && loadHeader(r.avail)&availNoInterrupt == 0
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

// OnDone sets what Done does; a transport calls it before it hands the chain out.
func (c *Chain) OnDone(done func(c *Chain, written uint32)) { c.done = done }

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
