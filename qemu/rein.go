package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
)

// A rein stops and continues the guest. It has two QMP connections of its own, over which the next command is always primed: what
// is left to do while the guest stands still is not the reading of commands.
type rein struct {
	hold *Client // stop, cont
	look *Client // info registers

	mu        sync.Mutex
	stopped   bool
	next      *pending // of hold: cont where stopped, else stop
	registers *pending // of look; nil: not primed
}

// newRein takes both connections over.
func newRein(ctx context.Context, hold, look *os.File) (r *rein, err error) {
	r = &rein{}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	for _, c := range []struct {
		to **Client
		of *os.File
	}{{&r.hold, hold}, {&r.look, look}} {
		conn, err := streamConn(c.of)
		if err != nil {
			return r, err
		}
		if *c.to, err = NewClient(ctx, conn, nil); err != nil {
			return r, err
		}
	}
	return r, r.prime()
}

func (r *rein) close() error {
	var errs []error
	for _, c := range []*Client{r.hold, r.look} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// prime primes what comes next. r.mu is held, or nobody else has r yet.
func (r *rein) prime() (err error) {
	command := "stop"
	if r.stopped {
		command = "cont"
	}
	if r.next, err = r.hold.prime(command, nil); err != nil || r.stopped {
		return err // the registers are read while others are waited for, and not primed then
	}
	return r.primeRegisters()
}

func (r *rein) primeRegisters() (err error) {
	if r.registers == nil {
		// QMP itself has no command that tells registers.
		r.registers, err = r.look.prime("human-monitor-command", map[string]string{"command-line": "info registers -a"})
	}
	return err
}

// turn stops the guest or lets it go on. One that does so already is left alone.
func (r *rein) turn(ctx context.Context, stop bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped == stop {
		return nil
	}
	if err := r.next.fire(); err != nil {
		return err
	}
	if err := r.next.wait(ctx, nil); err != nil {
		var refused *CommandError
		if errors.As(err, &refused) {
			err = errors.Join(err, r.prime())
		}
		return err // else it is not known what QEMU does, and the connection is good for nothing more
	}
	r.stopped = stop
	return r.prime()
}

// tellRegisters returns what QEMU tells of its processors' registers.
func (r *rein) tellRegisters(ctx context.Context) (text string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.primeRegisters(); err != nil {
		return "", err
	}
	p := r.registers
	r.registers = nil
	if err := p.fire(); err != nil {
		return "", err
	}
	if err := p.wait(ctx, &text); err != nil {
		return "", fmt.Errorf("info registers: %w", err)
	}
	return text, nil
}
