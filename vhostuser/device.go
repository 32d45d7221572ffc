// Package vhostuser is vhost-user, both sides (vhost-user protocol specification of QEMU's
// documentation, docs/interop/vhost-user.rst). [Serve] is the back end's: it serves a virtio
// device (any virtio.Backend) to an emulator in another process, over guest memory that both
// map. [Frontend] is the emulator's.
//
// Data flow: the front end hands over guest memory, and a kick and a call eventfd for each
// queue; from then on requests and answers go through the rings in guest memory, and nothing
// of the emulator's is on their way. Interrupts go straight to KVM where the front end gives
// an irqfd.
//
// The front end is an emulator and faces its guest: it is hostile. Memory is mapped only if it
// is on the whitelist and cannot shrink; every address, index and length is checked; a broken
// rule ends the connection and with it this guest's device, nobody else's.
//
// A back end may be killed at any instant. The in-flight region, which the front end keeps,
// tells the next one which requests to carry out again; so the guest sees a pause, never an
// error or a lost request. A device that is in order (virtio.Info) needs no region: the used
// index tells it. Requests are carried out at least once: a device whose requests cannot be
// repeated does not belong here.
package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/virtio"
)

// Options of a device.
type Options struct {
	Memory Whitelist // what may be mapped as guest memory
	// OnStart is called when the first queue runs, once: the guest is served (again). May be nil.
	//
	// QEMU 7.2 forgets a device whose back end goes while no queue of it runs, as before the
	// guest's driver has started: it never listens for another one. A front end of this package
	// does not mind.
	OnStart func()
	Rings   *Rings // tells of the device while it is served; may be nil
}

// Serve runs a device for the front end at the other end of c until that closes the connection
// (nil), ctx ends, or a rule is broken. It takes c over; the back end stays the caller's and is
// stopped when Serve returns.
func Serve(ctx context.Context, c *net.UnixConn, backend virtio.Backend, opt Options) error {
	info := backend.Info()
	s := &session{conn: conn{c: c}, backend: backend, info: info, allowed: opt.Memory, onStart: opt.OnStart, rings: opt.Rings}
	for i, n := range info.Queues {
		s.queues = append(s.queues, &queue{s: s, index: i, max: n})
	}
	stop := context.AfterFunc(ctx, func() { _ = c.CloseRead() })
	defer stop()
	if opt.Rings != nil {
		opt.Rings.of.Store(s)
		defer opt.Rings.of.Store(nil)
	}
	err := s.loop(s.perform)
	err = errors.Join(err, s.close())
	_ = c.Close() // last: it tells the front end that guest memory is no longer touched
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if broken := s.broken.get(); broken != nil {
		return broken
	}
	return err
}

// session is one connection. The goroutine of Serve owns it; queues have their own locks.
type session struct {
	conn
	backend virtio.Backend
	info    virtio.Info
	allowed Whitelist
	onStart func() // nil once called
	rings   *Rings // may be nil

	features uint64
	mem      *memory
	flight   []byte // mapped in-flight region
	head     inflightHead
	queues   []*queue
	running  int  // queues with a ring
	started  bool // Backend.Start was called, Stop not yet
	broken   firstError
}

// firstError keeps the first error that a queue met.
type firstError struct {
	mu  sync.Mutex
	err error
}

func (f *firstError) get() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *firstError) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

// fail ends the session from a queue's goroutine.
func (s *session) fail(err error) {
	s.broken.set(fmt.Errorf("%s: %w", s.info.Name, err))
	_ = s.c.CloseRead() // ends the loop
}

func (s *session) close() error {
	var errs []error
	for _, q := range s.queues {
		q.halt()
		errs = append(errs, q.closeFiles())
	}
	if s.flight != nil {
		errs = append(errs, unix.Munmap(s.flight))
	}
	if s.mem != nil {
		errs = append(errs, s.mem.unmap())
	}
	return errors.Join(errs...)
}

// offered are the device's features as the front end sees them.
func (s *session) offered() uint64 {
	return s.info.Features | virtio.FeatureIndirect | virtio.FeatureEventIdx | virtio.FeatureVersion1 | featureProtocol
}

