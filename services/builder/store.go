package builder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/protocol"
	storesvc "redoubt.dev/redoubt/services/store"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

// Names in the run directory that are the store's.
const (
	StoreDir    = "store"     // its contents
	StoreSocket = "xenstored" // where XenStore's own clients, if root's, are served
)

// DefaultStoreReset replaces the store's worker after each response, as the source of the
// partition does.
const DefaultStoreReset = "1"

// StoreResetUsage is the help of the flag that ParseStoreReset reads.
const StoreResetUsage = "responses after which the store's worker process is replaced: a number from 1 on, or off"

// ParseStoreReset reads after how many responses the store's worker is replaced: a number from 1
// on, or "off" for never, which is -1.
func ParseStoreReset(s string) (int, error) {
	if s == "off" {
		return int(state.ResetOff), nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%q: after how many responses the store's worker is replaced: a number from 1 on, or off", s)
	}
	return n, nil
}

// storeSpares are the workers that are kept ready: more than a guest's start asks for at once.
const storeSpares = 4

// store keeps the store service running for as long as the Builder runs. The service may die at
// any moment: it is started again over the same contents and the same listening socket, calls
// that were under way are made again (each may be carried out twice), and who had a connection
// gets another.
type store struct {
	log   *slog.Logger
	seen  string // its directory, as the service sees it
	spawn func(dir string, h rpc.Handler) (*process.Process, *rpc.Peer, <-chan struct{}, error)
	reset int
	// lost is told once that the store cannot be kept running.
	lost func(error)
	// ended is told of each service's end, before another one is started.
	ended func(error)

	workers  *storesvc.Spawner
	dir      string // its contents', beneath the run directory
	listener *os.File
	ctx      context.Context // ends with close, and when the store is lost
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	mu      sync.Mutex
	proc    *process.Process
	peer    *rpc.Peer     // of the present service; nil while there is none
	number  uint64        // of the service there is or was last
	changed chan struct{} // closed when peer or failed changes
	failed  error         // why there will be no other
	ending  bool
	holders map[tree.Domain]*holder
	deaths  deaths
}

// A holder is who has a connection to the store.
type holder struct {
	domain tree.Domain
	peer   *rpc.Peer   // serves protocol.MethodStore
	fail   func(error) // it cannot be given a connection
	number uint64      // of the service its connection is to
	busy   bool        // it is being given one
	gone   bool
}

// openStore starts the store, which finds its directory empty: what another Builder left there is
// of guests that ended with it.
func openStore(ctx context.Context, runDir string, s *store) (*store, error) {
	s.changed, s.holders = make(chan struct{}), map[tree.Domain]*holder{}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.dir = filepath.Join(runDir, StoreDir)
	if err := os.RemoveAll(s.dir); err != nil {
		return nil, err
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if s.listener, err = listen(filepath.Join(runDir, StoreSocket), 0o600); err != nil {
		s.close(ctx)
		return nil, err
	}
	running, err := s.start(ctx)
	if err != nil {
		s.close(ctx)
		return nil, err
	}
	s.wg.Go(func() { s.keep(running) })
	return s, nil
}

// start starts a service; done is closed when it has ended and all it said was taken in.
func (s *store) start(ctx context.Context) (done <-chan struct{}, err error) {
	s.mu.Lock()
	if s.ending {
		s.mu.Unlock()
		return nil, errors.New("store: Redoubt is going down")
	}
	p, peer, heard, err := s.spawn(s.dir, s.workers.Handle)
	if err != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("store: %w", err)
	}
	s.proc = p
	s.mu.Unlock()
	ended := make(chan struct{})
	s.wg.Go(func() {
		defer close(ended)
		select {
		case <-p.Done():
		case <-heard: // a service that nobody can ask any more
			if !s.isEnding() {
				p.Kill()
			}
			<-p.Done()
		}
		peer.Close()
		<-heard
	})
	_, err = peer.Call(ctx, storesvc.MethodConfigure, storesvc.Configure{Dir: s.seen, Name: s.dir, Reset: s.reset, Workers: storeSpares}, nil)
	if err == nil {
		_, err = peer.Call(ctx, storesvc.MethodListen, struct{}{}, nil, s.listener)
	}
	if err != nil {
		p.Kill()
		<-ended
		s.ended(p.Err())
		s.workers.Clear()
		return nil, fmt.Errorf("store: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.peer = peer
	s.number++
	s.signal()
	for _, h := range s.holders {
		s.renew(h)
	}
	return ended, nil
}

// signal tells those who wait; s.mu is held.
func (s *store) signal() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *store) isEnding() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ending
}

