// Package keeper keeps one process of a service running, beneath all who use it: it starts it, starts
// another one when it has died, replaces one that runs well, now or on a timer, and has each start
// and end in the audit log. The process may die at any moment.
//
// A process is in force once [Options.Ready] has told it all that it must know; what was told to one
// is told to the next by Ready, too. Whoever asks the service does so through [Keeper.Call] or
// [Keeper.Serve]: where the process is lost over the call, the call is made again to the next one, so
// it may be carried out twice.
//
// A service that dies more than [storm.MaxDeaths] times within [storm.DeathWindow] is given up: it is not the
// accident that replacing is for. So is one that cannot be started, or says itself that it cannot
// serve.
//
// One lock is over all changes, and over whatever its user keeps beneath it, too ([Keeper.Lock]).
// The functions of [Options] are called with the lock held, Handler's handlers without. A notice must
// take no lock that is held over a call whose answer comes behind it: so none may take this one.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/storm"
)

// ErrSick says of a call to a process that this one is of no more use, though it lives: it is replaced.
var ErrSick = errors.New("it does not serve")

// errEnding is what is answered after Close.
var errEnding = rpc.Errorf(rpc.Unavailable, "Redoubt is going down")

// lastWords is how long a process that nobody can ask any more may take to end by itself, with its
// reason, before it is killed.
const lastWords = 2 * time.Second

// Room is how long a process may leave no room for what it is told: one that does not read is as good as gone.
const Room = 10 * time.Second

// A Process is what is kept: *process.Process.
type Process interface {
	PID() int
	Conn() *ipc.Conn                // the control connection
	Done() <-chan struct{}          // closed when it has ended
	Err() error                     // how, once Done is closed
	Kill()                          // ends it at once
	Stop(ctx context.Context) error // asks it to end, and waits; kills it when ctx ends
}

// Options of a Keeper. Those without a remark may be left out.
type Options struct {
	Service string         // as the audit log names it; required
	About   string         // whose it is, for messages
	Log     *slog.Logger   // required
	Journal *audit.Journal // nil: nothing is recorded

	Start   func() (Process, error)                // required
	Handler func(*Instance) rpc.Handler            // serves what it says; required
	Ready   func(context.Context, *Instance) error // tells it what it must know; required

	Detail []string                      // names and values for the record of a start
	Record func(*Instance) []audit.Entry // what is recorded with a start
	Guests func() []string               // those that depend on it, for the record of an end
	Ended  func(*Instance)               // is told of each end, before another one is started
	Lost   func(error)                   // is told that it was given up

	Wanted  func() bool   // another one is needed after a death; else it is started by the next use
	Idle    func() bool   // a reset would be of no use now
	Settle  func()        // waits, without the lock, until a reset is welcome
	Overlap bool          // at a reset the next process is started before the last one ends
	Drain   time.Duration // how long the last one may then take to end; required
	Every   time.Duration // how often it is reset; 0: never by itself
	Final   bool          // given up, it stays so; else the next use starts it again
	Deaths  int           // in place of storm.MaxDeaths
}

// A Keeper keeps one process. The end is Close's.
type Keeper struct {
	o      Options
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	lock   chan struct{} // full while it is held; it is over what follows
	now    *Instance     // in force; nil while there is none
	number uint64        // of the last
	deaths storm.Deaths
	failed error // why there will be no other
	ending bool

	posts   sync.Mutex // taken for moments only; over what follows
	posted  []func(*Instance)
	posting bool // somebody calls them
	closed  bool
}

// An Instance is one process.
type Instance struct {
	Process
	Peer   *rpc.Peer
	Number uint64         // they are counted from 1 on
	Name   audit.Instance // in the audit log

	heard    chan struct{}
	stopping atomic.Bool
}

// Heard is closed when all that it said was taken in; some time after Done.
func (i *Instance) Heard() <-chan struct{} { return i.heard }

// New makes a Keeper. Nothing is started yet.
func New(o Options) *Keeper {
	k := &Keeper{o: o, lock: make(chan struct{}, 1)}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	if o.Deaths == 0 {
		k.o.Deaths = storm.MaxDeaths
	}
	if o.Every > 0 {
		k.wg.Go(k.resets)
	}
	return k
}

// resets is the timer.
func (k *Keeper) resets() {
	t := time.NewTicker(k.o.Every)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			k.Reset()
		case <-k.ctx.Done():
			return
		}
	}
}

// Lock takes the lock.
func (k *Keeper) Lock() { k.lock <- struct{}{} }

// Unlock gives it back.
func (k *Keeper) Unlock() { <-k.lock }

// lockFor takes the lock unless ctx ends before.
func (k *Keeper) lockFor(ctx context.Context) error {
	select {
	case k.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", k.o.Service, ctx.Err())
	}
}

