// Package rpc is calls and notices between two of Redoubt's processes, over one ipc.Conn.
//
// Both ends may call. A call has one answer or one error; a notice has none. Messages are
// JSON of at most ipc.MaxMessage bytes, descriptors travel beside calls and answers. An error keeps its
// kind across the socket (see [Error]). When the peer goes, every open call fails with
// [ErrGone] and Run returns.
package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"redoubt.dev/redoubt/ipc"
)

// ErrGone says that the peer is gone; the call may or may not have been carried out.
var ErrGone = errors.New("the service at the other end is gone")

// Kind classifies an error so that it survives a socket.
type Kind string

const (
	Invalid     Kind = "invalid"     // the request is wrong; asking again does not help
	NotFound    Kind = "not-found"   // what it names does not exist
	Exists      Kind = "exists"      // what it would make exists already
	Refused     Kind = "refused"     // the caller may not
	Unavailable Kind = "unavailable" // cannot be done now or here
	Internal    Kind = "internal"    // everything else
)

// Error is a failure with its kind: one line for the user.
type Error struct {
	Kind Kind   `json:"kind"`
	Text string `json:"text"`
}

func (e *Error) Error() string { return e.Text }

// Errorf makes an Error.
func Errorf(k Kind, format string, args ...any) error { return &Error{k, fmt.Sprintf(format, args...)} }

// KindOf is the kind of err, Internal where it has none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}

type frame struct {
	ID     uint64          `json:"id,omitempty"`     // of a call and its answer; 0: a notice
	Method string          `json:"method,omitempty"` // "" in an answer
	Body   json.RawMessage `json:"body,omitempty"`
	Err    *Error          `json:"err,omitempty"`
}

// A Request is what a handler gets. Files are the handler's to close.
type Request struct {
	Method string
	body   json.RawMessage
	Files  []*os.File
}

// Decode reads the request's body into v.
func (r *Request) Decode(v any) error {
	if err := json.Unmarshal(r.body, v); err != nil {
		return Errorf(Invalid, "%s: body: %v", r.Method, err)
	}
	return nil
}

// Answer decodes a request's body and has it answered, or taken if it is a notice.
func Answer[T any](r *Request, f func(T) (any, error)) (any, error) {
	var in T
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	return f(in)
}

// A Handler answers one call or takes one notice. It may return a value with descriptors
// through [WithFiles]. Handlers run concurrently, one goroutine a call; notices are handled
// one after another, in order, before later messages.
type Handler func(ctx context.Context, r *Request) (any, error)

// WithFiles is a handler's result with descriptors, closed once sent.
type WithFiles struct {
	Value any
	Files []*os.File
}

// maxCalls bounds the calls one peer may have open.
const maxCalls = 64

// Peer is one end.
type Peer struct {
	c       *ipc.Conn
	handler Handler

	mu     sync.Mutex
	next   uint64
	calls  map[uint64]chan answer
	closed bool

	draining atomic.Bool
	gone     func()
	sending  sync.Mutex    // over one message's way out where that is bounded
	room     time.Duration // see Bound
}

type answer struct {
	f     frame
	files []*os.File
}

// New makes a peer; Run must be called for anything to be received. A nil handler refuses
// every call.
func New(c *ipc.Conn, h Handler) *Peer {
	if h == nil {
		h = func(_ context.Context, r *Request) (any, error) {
			return nil, Errorf(Refused, "%s: not served here", r.Method)
		}
	}
	return &Peer{c: c, handler: h, calls: map[uint64]chan answer{}}
}

// Gone is a peer that is gone: every call fails with [ErrGone].
func Gone() *Peer { return &Peer{closed: true} }

// Follow makes the peer the next one in a connection whose last one died: generation, from 1 on, tells
// their calls apart. It must be called before Run and any Call.
func (p *Peer) Follow(generation uint64) { p.next = generation << 32 }

// OnGone has f called when the other end is gone, before anything here follows from that. It must be called
// before Run.
func (p *Peer) OnGone(f func()) { p.gone = f }

// Bound ends the connection when the other end makes no room for a message for so long: one that does not read keeps
// nobody waiting for ever. It must be called before Run and any Call.
func (p *Peer) Bound(limit time.Duration) { p.room = limit }

