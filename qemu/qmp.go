package qemu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// MaxMessage is the largest QMP message accepted, in bytes. The longest reply this package asks
// for, all processors' registers, has 3 KiB for each.
const MaxMessage = 256 << 10

// maxPending is the largest number of commands without an answer; QEMU itself holds back
// reading beyond 8.
const maxPending = 64

// ErrQMP says that the peer broke the QMP protocol (QEMU docs/interop/qmp-spec).
var ErrQMP = errors.New("qmp: bad message")

// ErrQMPClosed says that the QMP connection ended before the command was answered.
var ErrQMPClosed = errors.New("qmp: connection closed")

// A CommandError is QEMU's refusal of one command.
type CommandError struct {
	Command string // what was asked
	Class   string // GenericError, CommandNotFound, DeviceNotActive, DeviceNotFound
	Desc    string // for people
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("qmp: %s refused: %s (%s)", e.Command, e.Desc, e.Class)
}

// An Event is something that QEMU tells unasked.
type Event struct {
	Name string          // SHUTDOWN, STOP, …
	Data json.RawMessage // an object, or nil
	Time time.Time       // QEMU's clock
}

// A Client speaks QMP. Commands may be sent by any number of goroutines at once; answers are
// matched by id. It owns one goroutine, which ends with the connection.
type Client struct {
	rw      io.ReadWriteCloser
	onEvent func(Event)

	done chan struct{} // closed when the reader ends; err is set before
	err  error

	write sync.Mutex // held over one message

	mu      sync.Mutex // after write
	next    uint64
	pending map[uint64]chan reply // buffered: the reader never blocks
}

type reply struct {
	value json.RawMessage
	err   *CommandError
}

