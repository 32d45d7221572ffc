// Package kept is the Builder's side of the store: it keeps the service running, and knows who has a
// connection to it. Contents and socket outlive the Builder, too.
//
// The service may die at any moment: it is started again over the same contents and the same listening
// socket, calls that were under way are made again (each may be carried out twice), and who had a
// connection gets another.
package kept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/services/store"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
)

// spares are the workers that are kept ready: more than a guest's start asks for at once.
const spares = 4

// Options of a Store.
type Options struct {
	RunDir  string // in which its directory and its socket are
	Seen    string // the directory, as the service sees it
	Reset   int    // after how many responses the worker is replaced; see services.ParseStoreReset
	Log     *slog.Logger
	Journal *audit.Journal // nil: nothing is recorded
	Kept    *fdstore.Store // keeps the socket
	Left    *fdstore.Left  // what a Builder that died has left

	Start  func(dir string) (keeper.Process, error) // starts the service
	Worker func() (*process.Process, error)         // starts a worker
	Guests func() []string                          // those that depend on it: all
	Lost   func(error)                              // is told once that the store cannot be kept running
	Deaths int                                      // in place of storm.MaxDeaths
}

// A Store keeps the service running, from Open to Close.
type Store struct {
	o        Options
	keeper   *keeper.Keeper
	workers  *store.Spawner
	listener *os.File
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	// mu is taken for moments only, also by who holds the keeper's lock.
	mu      sync.Mutex
	number  uint64 // of the service there is or was last
	failed  error  // why there will be no other
	ending  bool
	holders map[tree.Domain]*holder
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

// socketEntry is what the socket is kept as.
const socketEntry = "listen/store"

// Open starts the store, which finds its directory empty unless it follows a Builder that died: what is
// there otherwise is of guests that are no more.
func Open(ctx context.Context, o Options) (_ *Store, err error) {
	s := &Store{o: o, workers: store.NewSpawner(o.Worker), holders: map[tree.Domain]*holder{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	dir := filepath.Join(o.RunDir, services.StoreDir)
	s.keeper = keeper.New(keeper.Options{
		Service: services.StoreState, Log: o.Log, Journal: o.Journal, Final: true, Deaths: o.Deaths,
		Start: func() (keeper.Process, error) { return o.Start(dir) },
		Handler: func(*keeper.Instance) rpc.Handler {
			return calls.Watched(o.Journal, services.StoreState, "", s.workers.Handle)
		},
		Ready:  func(ctx context.Context, i *keeper.Instance) error { return s.ready(ctx, i, dir) },
		Detail: []string{"reset", strconv.Itoa(o.Reset)},
		Record: func(i *keeper.Instance) (all []audit.Entry) {
			for _, g := range o.Guests() {
				all = append(all, o.Journal.Linked(g, i.Name))
			}
			return all
		},
		Guests: o.Guests,
		Ended: func(i *keeper.Instance) {
			<-i.Heard()
			s.workers.Clear()
		},
		Lost: s.lost,
	})
	defer func() {
		if err != nil {
			s.Close(0)
		}
	}()
	if len(o.Left.Names(socketEntry)) == 0 {
		if err := os.RemoveAll(dir); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s.listener, err = o.Kept.Listen(o.Left, socketEntry, func() (*os.File, error) {
		return ipc.Listen(filepath.Join(o.RunDir, services.StoreSocket), 0o600)
	})
	if err != nil {
		return nil, err
	}
	s.keeper.Lock()
	defer s.keeper.Unlock()
	return s, s.keeper.Begin(ctx)
}

// ready has a service serve.
func (s *Store) ready(ctx context.Context, i *keeper.Instance, dir string) error {
	_, err := i.Peer.Call(ctx, store.MethodConfigure, store.Configure{Dir: s.o.Seen, Name: dir, Reset: s.o.Reset, Workers: spares}, nil)
	if err == nil {
		_, err = i.Peer.Call(ctx, store.MethodListen, struct{}{}, nil, s.listener)
	}
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.number = i.Number
	for _, h := range s.holders {
		s.renew(h) // once the service is in force
	}
	return nil
}

// lost makes every call fail from here on.
func (s *Store) lost(err error) {
	s.mu.Lock()
	s.failed = err
	vtpm := s.holders[server.VTPM]
	s.mu.Unlock()
	vtpm.noMore()
	s.o.Lost(err)
}

// Instance is the service there is, or the next one.
func (s *Store) Instance(ctx context.Context) (audit.Instance, error) {
	i, err := s.keeper.Current(ctx)
	if err != nil {
		return audit.Instance{}, err
	}
	return i.Name, nil
}

// call asks the service there is, and the next one if that dies over it.
func (s *Store) call(ctx context.Context, method string, in any) error {
	return s.keeper.Call(ctx, func(i *keeper.Instance) error {
		_, err := i.Peer.Call(ctx, method, in, nil)
		return err
	})
}

// Connect makes a connection with an identity: the client's end, and the number of the service that it
// leads to.
func (s *Store) Connect(ctx context.Context, d tree.Domain) (f *os.File, number uint64, err error) {
	err = s.keeper.Call(ctx, func(i *keeper.Instance) error {
		theirs, ours, err := ipc.Streams("store")
		if err != nil {
			return err
		}
		defer theirs.Close()
		if _, err := i.Peer.Call(ctx, store.MethodConnect, store.Connect{Domain: d}, nil, theirs); err != nil {
			ours.Close()
			return err
		}
		f, number = ours, i.Number
		return nil
	})
	return f, number, err
}

// Hold has a client whose connection leads to the service number given a new one whenever that
// dies, from now on: it can be given one. The end is Release's.
func (s *Store) Hold(d tree.Domain, number uint64, peer *rpc.Peer, fail func(error)) {
	h := &holder{domain: d, number: number, peer: peer, fail: fail}
	s.mu.Lock()
	s.holders[d] = h
	s.renew(h)
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

func (s *Store) drop(d tree.Domain) {
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
func (s *Store) renew(h *holder) {
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
			f, n, err := s.Connect(s.ctx, h.domain)
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
					s.o.Log.Warn("store: connection refused", "domain", h.domain, "err", err)
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

// Close ends the service, which has the grace to do so in order.
func (s *Store) Close(grace time.Duration) {
	s.mu.Lock()
	s.ending = true
	s.mu.Unlock()
	s.cancel()
	s.keeper.Close(grace)
	s.wg.Wait()
	s.workers.Close()
	if s.listener != nil {
		s.listener.Close()
	}
}
