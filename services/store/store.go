// Package store is the store service (program redoubt-store-state): package store/state, whose
// directory, worker processes, listening socket and clients' connections the Builder hands in.
// The service itself opens nothing but a file in that directory and starts nothing.
//
// The Builder calls [MethodConfigure] once, then [MethodConnect] for every client, and serves
// [MethodWorker] and [NoticeRetired] (type [Spawner] does). It is no client itself: what it has
// to say of domains are calls ([MethodIntroduce], [MethodSet], [MethodRelease]), each of which is
// one commit and needs no worker. When the service dies, the Builder starts it again, configures
// it with the same directory and makes every client's connection anew; the contents are those
// that were acknowledged.
package store

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/store/disk"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

// Builder → store.
const (
	// MethodConfigure gives the service its directory and how often its workers are replaced.
	// It comes first and once; its answer means that the contents are loaded. Damaged contents
	// are an error of kind rpc.Unavailable with the reason.
	MethodConfigure = "configure" // Configure → nothing
	// MethodConnect gives a connection an identity. Descriptor: a stream socket. A service that
	// was not configured before keeps its contents in memory and parses requests itself.
	MethodConnect = "connect" // Connect → nothing
	// MethodListen makes the service accept XenStore's own clients, those of root as domain 0.
	// Descriptor: a listening Unix stream socket.
	MethodListen = "listen" // nothing → nothing
	// MethodIntroduce sets the nodes of a new domain and makes it known.
	MethodIntroduce = "introduce" // Introduce → nothing
	// MethodSet sets nodes.
	MethodSet = "set" // Set → nothing
	// MethodRelease removes a domain's nodes, ends its connections and forgets it.
	MethodRelease = "release" // Release → nothing
)

// Store → Builder.
const (
	// MethodWorker asks for a fresh redoubt-store-logic. Descriptor of the answer: the other end
	// of its descriptor 3.
	MethodWorker = "worker" // nothing → Worker
	// NoticeRetired says that a worker is done with; if it still runs, it is to be killed.
	NoticeRetired = "worker-retired" // Worker
)

// Configure is MethodConfigure's argument.
type Configure struct {
	// Reset is the number of responses after which a worker is replaced, 0 for each response,
	// -1 for never.
	Reset int `json:"reset,omitempty"`
	// Workers is how many are kept, most of them as spares for a burst of requests; 0: eight.
	Workers int `json:"workers,omitempty"`
	// Dir is the directory, as the service sees it, and Name what it is called in messages.
	Dir  string `json:"dir"`
	Name string `json:"name,omitempty"`
}

// Connect is MethodConnect's argument.
type Connect struct {
	Domain tree.Domain `json:"domain"`
}

// Introduce is MethodIntroduce's argument.
type Introduce struct {
	Domain tree.Domain  `json:"domain"`
	Nodes  []state.Node `json:"nodes"`
}

// Set is MethodSet's argument.
type Set struct {
	Nodes []state.Node `json:"nodes"`
}

// Release is MethodRelease's argument. Paths that are not there are no error.
type Release struct {
	Domain tree.Domain `json:"domain"`
	Paths  []string    `json:"paths"`
}

// Worker names a worker process.
type Worker struct {
	ID uint64 `json:"id"`
}

type service struct {
	ctx    context.Context
	log    *slog.Logger
	peer   *rpc.Peer
	accept chan state.Client
	wg     sync.WaitGroup

	mu    sync.Mutex
	db    *disk.DB
	state *state.State // nil until it runs
}

// Serve runs the service until its control connection or ctx ends.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	s := &service{ctx: ctx, log: log, accept: make(chan state.Client)}
	s.peer = rpc.New(control, s.handle)
	err := s.peer.Run(ctx)
	cancel()
	s.wg.Wait()
	if s.db != nil {
		if cerr := s.db.Close(); err == nil {
			err = cerr
		}
	}
	return err
}

