package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"

	"redoubt.dev/redoubt/services/storm"
)

// fake is a process that is none: a peer in this one, which ends at any moment.
type fake struct {
	ours, theirs *ipc.Conn
	pid          int
	killed       atomic.Bool
	deaf         bool // it does not end by itself
	done         chan struct{}
	end          chan struct{} // closed by Kill
	err          error
}

var errKilled = errors.New("signal: killed")

func (f *fake) PID() int              { return f.pid }
func (f *fake) Conn() *ipc.Conn       { return f.ours }
func (f *fake) Done() <-chan struct{} { return f.done }
func (f *fake) Err() error            { return f.err }
func (f *fake) Kill() {
	if f.killed.CompareAndSwap(false, true) {
		close(f.end)
	}
}

func (f *fake) Stop(ctx context.Context) error {
	f.ours.Close()
	select {
	case <-f.done:
	case <-ctx.Done():
		f.Kill()
		<-f.done
	}
	return f.err
}

// shop makes fakes that are kept, and counts.
type shop struct {
	*Keeper
	t       *testing.T
	dir     string
	answer  atomic.Pointer[func(*rpc.Request) (any, error)]
	started atomic.Int64
	live    atomic.Int64
	overlap atomic.Bool
	refuse  atomic.Pointer[error] // to be started
	last    atomic.Pointer[fake]
	lost    chan error
	ready   atomic.Pointer[func(context.Context, *Instance) error]
}

func open(t *testing.T, change func(*Options)) *shop {
	t.Helper()
	s := &shop{t: t, dir: t.TempDir(), lost: make(chan error, 8)}
	j, err := audit.OpenJournal(s.dir, audit.Actor{Service: "test"}, slog.New(slog.DiscardHandler), audit.Alive{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.Close)
	o := Options{
		Service: "shop", Log: slog.New(slog.DiscardHandler), Journal: j, Drain: time.Second,
		Start:   s.start,
		Handler: func(*Instance) rpc.Handler { return nil },
		Ready: func(ctx context.Context, i *Instance) error {
			if f := s.ready.Load(); f != nil {
				return (*f)(ctx, i)
			}
			_, err := i.Peer.Call(ctx, "configure", struct{}{}, nil)
			return err
		},
		Lost: func(err error) { s.lost <- err },
	}
	if change != nil {
		change(&o)
	}
	s.Keeper = New(o)
	t.Cleanup(func() {
		s.Close(time.Second)
		if n := s.live.Load(); n != 0 {
			t.Errorf("%d processes live", n)
		}
	})
	return s
}

func (s *shop) start() (Process, error) {
	if err := s.refuse.Load(); err != nil {
		return nil, *err
	}
	ours, theirs, err := ipc.Pipe()
	if err != nil {
		return nil, err
	}
	f := &fake{ours: ours, theirs: theirs, pid: int(s.started.Add(1)), done: make(chan struct{}), end: make(chan struct{})}
	if s.live.Add(1) > 1 {
		s.overlap.Store(true)
	}
	peer := rpc.New(theirs, func(_ context.Context, r *rpc.Request) (any, error) {
		if a := s.answer.Load(); a != nil {
			return (*a)(r)
		}
		return f.pid, nil
	})
	ran := make(chan struct{})
	go func() { defer close(ran); _ = peer.Run(context.Background()) }()
	go func() {
		select {
		case <-f.end:
			f.err = errKilled
		case <-ran:
			if f.deaf {
				<-f.end
				f.err = errKilled
			}
		}
		peer.Close()
		<-ran
		s.live.Add(-1)
		close(f.done)
	}()
	s.last.Store(f)
	return f, nil
}

// ask is a call of a user's.
func (s *shop) ask(ctx context.Context) (pid int, err error) {
	err = s.Call(ctx, func(i *Instance) error {
		_, err := i.Peer.Call(ctx, "ask", struct{}{}, &pid)
		return err
	})
	return pid, err
}

func (s *shop) begin() {
	s.t.Helper()
	s.Lock()
	defer s.Unlock()
	if err := s.Begin(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// TestKilledAtAnyMoment: every call is answered while the process is killed, also as it starts, and
// reset; each start in the log has its end; never do two live at once where that is not wanted.
func TestKilledAtAnyMoment(t *testing.T) {
	for name, overlap := range map[string]bool{"overlap": true, "one after another": false} {
		t.Run(name, func(t *testing.T) {
			s := open(t, func(o *Options) { o.Deaths, o.Overlap = 1<<30, overlap })
			s.begin()
			stop := make(chan struct{})
			var kills, resets, users sync.WaitGroup
			kills.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(rand.N(2 * time.Millisecond)):
						s.last.Load().Kill()
					}
				}
			})
			resets.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(rand.N(4 * time.Millisecond)):
						s.Reset()
					}
				}
			})
			for range 4 {
				users.Go(func() {
					for range 150 {
						if _, err := s.ask(t.Context()); err != nil {
							t.Error(err)
						}
						s.Lock()
						err := s.Serve(func(i *Instance) error {
							_, err := i.Peer.Call(t.Context(), "ask", struct{}{}, nil)
							return err
						})
						s.Unlock()
						if err != nil {
							t.Error(err)
						}
					}
				})
			}
			users.Wait()
			close(stop)
			kills.Wait()
			resets.Wait()
			s.Close(time.Second)
			if s.overlap.Load() && !overlap {
				t.Error("two processes at once")
			}
			open := map[string]bool{}
			for r, err := range audit.Records(filepath.Join(s.dir, audit.Dir)) {
				if err != nil {
					t.Fatal(err)
				}
				id := r.Detail[audit.DetailInstance]
				switch r.Act {
				case audit.ActInstanceStart:
					open[id] = true
				case audit.ActInstanceEnd:
					if !open[id] {
						t.Errorf("%s ends twice, or without a start", id)
					}
					delete(open, id)
				}
			}
			if len(open) != 0 {
				t.Errorf("%d starts without an end", len(open))
			}
			t.Logf("%d processes", s.started.Load())
		})
	}
}

