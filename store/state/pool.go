package state

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/logic"
)

// Reset says when a worker is replaced.
type Reset int

const (
	// ResetEach replaces it after every response: the default.
	ResetEach Reset = 1
	// ResetOff never does. For benchmarks: as with every value but ResetEach, a worker that a
	// request has taken over then parses other domains' requests too.
	ResetOff Reset = -1
)

// A Worker is a running worker program (package logic). Conn leads to it; it ends when Conn is
// closed. Kill ends it whatever it does, and releases what is kept of it.
type Worker struct {
	Conn *ipc.Conn
	Kill func()
}

// Workers starts workers. State does not start programs itself: the Builder does.
type Workers interface {
	Start(ctx context.Context) (*Worker, error)
}

// WorkersFunc is a function as Workers.
type WorkersFunc func(ctx context.Context) (*Worker, error)

// Start calls f.
func (f WorkersFunc) Start(ctx context.Context) (*Worker, error) { return f(ctx) }

const (
	// defaultTimeout is for one request, which takes microseconds: so long that only a worker
	// that hangs reaches it, never one that an overloaded machine keeps waiting.
	defaultTimeout = 10 * time.Second
	defaultSize    = 4 // workers that live, busy ones and spares
)

// errWorker says that a request failed because its worker did.
var errWorker = errors.New("store worker failed")

// errAsleep says that a worker was gone before it was asked: the request may go to another one.
var errAsleep = errors.New("it died while it waited")

// pool keeps workers ready. A request takes one out and no other request uses it meanwhile; so
// a worker that hangs holds up its own client, and others as long as there are spares.
type pool struct {
	log     *slog.Logger
	workers Workers
	reset   Reset
	timeout time.Duration
	ctx     context.Context
	idle    chan *served
	slots   chan struct{} // one element for each worker that lives or is being started
	wg      sync.WaitGroup
	all     sync.Map // *served → nothing: so that the pool's end ends requests under way
}

// served is a worker and how much it has done.
type served struct {
	*Worker
	socket  *os.File // Conn's, for blocking system calls
	fd      int
	answers int
	seq     uint64
	in      []byte
	out     []byte

	mu     sync.Mutex
	closed bool
}

func newPool(ctx context.Context, log *slog.Logger, o Options) *pool {
	p := &pool{
		log: log, workers: o.Workers, reset: o.Reset, timeout: o.Timeout, ctx: ctx,
		idle: make(chan *served, o.Size), slots: make(chan struct{}, o.Size),
	}
	for range o.Size {
		p.refill()
	}
	return p
}

// interrupt ends the requests under way. The pool's context must have ended.
func (p *pool) interrupt() {
	p.all.Range(func(w, _ any) bool { w.(*served).shutdown(); return true })
}

// close ends all workers and waits for the pool's goroutines. No request may be under way.
func (p *pool) close() {
	p.wg.Wait()
	for {
		select {
		case w := <-p.idle:
			p.retire(w)
		default:
			return
		}
	}
}

// refill starts a worker beside whatever else goes on, if there is a slot.
func (p *pool) refill() {
	if p.ctx.Err() != nil {
		return
	}
	select {
	case p.slots <- struct{}{}:
	default:
		return
	}
	p.wg.Go(func() {
		w, err := p.start()
		if err != nil {
			p.log.Error("store worker", "err", err) // the next request tries again
			return
		}
		p.idle <- w
	})
}

// start starts a worker for a slot that was taken.
func (p *pool) start() (*served, error) {
	w, err := p.workers.Start(p.ctx)
	if err != nil {
		<-p.slots
		return nil, fmt.Errorf("start: %w", err)
	}
	s := &served{Worker: w, in: make([]byte, logic.MaxMessage)}
	if err := s.prepare(p.timeout); err != nil {
		w.Conn.Close()
		w.Kill()
		<-p.slots
		return nil, fmt.Errorf("start: %w", err)
	}
	p.all.Store(s, nil)
	if err := p.ctx.Err(); err != nil { // interrupt may have looked before
		p.retire(s)
		return nil, err
	}
	return s, nil
}

func (p *pool) get() (*served, error) {
	if err := p.ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case w := <-p.idle:
		return w, nil
	default:
	}
	select {
	case w := <-p.idle:
		return w, nil
	case p.slots <- struct{}{}:
		return p.start()
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	}
}

func (p *pool) retire(w *served) {
	p.all.Delete(w)
	w.mu.Lock()
	w.closed = true
	w.socket.Close()
	w.Conn.Close()
	w.mu.Unlock()
	w.Kill()
	<-p.slots
}

// decide asks a worker what a request means. What the worker does wrong is the request's
// error; the next request gets another worker.
func (p *pool) decide(r logic.Request) (logic.Action, error) {
	var w *served
	var a logic.Action
	err := errAsleep
	// Each that is found dead is retired: after as many as there can be, one was started just now.
	for tries := 0; errors.Is(err, errAsleep) && tries <= cap(p.slots); tries++ {
		if w != nil {
			p.retire(w)
			p.refill()
		}
		if w, err = p.get(); err != nil {
			return logic.Action{}, fmt.Errorf("%w: %w", errWorker, err)
		}
		a, err = w.ask(r)
	}
	if err == nil {
		err = a.Check(r.Type, r.Domain)
	}
	w.answers++
	if err != nil || (p.reset > 0 && w.answers >= int(p.reset)) {
		p.retire(w)
		p.refill()
	} else {
		p.idle <- w
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", errWorker, err)
	}
	return a, err
}

// prepare makes the socket ready for blocking calls with a bound. A request and its answer take
// less time than it takes the runtime's poller to hand a goroutine over twice, and as many
// threads as there are workers are what it costs.
func (w *served) prepare(timeout time.Duration) (err error) {
	if w.socket, err = w.Conn.File(); err != nil {
		return err
	}
	w.fd = int(w.socket.Fd()) // blocking from here on
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	err = errors.Join(
		unix.SetNonblock(w.fd, false),
		unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
	)
	if err != nil {
		w.socket.Close()
	}
	return err
}

func (w *served) shutdown() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		_ = unix.Shutdown(w.fd, unix.SHUT_RDWR)
	}
}

func (w *served) ask(r logic.Request) (logic.Action, error) {
	w.seq++
	w.out = logic.AppendRequest(w.out[:0], w.seq, r)
	if err := inTime(func() error { return unix.Send(w.fd, w.out, unix.MSG_NOSIGNAL) }); err != nil {
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) { // nobody will read it
			err = fmt.Errorf("%w: %w", errAsleep, err)
		}
		return logic.Action{}, fmt.Errorf("ask: %w", err)
	}
	// Descriptors that a worker sends find no room and are gone.
	var n, flags int
	if err := inTime(func() (err error) {
		n, _, flags, _, err = unix.Recvmsg(w.fd, w.in, nil, 0)
		return err
	}); err != nil {
		return logic.Action{}, fmt.Errorf("answer: %w", err)
	}
	if n == 0 {
		return logic.Action{}, fmt.Errorf("answer: %w", io.EOF)
	}
	seq, a, err := logic.ParseAnswer(w.in[:n])
	if err == nil && (seq != w.seq || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = fmt.Errorf("%w: answer %d (flags %#x) to request %d", logic.ErrAnswer, seq, flags, w.seq)
	}
	return a, err
}

// inTime makes a call whose socket has a time limit.
func inTime(f func() error) error {
	err := eintr.Call(f)
	if errors.Is(err, unix.EAGAIN) {
		return os.ErrDeadlineExceeded
	}
	return err
}
