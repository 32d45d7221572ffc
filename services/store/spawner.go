package store

import (
	"context"
	"os"
	"sync"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
)

// LogicProgram is the worker's program.
const LogicProgram = "redoubt-store-logic"

// maxWorkers bounds the workers of a store that asks without end.
const maxWorkers = 64

// Spawner is the Builder's side of [MethodWorker] and [NoticeRetired]: it starts workers and
// kills those that are retired. A worker whose store is gone ends by itself.
type Spawner struct {
	spawn func() (*process.Process, error)
	wg    sync.WaitGroup

	mu      sync.Mutex
	next    uint64
	workers map[uint64]*process.Process
	closed  bool
}

// NewSpawner makes a Spawner whose workers are started by spawn.
func NewSpawner(spawn func() (*process.Process, error)) *Spawner {
	return &Spawner{spawn: spawn, workers: map[uint64]*process.Process{}}
}

// Handle is the rpc.Handler for the store's control connection.
func (s *Spawner) Handle(_ context.Context, r *rpc.Request) (any, error) {
	for _, f := range r.Files {
		f.Close()
	}
	switch r.Method {
	case MethodWorker:
		return s.start()
	case NoticeRetired:
		var w Worker
		if err := r.Decode(&w); err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if p := s.workers[w.ID]; p != nil {
			p.Kill()
		}
		return nil, nil
	}
	return nil, rpc.Errorf(rpc.Refused, "%s: not served to the store", r.Method)
}

func (s *Spawner) start() (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.workers) >= maxWorkers {
		return nil, rpc.Errorf(rpc.Unavailable, "store: %d workers run", len(s.workers))
	}
	p, err := s.spawn()
	if err != nil {
		return nil, err
	}
	f, err := p.Control.File()
	p.Control.Close() // the store has the only other end: the worker ends with it
	s.next++
	id := s.next
	s.workers[id] = p
	s.wg.Go(func() {
		<-p.Done()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.workers, id)
	})
	if err != nil {
		p.Kill()
		return nil, err
	}
	return rpc.WithFiles{Value: Worker{ID: id}, Files: []*os.File{f}}, nil
}

// Clear kills what still runs and waits for it: the workers of a store that is gone, before
// another one is started. The store's control connection must have ended.
func (s *Spawner) Clear() {
	s.mu.Lock()
	for _, p := range s.workers {
		p.Kill()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Close is Clear, after which no worker is started any more.
func (s *Spawner) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.Clear()
}