// TestStorm: a service that dies again and again is given up, with the reason. Where that is final,
// nobody waits for it any more; else the next use starts it.
func TestStorm(t *testing.T) {
	for _, final := range []bool{true, false} {
		t.Run(fmt.Sprint(final), func(t *testing.T) {
			s := open(t, func(o *Options) { o.Final = final })
			s.begin()
			mad := func(*rpc.Request) (any, error) { s.last.Load().Kill(); return nil, nil }
			s.answer.Store(&mad)
			s.last.Load().Kill()
			err := <-s.lost
			if !strings.Contains(err.Error(), "again and again") || !strings.Contains(err.Error(), errKilled.Error()) {
				t.Errorf("lost: %v", err)
			}
			if n := s.started.Load(); n < storm.MaxDeaths || n > storm.MaxDeaths+2 {
				t.Errorf("%d starts", n)
			}
			s.answer.Store(nil)
			_, err = s.ask(t.Context())
			if final != (err != nil) || final && !strings.Contains(err.Error(), "again and again") {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestRefusals: what a service answers, it answers well: it is not killed for it. One that says itself
// that it cannot serve, or cannot be started, is given up at once.
func TestRefusals(t *testing.T) {
	s := open(t, nil)
	s.begin()
	no := func(*rpc.Request) (any, error) { return nil, rpc.Errorf(rpc.Invalid, "no") }
	s.answer.Store(&no)
	if _, err := s.ask(t.Context()); rpc.KindOf(err) != rpc.Invalid || s.started.Load() != 1 {
		t.Errorf("%v, %d starts", err, s.started.Load())
	}
	s.last.Load().Kill()
	if err := <-s.lost; rpc.KindOf(err) != rpc.Invalid || s.started.Load() != 2 {
		t.Errorf("%v, %d starts", err, s.started.Load())
	}
	s.answer.Store(nil)
	refused := errors.New("no room")
	s.refuse.Store(&refused)
	if _, err := s.ask(t.Context()); !errors.Is(err, refused) || !errors.Is(<-s.lost, refused) {
		t.Errorf("%v", err)
	}
	s.refuse.Store(nil)
	if _, err := s.ask(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestSick: one that does not answer in time, or of which its user says that it does not serve, is
// replaced; one that closes its connection and stays is killed.
func TestSick(t *testing.T) {
	s := open(t, nil)
	s.begin()
	for i, sick := range []error{fmt.Errorf("x: %w", ErrSick), context.DeadlineExceeded, rpc.ErrGone} {
		s.Lock()
		first := true
		err := s.Serve(func(*Instance) error {
			if first {
				first = false
				if errors.Is(sick, rpc.ErrGone) {
					s.last.Load().Kill()
				}
				return sick
			}
			return nil
		})
		s.Unlock()
		if err != nil || s.started.Load() != int64(i+2) {
			t.Errorf("%v: %v, %d starts", sick, err, s.started.Load())
		}
	}
	deaf := s.last.Load()
	deaf.deaf = true
	deaf.theirs.Close()
	if pid, err := s.ask(t.Context()); err != nil || pid == deaf.pid {
		t.Errorf("%d, %v", pid, err)
	}
	if !errors.Is(deaf.Err(), errKilled) {
		t.Errorf("the deaf one: %v", deaf.Err())
	}
}

// TestUnwanted: where nobody needs it, the next one is started by its next use only; Idle keeps it
// from being reset, and a reset that cannot start the next one leaves the last.
func TestUnwanted(t *testing.T) {
	ended := make(chan struct{}, 8)
	var idle atomic.Bool
	s := open(t, func(o *Options) {
		o.Wanted = func() bool { return false }
		o.Idle = idle.Load
		o.Overlap = true
		o.Ended = func(*Instance) { ended <- struct{}{} }
	})
	if s.Reset() {
		t.Error("nothing was reset")
	}
	s.begin()
	s.last.Load().Kill()
	<-ended
	s.Lock()
	if s.Now() != nil {
		t.Error("another one was started")
	}
	s.Unlock()
	if pid, err := s.ask(t.Context()); pid != 2 || err != nil {
		t.Errorf("%d %v", pid, err)
	}
	idle.Store(true)
	if s.Reset() {
		t.Error("reset while it is idle")
	}
	idle.Store(false)
	no := errors.New("no")
	s.refuse.Store(&no)
	if s.Reset() {
		t.Error("reset without another one")
	}
	if pid, err := s.ask(t.Context()); pid != 2 || err != nil {
		t.Errorf("%d %v", pid, err)
	}
	s.refuse.Store(nil)
	if !s.Reset() {
		t.Error("not reset")
	}
	if pid, err := s.ask(t.Context()); pid != 3 || err != nil {
		t.Errorf("%d %v", pid, err)
	}
}

// TestTimer: it resets.
func TestTimer(t *testing.T) {
	ended := make(chan struct{}, 64)
	s := open(t, func(o *Options) { o.Every, o.Ended = time.Millisecond, func(*Instance) { ended <- struct{}{} } })
	s.begin()
	for range 5 {
		<-ended
	}
	if _, err := s.ask(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestClose: it waits for no answer, and afterwards nothing is started; who waits for a service learns
// so, or gives up by itself.
func TestClose(t *testing.T) {
	s := open(t, nil)
	s.begin()
	asked, hang := make(chan struct{}), make(chan struct{})
	ready := func(ctx context.Context, _ *Instance) error {
		close(asked)
		<-ctx.Done()
		close(hang)
		return ctx.Err()
	}
	s.ready.Store(&ready)
	s.last.Load().Kill()
	<-asked
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan error, 2)
	go func() { _, err := s.ask(ctx); gaveUp <- err }()
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	go func() { _, err := s.ask(t.Context()); gaveUp <- err }()
	s.Close(time.Second)
	<-hang
	if err := <-gaveUp; rpc.KindOf(err) != rpc.Unavailable {
		t.Errorf("%v", err)
	}
	if _, err := s.ask(t.Context()); rpc.KindOf(err) != rpc.Unavailable {
		t.Errorf("%v", err)
	}
	select {
	case err := <-s.lost:
		t.Errorf("lost: %v", err)
	default:
	}
}

// TestUnrecorded: a process whose start cannot be recorded is ended.
func TestUnrecorded(t *testing.T) {
	s := open(t, nil)
	s.o.Journal.Close()
	if _, err := s.ask(t.Context()); rpc.KindOf(err) != rpc.Unavailable {
		t.Errorf("%v", err)
	}
	<-s.last.Load().Done()
}

// TestPost: what is posted is called in order, for the process that is in force then, and nobody who posts waits: neither for a
// process that is being told nor for one that does not read.
func TestPost(t *testing.T) {
	s := open(t, nil)
	var got []int
	note := func(n int) func(*Instance) {
		return func(i *Instance) { got = append(got, n+i.PID()) }
	}
	s.Lock()
	if err := s.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := range 2 * maxPosts {
		s.Post(false, note(10*n))
	}
	s.Post(true, note(-1))
	s.Unlock()
	s.Close(time.Second)
	if len(got) != maxPosts+1 {
		t.Fatalf("%d of at most %d, and one that had to be", len(got), maxPosts)
	}
	for n := range maxPosts {
		if got[n] != 10*n+1 {
			t.Fatalf("%d at %d", got[n], n)
		}
	}
	if got[maxPosts] != 0 {
		t.Errorf("the last one: %d", got[maxPosts])
	}
	s.Post(true, func(*Instance) { t.Error("called after Close") })
}

// TestNotReplacedUnrecorded: a process that runs well is not replaced where the next one's start could not be recorded.
func TestNotReplacedUnrecorded(t *testing.T) {
	s := open(t, nil)
	s.begin()
	first := s.last.Load()
	s.o.Journal.Close()
	if s.Reset() {
		t.Error("replaced")
	}
	if pid, err := s.ask(t.Context()); err != nil || pid != first.pid {
		t.Errorf("process %d serves in place of %d: %v", pid, first.pid, err)
	}
}