// keep starts the service again whenever it has ended.
func (s *store) keep(done <-chan struct{}) {
	for {
		<-done
		s.workers.Clear()
		s.mu.Lock()
		s.peer = nil
		ending, err := s.ending, s.proc.Err()
		storm := s.deaths.add(time.Now())
		s.mu.Unlock()
		s.ended(err)
		if ending {
			return
		}
		if err == nil {
			err = errors.New("redoubt-store-state ended without a word")
		}
		if storm {
			s.giveUp(fmt.Errorf("the store dies again and again: %w", err))
			return
		}
		s.log.Warn("the store is started again", "err", err)
		for {
			done, err = s.start(s.ctx)
			if err == nil {
				break
			}
			s.mu.Lock()
			again := errors.Is(err, rpc.ErrGone) && !s.ending && !s.deaths.add(time.Now())
			s.mu.Unlock()
			if !again {
				s.giveUp(err)
				return
			}
		}
	}
}

// giveUp makes every call fail from here on.
func (s *store) giveUp(err error) {
	s.mu.Lock()
	if s.failed != nil || s.ending {
		s.mu.Unlock()
		return
	}
	s.failed = err
	s.peer = nil
	s.signal()
	vtpm := s.holders[server.VTPM]
	s.mu.Unlock()
	vtpm.noMore()
	s.lost(err)
}

// current waits for a service other than number.
func (s *store) current(ctx context.Context, number uint64) (*rpc.Peer, uint64, error) {
	for {
		s.mu.Lock()
		peer, n, failed, changed := s.peer, s.number, s.failed, s.changed
		s.mu.Unlock()
		if failed != nil {
			return nil, 0, failed
		}
		if peer != nil && n != number {
			return peer, n, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, 0, fmt.Errorf("store: %w", ctx.Err())
		case <-s.ctx.Done():
			return nil, 0, errors.New("store: Redoubt is going down")
		}
	}
}

// call asks the service there is, and the next one if that dies over it.
func (s *store) call(ctx context.Context, method string, in any) error {
	number := uint64(0)
	for {
		peer, n, err := s.current(ctx, number)
		if err != nil {
			return err
		}
		if _, err = peer.Call(ctx, method, in, nil); !errors.Is(err, rpc.ErrGone) {
			return err
		}
		number = n
	}
}

// Introduce, Set and Release are the calls of that name.
func (s *store) Introduce(ctx context.Context, d tree.Domain, nodes []state.Node) error {
	return s.call(ctx, storesvc.MethodIntroduce, storesvc.Introduce{Domain: d, Nodes: nodes})
}

func (s *store) Set(ctx context.Context, nodes []state.Node) error {
	return s.call(ctx, storesvc.MethodSet, storesvc.Set{Nodes: nodes})
}

func (s *store) Release(ctx context.Context, d tree.Domain, paths []string) error {
	s.drop(d)
	return s.call(ctx, storesvc.MethodRelease, storesvc.Release{Domain: d, Paths: paths})
}

// connect makes a connection with an identity: the client's end, and to which service it leads.
func (s *store) connect(ctx context.Context, d tree.Domain) (*os.File, uint64, error) {
	number := uint64(0)
	for {
		peer, n, err := s.current(ctx, number)
		if err != nil {
			return nil, 0, err
		}
		f, err := connectTo(ctx, peer, d)
		if !errors.Is(err, rpc.ErrGone) {
			return f, n, err
		}
		number = n
	}
}

