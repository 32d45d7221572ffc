package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/virtio"
)

// queue is one virtqueue. It runs while it has a kick, addresses, memory and leave to; the
// session's goroutine starts and halts it, a goroutine of its own takes chains.
type queue struct {
	s       *session
	index   int
	max     uint16
	size    uint16
	addr    *vringAddr
	base    uint16 // next available entry, when there is no in-flight region
	enabled bool
	kick    *os.File
	kicks   *kicks         // of a queue that has a goroutine
	ended   chan struct{}  // closed by the goroutine; nil when there is none
	stop    func() error   // of a queue that the kernel runs, in place of the goroutine
	taken   sync.WaitGroup // chains taken and not given back

	mu   sync.Mutex
	call *event
	ring *virtio.Ring
}

// event is a call eventfd: writing never waits. It is closed by nobody who does not hold the queue's lock.
type event struct {
	f  *os.File
	fd int
}

// signal adds one. A counter that is full means an interrupt that is pending anyway, and a
// front end that fills it on purpose harms only its own guest.
func (e *event) signal() { _, _ = unix.Write(e.fd, one[:]) } // whatever comes of it

// one is what is written to an eventfd.
var one = [8]byte{1}

// noDescriptor says in a queue's index that no descriptor comes along.
const noDescriptor = 1 << 8

// vring carries out a request about one queue.
func (s *session) vring(m *message) ([]byte, error) {
	if m.request == setVringAddr {
		a, err := parseVringAddr(m.payload)
		if err != nil {
			return nil, err
		}
		q, err := s.queue(a.index)
		if err != nil {
			return nil, err
		}
		if a.flags != 0 { // only logging has a flag, and it is not offered
			return nil, fmt.Errorf("%w: queue %d: flags %#x", ErrProtocol, a.index, a.flags)
		}
		q.halt()
		q.addr = &a
		return nil, q.start()
	}
	switch m.request {
	case setVringKick, setVringCall, setVringErr:
		v, err := parseU64(m.payload)
		if err != nil {
			return nil, err
		}
		if v&^(noDescriptor|0xff) != 0 {
			return nil, fmt.Errorf("%w: %v %#x", ErrProtocol, m.request, v)
		}
		q, err := s.queue(uint32(v & 0xff))
		if err != nil {
			return nil, err
		}
		f, err := m.takeFile()
		if err != nil {
			return nil, err
		}
		return nil, q.setFile(m.request, f)
	}
	v, err := parseVringState(m.payload)
	if err != nil {
		return nil, err
	}
	q, err := s.queue(v.index)
	if err != nil {
		return nil, err
	}
	switch m.request {
	case setVringNum:
		if v.num == 0 || v.num > uint32(q.max) || v.num&(v.num-1) != 0 {
			return nil, fmt.Errorf("%w: queue %d of %d entries, the most is %d", ErrProtocol, v.index, v.num, q.max)
		}
		q.halt()
		q.size = uint16(v.num)
	case setVringBase:
		if v.num > 0xffff {
			return nil, fmt.Errorf("%w: queue %d begins at %d", ErrProtocol, v.index, v.num)
		}
		q.halt()
		q.base = uint16(v.num)
	case setVringEnable:
		q.halt()
		q.enabled = v.num != 0
	case getVringBase: // stops the queue for good; a new kick starts it again
		q.halt()
		base := vringState{v.index, uint32(q.base)}
		return base.bytes(), q.closeKick()
	}
	return nil, q.start()
}

func (s *session) queue(i uint32) (*queue, error) {
	if int64(i) >= int64(len(s.queues)) {
		return nil, fmt.Errorf("%w: queue %d of %d", ErrProtocol, i, len(s.queues))
	}
	return s.queues[i], nil
}

// setFile takes over a queue's eventfd; nil takes the old one away.
func (q *queue) setFile(r request, f *os.File) error {
	if f != nil {
		g, err := eventFile(f)
		if err != nil {
			return fmt.Errorf("%w: %v of queue %d: %w", ErrProtocol, r, q.index, err)
		}
		f = g
	}
	switch r {
	case setVringCall:
		var next *event
		if f != nil {
			next = &event{f, int(f.Fd())}
		}
		if q.stop != nil { // the kernel has the old one
			q.halt()
		}
		q.mu.Lock()
		old := q.call
		q.call = next
		if next != nil && q.ring != nil {
			next.signal() // as above: what the old one said may be lost
		}
		q.mu.Unlock()
		err := q.start() // if this is what it waited for
		if old != nil {
			err = errors.Join(err, old.f.Close())
		}
		return err
	case setVringKick:
		q.halt()
		if err := q.closeKick(); err != nil {
			return err
		}
		if f == nil {
			return fmt.Errorf("%w: queue %d without a kick: polled rings are not supported", ErrProtocol, q.index)
		}
		q.kick = f
		return q.start()
	}
	if f != nil { // nothing is ever said on the error descriptor: the connection ends instead
		return f.Close()
	}
	return nil
}