// Now is the process in force, nil for none. The lock is held.
func (k *Keeper) Now() *Instance { return k.now }

// Ending says that Close was called. The lock is held.
func (k *Keeper) Ending() bool { return k.ending }

// Begin starts the process, if there is none. The lock is held.
func (k *Keeper) Begin(ctx context.Context) error {
	if k.now != nil {
		return nil
	}
	return k.begin(ctx, nil)
}

// Current is the process in force, or the next one to be. The lock is not held.
func (k *Keeper) Current(ctx context.Context) (*Instance, error) {
	if err := k.lockFor(ctx); err != nil {
		return nil, err
	}
	defer k.Unlock()
	if err := k.Begin(k.ctx); err != nil {
		return nil, err
	}
	return k.now, nil
}

// Call has f make its calls to the process in force, and again to the next one where f's error says
// that this one is gone. The lock is not held: any number of calls go on at once.
func (k *Keeper) Call(ctx context.Context, f func(*Instance) error) error {
	for {
		i, err := k.Current(ctx)
		if err != nil {
			return err
		}
		if err = f(i); !errors.Is(err, rpc.ErrGone) {
			return err
		}
		if err := k.lockFor(ctx); err != nil {
			return err
		}
		if k.now == i {
			lose(i, err)
			_ = k.replace(i, err) // the next use tells
		}
		k.Unlock()
	}
}

// Serve is Call with the lock held all the time. A process that lets f's time run out is lost, too.
func (k *Keeper) Serve(f func(*Instance) error) error {
	for {
		if err := k.Begin(k.ctx); err != nil {
			return err
		}
		i := k.now
		err := f(i)
		if !lost(err) {
			return err
		}
		lose(i, err)
		if err := k.replace(i, err); err != nil {
			return err
		}
	}
}

// maxPosts bounds what waits to be told.
const maxPosts = 1024

// Post has f called with the process in force, nil for none, with the lock held, after what was posted before, and does not
// wait for that. It does nothing after Close, nor where too much waits already, unless it must be.
func (k *Keeper) Post(must bool, f func(*Instance)) {
	k.posts.Lock()
	defer k.posts.Unlock()
	if k.closed || len(k.posted) >= maxPosts && !must {
		return
	}
	k.posted = append(k.posted, f)
	if !k.posting {
		k.posting = true
		k.wg.Go(k.post)
	}
}

// post calls what was posted until nothing is left.
func (k *Keeper) post() {
	for {
		k.Lock()
		more := k.postNext()
		k.Unlock()
		if !more {
			return
		}
	}
}

// postNext calls what was posted first. The lock is held.
func (k *Keeper) postNext() bool {
	k.posts.Lock()
	if len(k.posted) == 0 {
		k.posting = false
		k.posts.Unlock()
		return false
	}
	f := k.posted[0]
	k.posted = k.posted[1:]
	k.posts.Unlock()
	f(k.now)
	return true
}

// Reset replaces a process that runs well, and reports whether it did. The lock is not held.
func (k *Keeper) Reset() bool {
	if k.o.Settle != nil {
		k.o.Settle()
	}
	k.Lock()
	defer k.Unlock()
	if k.ending || k.now == nil || k.o.Idle != nil && k.o.Idle() {
		return false
	}
	if err := k.o.Journal.Failed(); err != nil { // the next one's start could not be recorded
		k.o.Log.Warn("service is not replaced", k.about(err)...)
		return false
	}
	var next *Instance
	if k.o.Overlap {
		var err error
		if next, err = k.spawn(); err != nil {
			k.o.Log.Warn("service is not replaced", k.about(err)...)
			return false
		}
	}
	last := k.now
	k.now = nil
	k.stop(last, k.o.Drain)
	return k.begin(k.ctx, next) == nil
}

// Close ends the process, which has the grace to do so in order, and all that the Keeper began. The
// lock is not held.
func (k *Keeper) Close(grace time.Duration) {
	k.cancel() // whoever holds the lock and waits for answers gives up
	k.Lock()
	k.posts.Lock()
	k.closed = true
	k.posts.Unlock()
	for k.postNext() {
	}
	k.ending = true
	last := k.now
	k.now = nil
	k.Unlock()
	if last != nil {
		k.end(last, grace)
		k.Lock()
		k.ended(last)
		k.Unlock()
	}
	k.wg.Wait()
}

