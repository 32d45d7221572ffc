// Package job runs processes of services that do one thing for one guest and leave: each is started, asked, and gone when
// its answer is there or its time is up.
package job

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/calls"
)

// A Runner runs the processes of one service. Each one's start and end is in the audit log, and so is what it asks for,
// which is always refused.
type Runner struct {
	Service string
	Journal *audit.Journal
	Start   func(guest string) (*process.Process, error)
	Limit   time.Duration // how long one may take to answer, then to leave
	Detail  []string      // of the record of its start
	// Spare is how long a process waits that was started for the next thing about the guest of the last one, which then need
	// not wait for its start, nor for the last one's end; 0: none does. Whoever sets it owes a Close.
	Spare time.Duration

	work   sync.WaitGroup // what is done for no caller
	mu     sync.Mutex
	spares map[string]*spare // by guest
	closed bool
}

// ErrDied says that a process ended before it answered, or took too long.
var ErrDied = errors.New("it ended before it answered")

// Run asks a process. When it returns the process is gone; with Spare it may still be leaving, and another one wait.
func (r *Runner) Run(ctx context.Context, guest string, ask func(context.Context, *rpc.Peer) error) (err error) {
	p, err := r.take(guest)
	if err != nil {
		return err
	}
	defer func() {
		if r.Spare == 0 {
			p.end(err != nil)
			return
		}
		kill := err != nil
		r.work.Go(func() { p.end(kill) })
	}()
	r.renew(guest)
	limited, cancel := context.WithTimeout(ctx, r.Limit)
	defer cancel()
	err = ask(limited, p.peer)
	if err != nil && (errors.Is(err, rpc.ErrGone) || limited.Err() != nil && ctx.Err() == nil) {
		err = fmt.Errorf("%s: %w: %w", r.Service, ErrDied, err)
	}
	return err
}

// running is one process.
type running struct {
	*process.Process
	r     *Runner
	guest string
	is    audit.Instance
	peer  *rpc.Peer
	heard chan struct{} // closed when nothing more is heard of it
}

// start starts one, which whoever gets it ends.
func (r *Runner) start(guest string) (*running, error) {
	p, err := r.Start(guest)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.Service, err)
	}
	x := &running{Process: p, r: r, guest: guest, is: audit.NewInstance(r.Service, p.PID()), heard: make(chan struct{})}
	x.peer = rpc.New(p.Control, calls.Watched(r.Journal, r.Service, guest, func(_ context.Context, q *rpc.Request) (any, error) {
		ipc.CloseAll(q.Files)
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from %s", q.Method, r.Service)
	}))
	go func() { // ends with the process
		defer close(x.heard)
		_ = x.peer.Run(context.Background())
	}()
	if err := r.Journal.Record(r.Journal.Started(x.is, append([]string{"guest", guest}, r.Detail...)...), r.Journal.Linked(guest, x.is)); err != nil {
		x.end(true)
		return nil, err
	}
	return x, nil
}

// end waits until it has left, which it does once it has answered; it may not stay, either. One that has nothing to
// answer is killed.
func (x *running) end(kill bool) {
	stop, cancel := context.WithTimeout(context.Background(), x.r.Limit)
	defer cancel()
	if kill {
		x.Kill()
	}
	select {
	case <-x.Done():
	case <-stop.Done():
		x.Kill()
		<-x.Done()
	}
	<-x.heard
	x.r.Journal.Note(x.r.Journal.Ended(x.is, x.Err(), []string{x.guest}))
}
