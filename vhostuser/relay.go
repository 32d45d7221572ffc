package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"redoubt.dev/redoubt/virtio"
)

// RelayOptions of a relay.
type RelayOptions struct {
	Memory Whitelist // what may be guest memory
	// OwnConfig says that the front end has the device's configuration itself, as QEMU has a
	// network device's: it warns of a back end that offers one.
	OwnConfig bool
}

// Relay plays the back end for a front end that does not survive one (QEMU), and passes all it is
// told on to f, which does. Data does not pass through: the rings and their eventfds are the
// front end's and the back end's own. A back end has been connected to f before.
//
// It returns when the front end closes c (nil), ctx ends, or a rule is broken; then no queue of
// f's runs any more. It takes c over.
func Relay(ctx context.Context, c *net.UnixConn, f *Frontend, opt RelayOptions) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &relay{ctx: ctx, conn: conn{c: c}, f: f, allowed: opt.Memory, offered: protoNeeded, queues: make([]relayQueue, len(f.queues))}
	if opt.OwnConfig {
		r.offered &^= protoConfig
	}
	stop := context.AfterFunc(ctx, func() { _ = c.CloseRead() })
	defer stop()
	err := r.loop(r.perform)
	for i := range r.queues {
		f.DropQueue(i) // the front end is gone, and its guest
		err = errors.Join(err, r.queues[i].close())
	}
	if r.mem != nil {
		err = errors.Join(err, r.mem.unmap())
	}
	closeAll(r.files)
	_ = c.Close()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

type relay struct {
	conn
	ctx      context.Context // of Relay
	f        *Frontend
	allowed  Whitelist
	offered  uint64 // protocol features; the in-flight region is the front end's own business
	features uint64
	mem      *memory
	files    []*os.File // of the memory
	queues   []relayQueue
}

// relayQueue is a queue as far as the front end has told.
type relayQueue struct {
	size       uint16
	addr       *vringAddr
	base       uint16
	kick, call *os.File
	enabled    bool
	running    bool
}

func (q *relayQueue) close() error {
	var errs []error
	for _, f := range []**os.File{&q.kick, &q.call} {
		if *f != nil {
			errs = append(errs, (*f).Close())
			*f = nil
		}
	}
	return errors.Join(errs...)
}

func (r *relay) queue(i uint32) (*relayQueue, error) {
	if int64(i) >= int64(len(r.queues)) {
		return nil, fmt.Errorf("%w: queue %d of %d", ErrProtocol, i, len(r.queues))
	}
	return &r.queues[i], nil
}

func (r *relay) perform(m *message) ([]byte, error) {
	switch m.request {
	case getFeatures:
		return u64(r.f.Offered() | featureProtocol), nil
	case setFeatures:
		v, err := parseU64(m.payload)
		if err != nil {
			return nil, err
		}
		if v&^(r.f.Offered()|featureProtocol) != 0 {
			return nil, fmt.Errorf("%w: features %#x of %#x", ErrProtocol, v, r.f.Offered())
		}
		if v == r.features {
			return nil, nil
		}
		r.features = v
		return nil, r.f.SetFeatures(v &^ featureProtocol)
	case getProtocolFeatures:
		return u64(r.offered), nil
	case setProtocolFeatures:
		return nil, r.agree(m, r.offered)
	case setOwner:
		return nil, nil
	case getQueueNum:
		return u64(uint64(len(r.queues))), nil
	case setMemTable:
		return nil, r.setMemory(m)
	case getConfig:
		return config(m, r.f.ReadConfig)
	case setVringNum, setVringAddr, setVringBase, getVringBase, setVringKick, setVringCall, setVringErr, setVringEnable:
		return r.vring(m)
	}
	return nil, fmt.Errorf("%w: %v", errUnsupported, m.request)
}

func (r *relay) setMemory(m *message) error {
	regions, err := parseMemTable(m.payload)
	if err != nil {
		return err
	}
	if r.mem.is(regions) && sameFiles(r.files, m.files) { // QEMU tells it again whenever it lets its guest go on, which waits for that
		return r.startAll()
	}
	next, err := mapMemory(regions, m.files, r.allowed)
	if err != nil {
		return err
	}
	var told []Region
	for i, g := range regions {
		told = append(told, Region{Guest: g.guest, Size: g.size, Offset: g.offset, File: m.files[i]})
	}
	old, files := r.mem, r.files
	r.mem, r.files = next, m.files
	m.files = nil
	err = r.f.SetMemory(told)
	if old != nil {
		err = errors.Join(err, old.unmap())
	}
	closeAll(files)
	if err != nil {
		return err
	}
	return r.startAll()
}

