package emulator

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/gate"
)

// xenbus is the front end's side of the handshake in the store. What is the ring of a XenBus
// device is here the TPM channel, which the Builder makes; so the Builder has written
// Initialised, and one request is left: Connected.
type xenbus struct {
	store *client.Lasting
	path  string // of the state node
	once  sync.Once
	wake  chan struct{}
	stop  chan struct{}
	done  chan struct{}
	log   *slog.Logger
}

func newXenbus(f *os.File, d tree.Domain, log *slog.Logger) (*xenbus, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	x := &xenbus{
		store: client.NewLasting(c), path: server.FrontPath(d) + "/state", log: log,
		done: make(chan struct{}), wake: make(chan struct{}), stop: make(chan struct{}),
	}
	go x.run()
	return x, nil
}

// run writes Connected when told; a vCPU that tells it does not wait for the store.
func (x *xenbus) run() {
	defer close(x.done)
	select {
	case <-x.wake:
	case <-x.stop:
		return
	}
	err := x.store.Write(x.path, strconv.Itoa(int(gate.Connected)))
	select {
	case <-x.stop: // the store was left
	default:
		if err != nil {
			x.log.Error("the gate cannot learn that the front end is connected", "err", err)
		}
	}
}

// connect makes the front end Connected: the guest's driver is there (steps 7 and 8).
func (x *xenbus) connect() { x.once.Do(func() { close(x.wake) }) }

func (x *xenbus) close() {
	close(x.stop)
	x.store.Close()
	<-x.done
}

// renewStore goes on with a store that was started again.
func (s *service) renewStore(f *os.File) error {
	if f == nil {
		return rpc.Errorf(rpc.Invalid, "emulator: no connection to the store")
	}
	defer f.Close()
	s.mu.Lock()
	x := s.xenbus
	s.mu.Unlock()
	if x == nil {
		return rpc.Errorf(rpc.Unavailable, "the guest has not been started")
	}
	c, err := net.FileConn(f)
	if err != nil {
		return rpc.Errorf(rpc.Invalid, "store: %v", err)
	}
	err = x.store.Renew(c)
	select {
	case <-x.stop: // the guest has ended and needs no store
		return nil
	default:
		return err
	}
}
