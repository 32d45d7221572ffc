package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"redoubt.dev/redoubt/ipc"
)

// A rein stops and continues the guest, and tells its registers: each over a QMP connection of its own, on which that command is
// always primed. What is left to do while the guest stands still is not the reading of commands.
type rein struct {
	priming sync.WaitGroup
	mu      sync.Mutex
	stopped bool
	conns   [reinConns]primed
}

// Connections of a rein.
const (
	reinStop = iota
	reinCont
	reinLook
	reinConns
)

// A primed connection has its one command sent but for the end.
type primed struct {
	*Client
	command string
	args    any
	next    *pending // nil: it is not primed
}

// newRein takes the connections over.
func newRein(ctx context.Context, files [reinConns]*os.File) (r *rein, err error) {
	var clients [reinConns]*Client
	defer func() {
		if err != nil {
			for _, c := range clients {
				if c != nil {
					err = errors.Join(err, c.Close())
				}
			}
		}
	}()
	for i, f := range files {
		conn, err := ipc.Socket(f)
		if err != nil {
			return nil, err
		}
		if clients[i], err = NewClient(ctx, conn, nil); err != nil {
			return nil, err
		}
	}
	r = reinOf(clients)
	return r, r.prime()
}

func reinOf(clients [reinConns]*Client) *rein {
	return &rein{conns: [reinConns]primed{
		reinStop: {Client: clients[reinStop], command: "stop"},
		reinCont: {Client: clients[reinCont], command: "cont"},
		// QMP itself has no command that tells registers.
		reinLook: {Client: clients[reinLook], command: "human-monitor-command", args: map[string]string{"command-line": "info registers -a"}},
	}}
}

func (r *rein) close() error {
	var errs []error
	for i := range r.conns {
		errs = append(errs, r.conns[i].Close())
	}
	r.priming.Wait() // which fails now
	return errors.Join(errs...)
}

// prime primes what is not. r.mu is held, or nobody else has r yet.
func (r *rein) prime() error {
	for i := range r.conns {
		if err := r.conns[i].prime(); err != nil {
			return err
		}
	}
	return nil
}

func (p *primed) prime() (err error) {
	if p.next == nil {
		p.next, err = p.Client.prime(p.command, p.args)
	}
	return err
}

// do has the command carried out. It is not primed again, which would have QEMU read while the guest stands still.
func (p *primed) do(ctx context.Context, result any) error {
	if err := p.prime(); err != nil {
		return err
	}
	next := p.next
	p.next = nil
	if err := next.fire(); err != nil {
		return err
	}
	return next.wait(ctx, result)
}

// turn stops the guest or lets it go on. One that does so already is left alone.
func (r *rein) turn(ctx context.Context, stop bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped == stop {
		return nil
	}
	which := reinCont
	if stop {
		which = reinStop
	}
	if err := r.conns[which].do(ctx, nil); err != nil {
		return err
	}
	if r.stopped = stop; !stop {
		// The guest goes on: nobody waits for QEMU to read.
		r.priming.Go(func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			_ = r.prime() // what is not primed now is when it is used, and fails then
		})
	}
	return nil
}

// tellRegisters returns what QEMU tells of its processors' registers.
func (r *rein) tellRegisters(ctx context.Context) (text string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.conns[reinLook].do(ctx, &text); err != nil {
		return "", fmt.Errorf("info registers: %w", err)
	}
	return text, nil
}