func sameFiles(a, b []*os.File) bool {
	return slices.EqualFunc(a, b, func(x, y *os.File) bool {
		is, err := x.Stat()
		other, oerr := y.Stat()
		return err == nil && oerr == nil && os.SameFile(is, other)
	})
}

func (r *relay) startAll() error {
	for i := range r.queues {
		if err := r.start(i); err != nil {
			return err
		}
	}
	return nil
}

// vring takes in a request about one queue. A change stops the queue and starts it again.
func (r *relay) vring(m *message) ([]byte, error) {
	switch m.request {
	case setVringAddr:
		a, err := parseVringAddr(m.payload)
		if err != nil {
			return nil, err
		}
		q, err := r.queue(a.index)
		if err != nil {
			return nil, err
		}
		if a.flags != 0 {
			return nil, fmt.Errorf("%w: queue %d: flags %#x", ErrProtocol, a.index, a.flags)
		}
		_, err = r.halt(int(a.index))
		q.addr = &a
		return nil, errors.Join(err, r.start(int(a.index)))
	case setVringKick, setVringCall, setVringErr:
		return nil, r.setFile(m)
	}
	v, err := parseVringState(m.payload)
	if err != nil {
		return nil, err
	}
	q, err := r.queue(v.index)
	if err != nil {
		return nil, err
	}
	if m.request == setVringEnable && q.enabled == (v.num != 0) {
		return nil, r.start(int(v.index)) // runs already, or lacks something else
	}
	base, err := r.halt(int(v.index))
	if err != nil {
		return nil, err
	}
	switch m.request {
	case setVringNum:
		if v.num == 0 || v.num > virtio.MaxQueueSize || v.num&(v.num-1) != 0 {
			return nil, fmt.Errorf("%w: queue %d of %d entries", ErrProtocol, v.index, v.num)
		}
		q.size = uint16(v.num)
	case setVringBase:
		if v.num > 0xffff {
			return nil, fmt.Errorf("%w: queue %d begins at %d", ErrProtocol, v.index, v.num)
		}
		q.base = uint16(v.num)
	case setVringEnable:
		q.enabled = v.num != 0
	case getVringBase:
		if q.kick != nil {
			err = q.kick.Close()
			q.kick = nil
		}
		return vringState{v.index, uint32(base)}.bytes(), err
	}
	return nil, r.start(int(v.index))
}

// setFile takes a queue's eventfd over.
func (r *relay) setFile(m *message) error {
	v, err := parseU64(m.payload)
	if err != nil {
		return err
	}
	if v&^(noDescriptor|0xff) != 0 {
		return fmt.Errorf("%w: %v %#x", ErrProtocol, m.request, v)
	}
	i := uint32(v & 0xff)
	q, err := r.queue(i)
	if err != nil {
		return err
	}
	f, err := m.takeFile()
	if err != nil {
		return err
	}
	if f != nil {
		if f, err = eventFile(f); err != nil {
			return fmt.Errorf("%w: %v of queue %d: %w", ErrProtocol, m.request, i, err)
		}
	}
	switch {
	case m.request == setVringErr:
		if f != nil {
			return f.Close()
		}
		return nil
	case m.request == setVringCall:
		old := q.call
		q.call = f
		if q.running && f != nil {
			err = r.f.SetCall(int(i), f)
		}
		if old != nil {
			err = errors.Join(err, old.Close())
		}
		return err
	case f == nil:
		return fmt.Errorf("%w: queue %d without a kick: polled rings are not supported", ErrProtocol, i)
	}
	_, err = r.halt(int(i))
	if q.kick != nil {
		err = errors.Join(err, q.kick.Close())
	}
	q.kick = f
	return errors.Join(err, r.start(int(i)))
}

// start lets a queue run that is ready to.
func (r *relay) start(i int) error {
	q := &r.queues[i]
	if q.running || q.kick == nil || q.call == nil || q.addr == nil || q.size == 0 || r.mem == nil ||
		(!q.enabled && r.features&featureProtocol != 0) {
		return nil
	}
	setup := QueueSetup{Size: q.size, Base: q.base, Kick: q.kick, Call: q.call}
	n := virtio.RingAreas(q.size)
	for j, a := range [3]struct{ at, align uint64 }{{q.addr.desc, 16}, {q.addr.avail, 2}, {q.addr.used, 4}} {
		_, guest, err := r.mem.locate(a.at, n[j], a.align)
		if err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
		setup.Areas[j] = guest
	}
	q.running = true
	return r.f.StartQueue(i, setup)
}

// halt stops a queue and returns its next available entry.
func (r *relay) halt(i int) (base uint16, err error) {
	q := &r.queues[i]
	if !q.running {
		return q.base, nil
	}
	q.running = false
	q.base, err = r.f.StopQueue(r.ctx, i)
	return q.base, err
}
