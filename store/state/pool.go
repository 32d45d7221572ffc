package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

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
	defaultTimeout = time.Second // for one request, which takes microseconds
	defaultSize    = 4           // workers that live, busy ones and spares
)

// errWorker says that a request failed because its worker did.
var errWorker = errors.New("store worker failed")

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
	answers int
	seq     uint64
	in      []byte
	out     []byte
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

// close ends all workers, and so the requests under way, and waits for the pool's goroutines. Its
// context must have ended: a worker that is started later ends at once.
func (p *pool) close() {
	p.wg.Wait()
	p.all.Range(func(w, _ any) bool { p.retire(w.(*served)); return true })
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
	p.all.Store(s, nil)
	if err := p.ctx.Err(); err != nil { // close may have looked before
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
	if _, there := p.all.LoadAndDelete(w); there {
		w.Conn.Close()
		w.Kill()
		<-p.slots
	}
}

// decide asks a worker what a request means. What the worker does wrong is the request's
// error; the next request gets another worker.
func (p *pool) decide(r logic.Request) (logic.Action, error) {
	w, err := p.get()
	if err != nil {
		return logic.Action{}, fmt.Errorf("%w: %w", errWorker, err)
	}
	a, err := w.ask(p.timeout, r)
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

func (w *served) ask(timeout time.Duration, r logic.Request) (logic.Action, error) {
	w.seq++
	w.out = logic.AppendRequest(w.out[:0], w.seq, r)
	// One deadline serves both ways: a worker that takes nothing is as stuck as one that says
	// nothing.
	deadline := time.Now().Add(timeout)
	if err := w.Conn.SetWriteDeadline(deadline); err != nil {
		return logic.Action{}, err
	}
	if err := w.Conn.SetReadDeadline(deadline); err != nil {
		return logic.Action{}, err
	}
	if err := w.Conn.Send(w.out); err != nil {
		return logic.Action{}, err
	}
	n, files, err := w.Conn.ReceiveInto(w.in)
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("no answer within %v", timeout)
		}
		return logic.Action{}, err
	}
	for _, f := range files {
		f.Close()
	}
	seq, a, err := logic.ParseAnswer(w.in[:n])
	if err == nil && (seq != w.seq || len(files) > 0) {
		err = fmt.Errorf("%w: answer %d with %d descriptors to request %d", logic.ErrAnswer, seq, len(files), w.seq)
	}
	return a, err
}