func (s *service) handle(_ context.Context, r *rpc.Request) (any, error) {
	defer func() {
		for _, f := range r.Files {
			f.Close()
		}
	}()
	want := 1
	switch r.Method {
	case MethodConfigure, MethodIntroduce, MethodSet, MethodRelease:
		want = 0
	}
	if len(r.Files) != want {
		return nil, rpc.Errorf(rpc.Invalid, "store: %s with %d descriptors", r.Method, len(r.Files))
	}
	switch r.Method {
	case MethodConfigure:
		return take(r, s.configure)
	case MethodConnect:
		return take(r, func(in Connect) error { return s.connect(in, r.Files[0]) })
	case MethodListen:
		return struct{}{}, s.listen(r.Files[0])
	case MethodIntroduce:
		return take(r, func(in Introduce) error { return s.ensure().Introduce(in.Domain, in.Nodes) })
	case MethodSet:
		return take(r, func(in Set) error { return s.ensure().Set(in.Nodes) })
	case MethodRelease:
		return take(r, func(in Release) error { return s.ensure().Release(in.Domain, in.Paths) })
	}
	return nil, rpc.Errorf(rpc.Invalid, "store: no method %q", r.Method)
}

// take decodes a call's argument for f, which has no more to answer than its error.
func take[T any](r *rpc.Request, f func(T) error) (any, error) {
	var in T
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	return struct{}{}, f(in)
}

func (s *service) configure(in Configure) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != nil {
		return rpc.Errorf(rpc.Exists, "store: it runs already")
	}
	if in.Reset < int(state.ResetOff) || in.Workers < 0 || in.Workers > maxWorkers/2 {
		return rpc.Errorf(rpc.Invalid, "store: %d workers, replaced after %d responses", in.Workers, in.Reset)
	}
	if in.Workers == 0 {
		in.Workers = 8
	}
	t := tree.New(server.ReservedNames()...)
	fd, err := eintr.Value(func() (int, error) { return unix.Open(in.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return fmt.Errorf("store: %s: %w", in.Dir, err)
	}
	if in.Name == "" {
		in.Name = in.Dir
	}
	named := os.NewFile(uintptr(fd), in.Name)
	defer named.Close()
	db, err := disk.Open(named, t)
	if err != nil {
		return rpc.Errorf(rpc.Unavailable, "%v", err)
	}
	s.db = db
	s.run(state.Options{Tree: t, Persist: db.Keep, Workers: state.WorkersFunc(s.worker), Reset: state.Reset(in.Reset), Size: in.Workers})
	return nil
}

// run starts the store; s.mu is held.
func (s *service) run(o state.Options) {
	x := state.New(s.log, o)
	s.state = x
	s.wg.Go(func() { x.Run(s.ctx, s.accept) })
}

// ensure returns the store, which runs.
func (s *service) ensure() *state.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == nil {
		s.log.Warn("store was not configured: contents in memory, requests parsed in this process")
		s.run(state.Options{Tree: tree.New(server.ReservedNames()...)})
	}
	return s.state
}

// worker asks the Builder for a worker.
func (s *service) worker(ctx context.Context) (*state.Worker, error) {
	var w Worker
	files, err := s.peer.Call(ctx, MethodWorker, struct{}{}, &w)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		for _, f := range files {
			f.Close()
		}
		return nil, fmt.Errorf("worker %d with %d descriptors", w.ID, len(files))
	}
	c, err := ipc.FromFile(files[0])
	if err != nil {
		return nil, err
	}
	return &state.Worker{Conn: c, Kill: func() { _ = s.peer.Notify(NoticeRetired, w) }}, nil
}

func (s *service) connect(in Connect, f *os.File) error {
	c, err := net.FileConn(f)
	if err != nil {
		return rpc.Errorf(rpc.Invalid, "store: %v", err)
	}
	s.ensure()
	select {
	case s.accept <- state.Client{Conn: c, Domain: in.Domain}:
		return nil
	case <-s.ctx.Done():
		c.Close()
		return s.ctx.Err()
	}
}

func (s *service) listen(f *os.File) error {
	l, err := net.FileListener(f)
	if err != nil {
		return rpc.Errorf(rpc.Invalid, "store: %v", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return rpc.Errorf(rpc.Invalid, "store: %v is no Unix socket", l.Addr())
	}
	u.SetUnlinkOnClose(false)
	s.ensure()
	s.wg.Go(func() {
		if err := state.Listen(s.ctx, s.log, u, s.accept); err != nil {
			s.log.Error("store no longer accepts XenStore's clients", "err", err)
		}
	})
	return nil
}