// spawn starts a process, which is not in force yet. The lock is held.
func (k *Keeper) spawn() (*Instance, error) {
	p, err := k.o.Start()
	if err != nil {
		return nil, err
	}
	k.number++
	i := &Instance{Process: p, Number: k.number, Name: audit.NewInstance(k.o.Service, p.PID()), heard: make(chan struct{})}
	i.Peer = rpc.New(p.Conn(), k.o.Handler(i))
	i.Peer.Bound(Room)
	k.wg.Go(func() {
		defer close(i.heard)
		if err := i.Peer.Run(context.Background()); err != nil {
			k.o.Log.Error("service", k.about(err)...)
		}
	})
	k.wg.Go(func() { k.follow(i) })
	entries := []audit.Entry{k.o.Journal.Started(i.Name, k.o.Detail...)}
	if k.o.Record != nil {
		entries = append(entries, k.o.Record(i)...)
	}
	if err := k.o.Journal.Record(entries...); err != nil {
		i.Kill()
		<-i.Done()
		return nil, err
	}
	return i, nil
}

// follow waits for a process's end, and has it replaced if it was in force.
func (k *Keeper) follow(i *Instance) {
	select {
	case <-i.Done():
	case <-i.heard:
		if !i.stopping.Load() {
			lose(i, rpc.ErrGone)
		}
		<-i.Done()
	}
	_ = i.Peer.Close()
	k.Lock()
	defer k.Unlock()
	if k.now == i {
		_ = k.replace(i, nil)
	}
}

// begin makes next, or where that is nil a new process, the one in force, or one after it if that
// dies. The lock is held, and none is in force.
func (k *Keeper) begin(ctx context.Context, next *Instance) (err error) {
	for {
		switch {
		case k.failed != nil:
			err = k.failed
		case k.ctx.Err() != nil:
			err = errEnding
		case next == nil:
			if next, err = k.spawn(); err != nil {
				return k.giveUp(err)
			}
		}
		if err != nil {
			if next != nil {
				k.stop(next, 0)
			}
			return err
		}
		if err = k.o.Ready(ctx, next); err == nil {
			k.now = next
			return nil
		}
		lose(next, err)
		if dead := next.Err(); errors.Is(err, rpc.ErrGone) && dead != nil {
			err = fmt.Errorf("%w: %w", dead, rpc.ErrGone)
		}
		k.ended(next)
		if !lost(err) || ctx.Err() != nil {
			return k.giveUp(err)
		}
		if k.deaths.Add(time.Now(), k.o.Deaths) {
			return k.storm(err)
		}
		k.o.Log.Warn("service is started again", k.about(err)...)
		next, err = nil, nil
	}
}

// replace follows the end of the process that was in force. The lock is held; nil: another one is.
func (k *Keeper) replace(dead *Instance, err error) error {
	k.now = nil
	k.ended(dead)
	if died := dead.Err(); died != nil {
		err = died
	}
	if err == nil {
		err = errors.New("it ended without a word")
	}
	if k.ending || k.o.Wanted != nil && !k.o.Wanted() {
		return err
	}
	if k.deaths.Add(time.Now(), k.o.Deaths) {
		return k.storm(err)
	}
	k.o.Log.Warn("service is replaced", k.about(err)...)
	return k.begin(k.ctx, nil)
}

func (k *Keeper) storm(err error) error {
	return k.giveUp(fmt.Errorf("%s dies again and again: %w", k.o.Service, err))
}

func (k *Keeper) giveUp(err error) error {
	if k.ctx.Err() != nil {
		return err
	}
	k.o.Log.Error("service is given up", k.about(err)...)
	if k.o.Final {
		k.failed = err
	}
	if k.o.Lost != nil {
		k.o.Lost(err)
	}
	return err
}

func (k *Keeper) stop(i *Instance, limit time.Duration) {
	k.end(i, limit)
	k.ended(i)
}

// end ends a process in order, within a limit.
func (k *Keeper) end(i *Instance, limit time.Duration) {
	i.stopping.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := i.Stop(ctx); err != nil {
		k.o.Log.Warn("service ended badly", k.about(err)...)
	}
}

// ended records an end.
func (k *Keeper) ended(i *Instance) {
	var guests []string
	if k.o.Guests != nil {
		guests = k.o.Guests()
	}
	k.o.Journal.Note(k.o.Journal.Ended(i.Name, i.Err(), guests))
	if k.o.Ended != nil {
		k.o.Ended(i)
	}
}

func (k *Keeper) about(err error) []any {
	all := []any{"service", k.o.Service, "err", err}
	if k.o.About != "" {
		all = append(all, "of", k.o.About)
	}
	return all
}

// lose ends a process of which err says that it is of no use; one that is gone already says why.
func lose(i *Instance, err error) {
	if errors.Is(err, rpc.ErrGone) {
		t := time.AfterFunc(lastWords, i.Kill)
		<-i.Done()
		t.Stop()
		return
	}
	i.Kill()
	<-i.Done()
}

// lost says of a call's error that the process is gone or sick. What it answers, it answers well.
func lost(err error) bool {
	return errors.Is(err, rpc.ErrGone) || errors.Is(err, ErrSick) || errors.Is(err, context.DeadlineExceeded)
}
