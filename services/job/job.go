// Package job runs processes of services that do one thing for one guest and leave: each is started, asked, and gone when
// its answer is there or its time is up.
package job

import (
	"context"
	"errors"
	"fmt"
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
}

// ErrDied says that a process ended before it answered, or took too long.
var ErrDied = errors.New("it ended before it answered")

// Run starts a process and asks it. When it returns the process is gone.
func (r *Runner) Run(ctx context.Context, guest string, ask func(context.Context, *rpc.Peer) error) (err error) {
	p, err := r.Start(guest)
	if err != nil {
		return fmt.Errorf("%s: %w", r.Service, err)
	}
	is := audit.NewInstance(r.Service, p.PID())
	peer := rpc.New(p.Control, calls.Watched(r.Journal, r.Service, guest, func(_ context.Context, q *rpc.Request) (any, error) {
		ipc.CloseAll(q.Files)
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from %s", q.Method, r.Service)
	}))
	heard := make(chan struct{})
	go func() { // ends with the process
		defer close(heard)
		_ = peer.Run(context.Background())
	}()
	defer func() {
		// Once it has answered it leaves; it may not stay, either.
		stop, cancel := context.WithTimeout(context.Background(), r.Limit)
		defer cancel()
		if err != nil {
			p.Kill()
		}
		select {
		case <-p.Done():
		case <-stop.Done():
			p.Kill()
			<-p.Done()
		}
		<-heard
		r.Journal.Note(r.Journal.Ended(is, p.Err(), []string{guest}))
	}()
	if err := r.Journal.Record(r.Journal.Started(is, append([]string{"guest", guest}, r.Detail...)...), r.Journal.Linked(guest, is)); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, r.Limit)
	defer cancel()
	err = ask(limited, peer)
	if err != nil && (errors.Is(err, rpc.ErrGone) || limited.Err() != nil && ctx.Err() == nil) {
		err = fmt.Errorf("%s: %w: %w", r.Service, ErrDied, err)
	}
	return err
}