// protocols are the protocol features that are offered. A device that is in order needs no in-flight
// region: its used index tells all.
func (s *session) protocols() uint64 {
	if s.info.InOrder {
		return protoOffered &^ protoInflight
	}
	return protoOffered
}

// perform carries out one request; a payload is its own answer.
func (s *session) perform(m *message) ([]byte, error) {
	switch m.request {
	case getFeatures:
		return u64(s.offered()), nil
	case setFeatures:
		v, err := parseU64(m.payload)
		if err != nil {
			return nil, err
		}
		if v&^s.offered() != 0 {
			return nil, fmt.Errorf("%w: features %#x of %#x", ErrProtocol, v, s.offered())
		}
		if v != s.features {
			s.haltAll()
		}
		s.features = v
		return nil, s.startAll()
	case getProtocolFeatures:
		return u64(s.protocols()), nil
	case setProtocolFeatures:
		return nil, s.agree(m, s.protocols())
	case setOwner:
		return nil, nil
	case resetOwner: // deprecated: all rings stop
		s.haltAll()
		return nil, nil
	case getQueueNum:
		return u64(uint64(len(s.queues))), nil
	case setMemTable:
		return nil, s.setMemory(m)
	case getConfig:
		return config(m, s.backend.ReadConfig)
	case getInflight, setInflight:
		if s.info.InOrder {
			break
		}
		if m.request == getInflight {
			return nil, s.giveInflight(m)
		}
		return nil, s.takeInflight(m)
	case setVringNum, setVringAddr, setVringBase, getVringBase, setVringKick, setVringCall, setVringErr, setVringEnable:
		return s.vring(m)
	}
	return nil, fmt.Errorf("%w: %v", errUnsupported, m.request)
}

// setMemory replaces the memory table; running rings stop meanwhile.
func (s *session) setMemory(m *message) error {
	regions, err := parseMemTable(m.payload)
	if err != nil {
		return err
	}
	next, err := mapMemory(regions, m.files, s.allowed)
	if err != nil {
		return err
	}
	s.haltAll()
	old := s.mem
	s.mem = next
	if old != nil {
		if err := old.unmap(); err != nil {
			return err
		}
	}
	return s.startAll()
}

// giveInflight makes a region for the front end to keep.
func (s *session) giveInflight(m *message) error {
	h, err := parseInflight(m.payload)
	if err != nil {
		return err
	}
	if h.queues == 0 || int(h.queues) > len(s.queues) || h.depth == 0 || h.depth > virtio.MaxQueueSize {
		return fmt.Errorf("%w: in-flight region for %d queues of %d", ErrProtocol, h.queues, h.depth)
	}
	f, made, err := newInflight(h.queues, h.depth)
	if err != nil {
		return err
	}
	defer f.Close()
	_, _, err = s.c.WriteMsgUnix(reply(m.request, made.bytes(len(m.payload))), unix.UnixRights(int(f.Fd())), nil)
	return err
}

// takeInflight maps the region that the front end kept; it comes before the rings start.
func (s *session) takeInflight(m *message) error {
	h, err := parseInflight(m.payload)
	if err != nil {
		return err
	}
	f, err := m.takeFile()
	if err != nil {
		return err
	}
	if f == nil {
		return fmt.Errorf("%w: %v without a descriptor", ErrProtocol, m.request)
	}
	defer f.Close()
	if h.depth > virtio.MaxQueueSize || int(h.queues) > len(s.queues) {
		return fmt.Errorf("%w: in-flight region for %d queues of %d", ErrProtocol, h.queues, h.depth)
	}
	b, err := mapInflight(h, f)
	if err != nil {
		return err
	}
	s.haltAll()
	old := s.flight
	s.flight, s.head = b, h
	if old != nil {
		if err := unix.Munmap(old); err != nil {
			return err
		}
	}
	return s.startAll()
}

func (s *session) haltAll() {
	for _, q := range s.queues {
		q.halt()
	}
}

func (s *session) startAll() error {
	for _, q := range s.queues {
		if err := q.start(); err != nil {
			return err
		}
	}
	return nil
}