func connectTo(ctx context.Context, peer *rpc.Peer, d tree.Domain) (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("store: socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[0]), "store")
	defer theirs.Close()
	ours := os.NewFile(uintptr(fds[1]), "store")
	if _, err := peer.Call(ctx, storesvc.MethodConnect, storesvc.Connect{Domain: d}, nil, theirs); err != nil {
		ours.Close()
		return nil, err
	}
	return ours, nil
}

// hold has a client whose connection leads to the service number given a new one whenever that
// dies, from now on: it can be given one. The end is drop's.
func (s *store) hold(d tree.Domain, number uint64, peer *rpc.Peer, fail func(error)) {
	h := &holder{domain: d, number: number, peer: peer, fail: fail}
	s.mu.Lock()
	s.holders[d] = h
	if s.peer != nil {
		s.renew(h)
	}
	failed := s.failed
	s.mu.Unlock()
	if failed != nil {
		h.noMore()
	}
}

// give hands a connection over.
func (h *holder) give(ctx context.Context, f *os.File) error {
	_, err := h.peer.Call(ctx, protocol.MethodStore, protocol.Store{Files: protocol.Files{protocol.FileStore}}, nil, f)
	return err
}

// noMore tells the vTPM service that there will be no other: guests that wait fail closed.
func (h *holder) noMore() {
	if h != nil && h.domain == server.VTPM {
		_ = h.peer.Notify(protocol.NoticeStoreLost, struct{}{})
	}
}

func (s *store) drop(d tree.Domain) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.holders[d]; h != nil {
		h.gone = true
		delete(s.holders, d)
	}
}

// renewAttempts is how many connections to one service a holder may refuse.
const renewAttempts = 3

// renew gives a holder a connection to the present service beside whatever else goes on: a
// holder that does not answer holds up nobody. s.mu is held.
func (s *store) renew(h *holder) {
	if h.busy || h.number == s.number {
		return
	}
	h.busy = true
	s.wg.Go(func() {
		refused, attempts := uint64(0), 0
		for {
			s.mu.Lock()
			if h.gone || h.number == s.number || s.ending {
				h.busy = false
				s.mu.Unlock()
				return
			}
			s.mu.Unlock()
			f, n, err := s.connect(s.ctx, h.domain)
			if err == nil {
				err = h.give(s.ctx, f)
				f.Close()
				if err == nil {
					s.mu.Lock()
					h.number = n
					s.mu.Unlock()
					continue
				}
				if n != refused {
					refused, attempts = n, 0
				}
				if attempts++; attempts < renewAttempts && !errors.Is(err, rpc.ErrGone) {
					s.log.Warn("store: connection refused", "domain", h.domain, "err", err)
					continue
				}
			}
			s.mu.Lock()
			h.busy = false
			tell := !h.gone && !s.ending && s.failed == nil && !errors.Is(err, rpc.ErrGone)
			s.mu.Unlock()
			if tell {
				h.fail(fmt.Errorf("store: a new connection: %w", err))
			}
			return
		}
	})
}

// close ends the service, in an orderly way unless ctx ends.
func (s *store) close(ctx context.Context) {
	s.mu.Lock()
	s.ending = true
	p := s.proc
	s.mu.Unlock()
	if p != nil {
		if err := p.Stop(ctx); err != nil {
			s.log.Warn("service ended badly", "service", p.Name, "err", err)
		}
	}
	s.cancel()
	s.wg.Wait()
	s.workers.Close()
	if s.listener != nil {
		s.listener.Close()
	}
}

// deaths are the latest ones of a service that is replaced.
type deaths []time.Time

// add notes one and reports whether they are so many that replacing is no answer: a service that
// dies more than maxDeaths times within deathWindow.
func (d *deaths) add(now time.Time) bool {
	*d = append(*d, now)
	n := len(*d) - maxDeaths
	if n <= 0 {
		return false
	}
	*d = (*d)[n:]
	return now.Sub((*d)[0]) < deathWindow
}

// listen makes a socket with a name.
func listen(path string, mode os.FileMode) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, mode); err != nil {
		return nil, err
	}
	return l.File()
}