// A message is anything QEMU sends (qmp-spec §2.3–2.5).
type message struct {
	Greeting  *json.RawMessage `json:"QMP"`
	Return    json.RawMessage  `json:"return"`
	Error     *wireError       `json:"error"`
	ID        *uint64          `json:"id"`
	Event     string           `json:"event"`
	Data      json.RawMessage  `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

type wireError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

// parseMessage checks one line. Exactly one of greeting, event, return, error is present.
func parseMessage(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		var syn *json.SyntaxError
		if errors.As(err, &syn) {
			return message{}, fmt.Errorf("%w at offset %d: %w", ErrQMP, syn.Offset, err)
		}
		return message{}, fmt.Errorf("%w: %w", ErrQMP, err)
	}
	kinds := 0
	for _, present := range []bool{m.Greeting != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if present {
			kinds++
		}
	}
	if kinds != 1 {
		return message{}, fmt.Errorf("%w: %d of greeting, event, return and error, want one", ErrQMP, kinds)
	}
	return m, nil
}

// NewClient takes over rw, waits for the greeting and negotiates capabilities. onEvent (nil:
// events are dropped) is called on the reader's goroutine, in order: it must neither block nor
// call Execute. ctx bounds the negotiation only.
func NewClient(ctx context.Context, rw io.ReadWriteCloser, onEvent func(Event)) (*Client, error) {
	if onEvent == nil {
		onEvent = func(Event) {}
	}
	c := &Client{rw: rw, onEvent: onEvent, done: make(chan struct{}), pending: map[uint64]chan reply{}}
	greeted := make(chan struct{})
	go c.read(greeted)
	select {
	case <-greeted:
	case <-c.done:
		return nil, fmt.Errorf("qmp greeting: %w", c.err)
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("qmp greeting: %w", context.Cause(ctx)), c.Close())
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("qmp negotiation: %w", err), c.Close())
	}
	return c, nil
}

// read owns the reading side.
func (c *Client) read(greeted chan struct{}) {
	defer close(c.done)
	r := bufio.NewReaderSize(c.rw, 4096)
	open := false
	for {
		line, err := readLine(r)
		if err != nil {
			c.err = err
			return
		}
		if len(line) == 0 {
			continue
		}
		m, err := parseMessage(line)
		switch {
		case err != nil:
		case !open && m.Greeting == nil:
			err = fmt.Errorf("%w: no greeting", ErrQMP)
		case !open:
			open = true
			close(greeted)
		case m.Greeting != nil:
			err = fmt.Errorf("%w: a second greeting", ErrQMP)
		case m.Event != "":
			c.onEvent(Event{m.Event, m.Data, time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)})
		default:
			err = c.answer(m)
		}
		if err != nil {
			c.err = err
			// A peer that broke the protocol is not heard again; its own side must see that.
			_ = c.rw.Close()
			return
		}
	}
}

// readLine reads up to a newline, at most MaxMessage bytes, and drops the line end.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > MaxMessage {
			return nil, fmt.Errorf("%w: longer than %d bytes", ErrQMP, MaxMessage)
		}
		line = append(line, part...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrQMPClosed, err)
		}
		return bytes.TrimRight(line, "\r\n"), nil
	}
}

func (c *Client) answer(m message) error {
	if m.ID == nil {
		if m.Error != nil {
			return fmt.Errorf("%w: error without id: %s", ErrQMP, m.Error.Desc)
		}
		return fmt.Errorf("%w: answer without id", ErrQMP)
	}
	c.mu.Lock()
	ch, ok := c.pending[*m.ID]
	delete(c.pending, *m.ID)
	c.mu.Unlock()
	if !ok {
		return fmt.Errorf("%w: answer to unknown id %d", ErrQMP, *m.ID)
	}
	r := reply{value: m.Return}
	if m.Error != nil {
		r.err = &CommandError{Class: m.Error.Class, Desc: m.Error.Desc}
	}
	ch <- r
	return nil
}

// Execute sends a command and waits for its answer, which is stored in result unless nil.
// args is nil or marshals to an object. A refusal is a *[CommandError]; the end of the
// connection is [ErrQMPClosed]. A command whose ctx ends may still be carried out.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	p, err := c.begin(command, args)
	if err != nil {
		return err
	}
	return p.wait(ctx, result)
}

// pending is a command that was sent, or primed.
type pending struct {
	c       *Client
	command string
	id      uint64
	answer  <-chan reply
}

// begin sends a command.
func (c *Client) begin(command string, args any) (*pending, error) {
	p, err := c.prime(command, args)
	if err != nil {
		return nil, err
	}
	return p, p.fire()
}

// prime sends a command but for its end, and nothing else is sent over the connection before that is. QEMU reads QMP byte by byte,
// which takes it longer than to stop a guest: what is primed it carries out at once.
func (c *Client) prime(command string, args any) (*pending, error) {
	ch := make(chan reply, 1)
	c.mu.Lock()
	if len(c.pending) >= maxPending {
		c.mu.Unlock()
		return nil, fmt.Errorf("qmp: %s: %d commands are unanswered", command, maxPending)
	}
	c.next++
	id := c.next
	c.pending[id] = ch
	c.mu.Unlock()

	line, err := json.Marshal(request{command, args, id})
	if err != nil {
		c.forget(id)
		return nil, fmt.Errorf("qmp: arguments of %s: %w", command, err)
	}
	p := &pending{c: c, command: command, id: id, answer: ch}
	c.write.Lock()
	if err := p.write(line[:len(line)-1]); err != nil {
		c.write.Unlock()
		return nil, err
	}
	return p, nil
}

// fire sends the end of a command that was primed.
func (p *pending) fire() error {
	defer p.c.write.Unlock()
	return p.write([]byte("}\n"))
}

func (p *pending) write(b []byte) error {
	if _, err := p.c.rw.Write(b); err != nil {
		p.c.forget(p.id)
		return fmt.Errorf("%w: %s: %w", ErrQMPClosed, p.command, err)
	}
	return nil
}

// wait waits for the answer.
func (p *pending) wait(ctx context.Context, result any) error {
	select {
	case r := <-p.answer:
		return finish(p.command, r, result)
	case <-ctx.Done():
		return fmt.Errorf("qmp: %s: %w", p.command, context.Cause(ctx))
	case <-p.c.done:
		select {
		case r := <-p.answer: // it came before the end
			return finish(p.command, r, result)
		default:
			return fmt.Errorf("qmp: %s: %w", p.command, p.c.err)
		}
	}
}

func finish(command string, r reply, result any) error {
	if r.err != nil {
		r.err.Command = command
		return r.err
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.value, result); err != nil {
		return fmt.Errorf("%w: answer to %s: %w", ErrQMP, command, err)
	}
	return nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	delete(c.pending, id)
	c.mu.Unlock()
}

// Done is closed when the connection ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is the reason Done was closed, nil before. A peer that hung up is [ErrQMPClosed].
func (c *Client) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Close ends the connection and waits for the reader; unanswered commands fail. It must not be
// called by onEvent.
func (c *Client) Close() error {
	err := c.rw.Close()
	<-c.done
	return err
}