// eventFile takes f over if it is an eventfd, as far as that can be told without /proc: of no
// file type. Reads and writes of it never block this process, and the runtime's poller does not watch it.
func eventFile(f *os.File) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	if err == nil && st.Mode&unix.S_IFMT != 0 {
		err = errors.New("not an eventfd")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	file, err := unwatched(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(int(file.Fd()), true); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// unwatched duplicates f into a file that the runtime's poller does not watch. The poller takes what is non-blocking when the file is
// made, and f stays as it is at every moment, for others have it, too: so the file is made of something else, which f then replaces.
func unwatched(f *os.File) (*os.File, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	file := os.NewFile(uintptr(fd), "eventfd")
	if err := unix.Dup3(int(f.Fd()), fd, unix.O_CLOEXEC); err != nil {
		return nil, errors.Join(fmt.Errorf("dup3: %w", err), file.Close())
	}
	return file, nil
}

func (q *queue) closeKick() error {
	if q.kick == nil {
		return nil
	}
	err := q.kick.Close()
	q.kick = nil
	return err
}

func (q *queue) closeFiles() error {
	err := q.closeKick()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.call != nil {
		err = errors.Join(err, q.call.f.Close())
		q.call = nil
	}
	return err
}

// ready reports whether the queue may run. Without protocol features a queue needs no leave.
func (q *queue) ready() bool {
	if _, ok := q.s.backend.(virtio.Delegate); ok && q.call == nil {
		return false
	}
	return q.ended == nil && q.kick != nil && q.addr != nil && q.size != 0 && q.s.mem != nil &&
		(q.enabled || q.s.features&featureProtocol == 0)
}

// start makes the ring and its goroutine, if the queue is ready.
func (q *queue) start() error {
	if !q.ready() {
		return nil
	}
	s := q.s
	var area [3][]byte
	n := virtio.RingAreas(q.size)
	for i, a := range [3]struct{ at, align uint64 }{{q.addr.desc, 16}, {q.addr.avail, 2}, {q.addr.used, 4}} {
		var err error
		if area[i], err = s.mem.user(a.at, n[i], a.align); err != nil {
			return fmt.Errorf("queue %d: %w", q.index, err)
		}
	}
	r, err := virtio.NewRingAt(s.mem, q.size, area, s.features)
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	used, base := r.UsedIndex(), q.base
	var again []uint16
	var journal virtio.Journal
	if s.flight != nil && q.index < int(s.head.queues) && q.size <= s.head.depth {
		t := newTracker(s.flight, q.index, s.head.depth)
		again = t.recover(used)
		base = used + uint16(len(again))
		journal = t
	}
	if s.info.InOrder {
		base = used // whatever another back end was told: what is not used is not done
	}
	if err := r.Resume(base, used, again, journal); err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	if !s.started {
		s.backend.Start(s.features)
		s.started = true
	}
	if b, ok := s.backend.(virtio.QueueServer); ok {
		b.StartQueue(q.index)
	}
	s.running++
	q.mu.Lock()
	q.ring = r
	q.mu.Unlock()
	q.ended = make(chan struct{})
	if d, ok := s.backend.(virtio.Delegate); ok {
		return q.delegate(d, area, used)
	}
	if q.kicks, err = newKicks(q.kick); err != nil {
		close(q.ended)
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	// What another back end left undone comes first, and before anything can halt the queue.
	for range again {
		if err := q.handle(); err != nil {
			close(q.ended)
			return err
		}
	}
	// A back end that was killed between a used entry and its interrupt leaves the guest waiting
	// for good. One interrupt too many harms nobody.
	q.mu.Lock()
	if q.call != nil {
		q.call.signal()
	}
	q.mu.Unlock()
	go q.run(r, q.ended)
	s.tellStart()
	return nil
}

func (s *session) tellStart() {
	if s.onStart != nil {
		s.onStart()
		s.onStart = nil
	}
}

// delegate lets the kernel run the queue.
func (q *queue) delegate(d virtio.Delegate, area [3][]byte, base uint16) (err error) {
	close(q.ended) // there is no goroutine
	v := virtio.DelegatedQueue{Index: q.index, Size: q.size, Base: base, Areas: area, Kick: q.kick, Call: q.call.f}
	for _, r := range q.s.mem.regions {
		v.Memory = append(v.Memory, virtio.MappedMemory{Guest: r.guest, Data: r.data})
	}
	if q.stop, err = d.RunQueue(v); err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	q.call.signal() // as above; and what was made available before is looked at
	if _, err := q.kick.Write(one[:]); err != nil {
		return fmt.Errorf("queue %d: kick: %w", q.index, err)
	}
	q.s.tellStart()
	return nil
}

// errEmpty says that there is no chain to take.
var errEmpty = errors.New("no chain")

// handle takes one chain and gives it to the back end.
func (q *queue) handle() error {
	c, err := q.take()
	if err == nil && c == nil {
		return errEmpty
	}
	if err == nil {
		if err = q.s.backend.Handle(q.index, c); err != nil {
			q.taken.Done()
		}
	}
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	return nil
}

// handleAll takes chains until there is none.
func (q *queue) handleAll() error {
	err := q.handle()
	for err == nil {
		err = q.handle()
	}
	if errors.Is(err, errEmpty) {
		return nil
	}
	return err
}

func (q *queue) interrupt() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.call != nil {
		q.call.signal()
	}
}

// halt stops the goroutine and waits until every chain is given back; afterwards nothing of
// this queue touches guest memory.
func (q *queue) halt() {
	if q.ended == nil {
		return
	}
	if q.s.running--; q.s.running == 0 {
		q.s.backend.Stop()
		q.s.started = false
	}
	if q.stop != nil {
		if err := q.stop(); err != nil {
			q.s.fail(err)
		}
		q.stop = nil
		q.mu.Lock()
		q.base, q.ring, q.ended = q.ring.UsedIndex(), nil, nil
		q.mu.Unlock()
		return
	}
	if q.kicks != nil {
		if err := q.kicks.halt(); err != nil {
			q.s.fail(fmt.Errorf("queue %d: %w", q.index, err))
		}
	}
	q.mu.Lock()
	r := q.ring
	q.ring = nil
	q.mu.Unlock()
	if b, ok := q.s.backend.(virtio.QueueServer); ok {
		b.StopQueue(q.index)
	}
	<-q.ended
	q.ended = nil
	if q.kicks != nil {
		if err := q.kicks.close(); err != nil {
			q.s.fail(fmt.Errorf("queue %d: %w", q.index, err))
		}
		q.kicks = nil
	}
	q.taken.Wait()
	q.base, _ = r.Positions()
}

// run owns taking chains: what there is at first, then what each kick tells of.
func (q *queue) run(r *virtio.Ring, ended chan<- struct{}) {
	defer close(ended)
	work := q.handleAll
	if b, ok := q.s.backend.(virtio.QueueServer); ok {
		all := virtio.NewQueue(r, q.interrupt)
		work = func() error {
			if err := b.ServeQueue(q.index, all); err != nil {
				return fmt.Errorf("queue %d: %w", q.index, err)
			}
			return nil
		}
	}
	for kicks := q.kicks; ; {
		if err := work(); err != nil {
			q.s.fail(err)
			return
		}
		if kicked, err := kicks.wait(); !kicked {
			if err != nil {
				q.s.fail(fmt.Errorf("queue %d: kick: %w", q.index, err))
			}
			return
		}
	}
}

// take gives the next chain, nil when there is none or the queue is being halted.
func (q *queue) take() (*virtio.Chain, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.ring
	if r == nil {
		return nil, nil
	}
	c, err := r.Next()
	if c == nil || err != nil {
		return nil, err
	}
	q.taken.Add(1)
	c.OnDone(func(c *virtio.Chain, written uint32) {
		q.mu.Lock()
		if r.Put(c, written) && q.call != nil {
			q.call.signal()
		}
		q.mu.Unlock()
		q.s.rings.answered()
		q.taken.Done()
	})
	return c, nil
}