// Run receives until the peer is gone or ctx ends, waits for its handlers, and closes the
// connection. It returns nil when the peer went in an orderly way.
func (p *Peer) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { p.c.Close() })
	var handlers sync.WaitGroup
	defer func() {
		if p.draining.Load() && stop() {
			cancel()
			handlers.Wait() // their answers still go out
		}
		cancel()
		stop()
		p.c.Close()
		p.fail()
		handlers.Wait()
	}()
	slots := make(chan struct{}, maxCalls)
	for {
		msg, files, err := p.c.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) && p.gone != nil {
				p.gone()
			}
			if ctx.Err() != nil || p.draining.Load() || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		var f frame
		if err := json.Unmarshal(msg, &f); err != nil {
			closeAll(files)
			return fmt.Errorf("rpc: bad frame: %w", err)
		}
		switch {
		case f.Method == "":
			p.deliver(f, files)
		case f.ID == 0:
			closeAll(files) // a notice has none
			_, _ = p.handler(ctx, &Request{f.Method, f.Body, nil})
		default:
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				closeAll(files)
				return nil
			}
			handlers.Go(func() {
				defer func() { <-slots }()
				p.answer(ctx, f, files)
			})
		}
	}
}

func (p *Peer) answer(ctx context.Context, f frame, files []*os.File) {
	v, err := p.handler(ctx, &Request{f.Method, f.Body, files})
	out := frame{ID: f.ID}
	var give []*os.File
	if w, ok := v.(WithFiles); ok {
		v, give = w.Value, w.Files
	}
	defer closeAll(give)
	if err == nil && v != nil {
		out.Body, err = json.Marshal(v)
	}
	if err != nil {
		out.Body = nil
		out.Err = &Error{KindOf(err), err.Error()}
		give = nil
	}
	if err := p.send(out, give); err != nil && errors.Is(err, ipc.ErrTooLarge) {
		_ = p.send(frame{ID: f.ID, Err: &Error{Internal, f.Method + ": answer too large"}}, nil)
	}
}

func (p *Peer) send(f frame, files []*os.File) error {
	if p.c == nil {
		return ErrGone
	}
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if p.room == 0 {
		return p.c.Send(b, files...)
	}
	p.sending.Lock()
	defer p.sending.Unlock()
	if err := p.c.SetWriteDeadline(time.Now().Add(p.room)); err != nil {
		return err
	}
	err = p.c.Send(b, files...)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.c.Close() // Run returns
	}
	return err
}

func (p *Peer) deliver(f frame, files []*os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ch := p.calls[f.ID]
	if ch == nil { // given up, or never asked
		closeAll(files)
		return
	}
	delete(p.calls, f.ID)
	ch <- answer{f, files} // has room for its one answer
}

func (p *Peer) fail() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for id, ch := range p.calls {
		delete(p.calls, id)
		close(ch)
	}
}

// Call asks the peer and decodes its answer into out (nil: not wanted). Files stay the
// caller's. Descriptors of the answer, if any, are returned and the caller's.
func (p *Peer) Call(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	ch := make(chan answer, 1)
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", method, ErrGone)
	}
	p.next++
	id := p.next
	p.calls[id] = ch
	p.mu.Unlock()
	if err := p.send(frame{ID: id, Method: method, Body: body}, files); err != nil {
		p.forget(id)
		if errors.Is(err, ipc.ErrTooLarge) || errors.Is(err, os.ErrClosed) { // of a file, not of the connection
			return nil, fmt.Errorf("%s: %w", method, err)
		}
		return nil, fmt.Errorf("%s: %w", method, ErrGone)
	}
	select {
	case a, ok := <-ch:
		if !ok {
			return nil, fmt.Errorf("%s: %w", method, ErrGone)
		}
		if a.f.Err != nil {
			closeAll(a.files)
			return nil, a.f.Err
		}
		if out != nil {
			if err := json.Unmarshal(a.f.Body, out); err != nil {
				closeAll(a.files)
				return nil, fmt.Errorf("%s: answer: %w", method, err)
			}
		}
		return a.files, nil
	case <-ctx.Done():
		p.forget(id)
		select {
		case a := <-ch: // the answer came at the same moment
			closeAll(a.files)
		default:
		}
		return nil, fmt.Errorf("%s: %w", method, ctx.Err())
	}
}

func (p *Peer) forget(id uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.calls, id)
}

// Notify sends a notice, which has no descriptors.
func (p *Peer) Notify(method string, in any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	return p.send(frame{Method: method, Body: body}, nil)
}

// Drain makes Run take nothing more, let the handlers under way end and their answers go out,
// and return. The handlers' context ends at once.
func (p *Peer) Drain() {
	p.draining.Store(true)
	// Run's receive comes back; where the connection is gone already, so does Run.
	_ = p.c.SetReadDeadline(time.Unix(1, 0))
}

// Close ends the connection; Run returns.
func (p *Peer) Close() error {
	if p.c == nil {
		return nil
	}
	return p.c.Close()
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
