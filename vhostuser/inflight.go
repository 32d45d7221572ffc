package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// The in-flight region is memory that the front end keeps while back ends come and go
// (vhost-user specification, "Inflight I/O tracking", split virtqueues): a queue's region has
// a header and an entry for each descriptor, and says which requests a back end took and did
// not give back. A back end that takes over carries those out again, in their order.
const (
	inflightAlign   = 64
	inflightHeader  = 16
	inflightEntry   = 16
	inflightVersion = 1
)

func inflightLength(depth uint16) uint64 {
	return (inflightHeader + inflightEntry*uint64(depth) + inflightAlign - 1) &^ (inflightAlign - 1)
}

// newInflight makes the region's file, sealed so that neither side can cut it.
func newInflight(queues, depth uint16) (*os.File, inflightHead, error) {
	h := inflightHead{size: inflightLength(depth) * uint64(queues), queues: queues, depth: depth}
	fd, err := unix.MemfdCreate("inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, h, fmt.Errorf("vhost-user: in-flight region: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inflight")
	err = f.Truncate(int64(h.size))
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, h, errors.Join(fmt.Errorf("vhost-user: in-flight region: %w", err), f.Close())
	}
	return f, h, nil
}

// mapInflight maps a region that the front end gave back.
func mapInflight(h inflightHead, f *os.File) ([]byte, error) {
	if h.queues == 0 || h.depth == 0 || h.size < inflightLength(h.depth)*uint64(h.queues) || h.offset%pageSize != 0 ||
		h.size > 1<<24 || h.offset > 1<<32 {
		return nil, fmt.Errorf("%w: in-flight region of %d bytes at %d for %d queues of %d", ErrProtocol, h.size, h.offset, h.queues, h.depth)
	}
	if err := checkMappable(f); err != nil {
		return nil, fmt.Errorf("%w: in-flight region: %w", ErrProtocol, err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("vhost-user: in-flight region: %w", err)
	}
	if h.offset+h.size > uint64(st.Size()) {
		return nil, fmt.Errorf("%w: in-flight region of %d bytes at %d of a file of %d", ErrProtocol, h.size, h.offset, st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), int64(h.offset), int(h.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("vhost-user: map in-flight region: %w", err)
	}
	return b, nil
}

// tracker is one queue's part of the region; it implements virtio.Journal. What it reads is the
// front end's word and is checked; a lie costs the liar's own guest.
type tracker struct {
	b       []byte
	depth   uint16
	counter uint64
}

// Offsets in a queue's header and in an entry.
const (
	atVersion   = 8
	atDepth     = 10
	atLastHead  = 12
	atUsedIndex = 14
	atFlag      = 0
	atCounter   = 8
)

// newTracker takes the queue's part of a mapped region.
func newTracker(b []byte, queue int, depth uint16) *tracker {
	n := inflightLength(depth)
	return &tracker{b: b[uint64(queue)*n:][:n], depth: depth}
}

func (t *tracker) entry(head uint16) []byte {
	return t.b[inflightHeader+inflightEntry*int(head):][:inflightEntry]
}

// recover returns the heads to carry out again, oldest first, given the index that the used
// ring shows: a chain whose used entry was published is done, whatever the flag says.
func (t *tracker) recover(used uint16) []uint16 {
	le := binary.LittleEndian
	if le.Uint16(t.b[atVersion:]) != inflightVersion || le.Uint16(t.b[atDepth:]) != t.depth {
		clear(t.b)
		le.PutUint16(t.b[atDepth:], t.depth)
		le.PutUint16(t.b[atUsedIndex:], used)
		le.PutUint16(t.b[atVersion:], inflightVersion)
		return nil
	}
	if last := le.Uint16(t.b[atLastHead:]); le.Uint16(t.b[atUsedIndex:]) != used && last < t.depth {
		t.entry(last)[atFlag] = 0
	}
	le.PutUint16(t.b[atUsedIndex:], used)
	type taken struct {
		head  uint16
		count uint64
	}
	var all []taken
	for h := range t.depth {
		if e := t.entry(h); e[atFlag] != 0 {
			count := le.Uint64(e[atCounter:])
			all = append(all, taken{h, count})
			t.counter = max(t.counter, count+1)
		}
	}
	slices.SortFunc(all, func(a, b taken) int {
		if a.count != b.count {
			if a.count < b.count {
				return -1
			}
			return 1
		}
		return int(a.head) - int(b.head)
	})
	heads := make([]uint16, len(all))
	for i, a := range all {
		heads[i] = a.head
	}
	return heads
}

// Took implements virtio.Journal.
func (t *tracker) Took(head uint16) {
	e := t.entry(head)
	binary.LittleEndian.PutUint64(e[atCounter:], t.counter)
	t.counter++
	e[atFlag] = 1
}

// Giving implements virtio.Journal.
func (t *tracker) Giving(head uint16) { binary.LittleEndian.PutUint16(t.b[atLastHead:], head) }

// Gave implements virtio.Journal.
func (t *tracker) Gave(head, used uint16) {
	t.entry(head)[atFlag] = 0
	binary.LittleEndian.PutUint16(t.b[atUsedIndex:], used)
}
