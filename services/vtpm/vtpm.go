// Package vtpm is the vTPM service: the manager of all guests' vTPMs (system B) and, over the
// store's watches, the vTPM back end of each guest (system A).
//
// A guest's vTPM becomes ready in three steps that the Builder asks for: attach (the back end
// waits at the gate), create (the device's process is started), measure (what was handed to
// the guest is extended). When the manager holds the engine's own answers to all of it, it
// writes /vTPMready<number> and tells the gate; either alone opens nothing.
package vtpm

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/foreign"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/vtpm/backend"
	"redoubt.dev/redoubt/vtpm/keys"
	"redoubt.dev/redoubt/vtpm/manager"
)

// CAFile is the name, in the service's state directory, of the host CA's certificate in PEM:
// the root that a verifier is given.
const CAFile = "ca.pem"

// service is the running service.
type service struct {
	log  *slog.Logger
	peer *rpc.Peer
	ctx  context.Context

	mu      sync.Mutex
	ending  bool // the Builder has said that all is to end
	manager *manager.Manager
	store   *client.Lasting
	hub     *backend.Hub
	guests  map[string]*guest
	wg      sync.WaitGroup
}

// shutdownTime bounds the orderly end of all engines.
const shutdownTime = 8 * time.Second

// Serve runs the service until its control connection or ctx ends, then shuts every engine
// down in an orderly way. It leaves the engines as they are where the Builder died: they are the next
// manager's.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &service{log: log, ctx: ctx, guests: map[string]*guest{}}
	s.peer = rpc.New(control, s.handle)
	s.peer.OnGone(s.leave)
	err := s.peer.Run(ctx)
	cancel()
	return errors.Join(err, s.close())
}

// leave ends the process at once if the Builder died: nothing of what is under way may take that for its
// guest's end.
func (s *service) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ending {
		os.Exit(0)
	}
}

func (s *service) close() error {
	s.mu.Lock()
	guests := s.guests
	s.guests = map[string]*guest{}
	m, store := s.manager, s.store
	s.mu.Unlock()
	if store != nil {
		store.Last() // a store that dies now is not waited for
	}
	for _, g := range guests {
		g.detach()
	}
	if m == nil {
		return nil
	}
	ctx, stop := context.WithTimeout(context.Background(), shutdownTime)
	defer stop()
	err := m.Close(ctx)
	store.Close()
	for _, g := range guests {
		g.work.Wait()
	}
	s.wg.Wait()
	return err
}

func (s *service) handle(ctx context.Context, r *rpc.Request) (any, error) {
	if r.Method != protocol.MethodConfigure && r.Method != protocol.NoticeShutdown && s.configured() == nil {
		return nil, rpc.Errorf(rpc.Unavailable, "vTPM: not configured")
	}
	switch r.Method {
	case protocol.NoticeShutdown:
		s.mu.Lock()
		s.ending = true
		s.mu.Unlock()
		return nil, nil
	case protocol.MethodConfigure:
		return struct{}{}, s.configure(r)
	case protocol.MethodStore:
		return struct{}{}, s.renew(r)
	case protocol.NoticeStoreLost:
		s.store.Last()
		return nil, nil
	case protocol.MethodAttach:
		return struct{}{}, s.attach(r)
	case protocol.MethodInherit:
		return s.inherit(ctx, r)
	case protocol.MethodCreate:
		return s.create(ctx, r)
	case protocol.MethodMeasure:
		return struct{}{}, s.measure(ctx, r)
	case protocol.MethodRelease:
		return struct{}{}, s.release(r)
	case protocol.MethodDestroy:
		return struct{}{}, s.destroy(r)
	case protocol.MethodRevoke:
		return rpc.Answer(r, func(in protocol.Revoke) (any, error) {
			err := s.manager.Revoke(in.UUID, in.Revoked)
			if errors.Is(err, manager.ErrUnknown) {
				err = nil // there is nothing that could open
			}
			return struct{}{}, err
		})
	case protocol.MethodActivate:
		return s.activate(ctx, r)
	case protocol.MethodQuote:
		return s.quote(ctx, r)
	}
	return nil, rpc.Errorf(rpc.Refused, "vTPM: no call %q", r.Method)
}

func (s *service) configured() *manager.Manager {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.manager
}

func (s *service) configure(r *rpc.Request) error {
	var in protocol.ConfigureVTPM
	if err := r.Decode(&in); err != nil {
		return err
	}
	files, err := in.Files.Take(r)
	if err != nil {
		return err
	}
	if len(files[protocol.FileStore]) != 1 || s.configured() != nil {
		return rpc.Errorf(rpc.Invalid, "vTPM: configured wrongly or twice")
	}
	f := files[protocol.FileStore][0]
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return err
	}
	var host *keys.Host
	if tpm := files[protocol.FileHostTPM]; len(tpm) == 1 {
		defer tpm[0].Close()
		host = keys.HostOver(in.HostTPM, tpm[0])
	}
	m, err := manager.Open(manager.Options{
		Dir: filepath.Join(in.StateDir, "manager"), TPM: host,
		Starter: foreign.Starter{Builder: s.peer, Dir: in.StateDir},
	})
	if err != nil {
		c.Close()
		return err
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.CACertificate()})
	if err := renameio.WriteFile(filepath.Join(in.StateDir, CAFile), ca, 0o644); err != nil {
		c.Close()
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.manager, s.store = m, client.NewLasting(c)
	s.hub = backend.NewHub(s.store, s.log)
	s.wg.Go(func() {
		if err := s.hub.Run(s.ctx); err != nil && s.ctx.Err() == nil {
			s.log.Error("store", "err", err)
		}
	})
	root := "a 0600 file"
	if m.Sealed() {
		root = "the host's TPM"
	}
	s.log.Info("vTPM manager", "host", m.HostID(), "guests", len(m.Inventory()), "root key in", root)
	return nil
}

// renew goes on with a store that was started again.
func (s *service) renew(r *rpc.Request) error {
	var in protocol.Store
	if err := r.Decode(&in); err != nil {
		return err
	}
	files, err := in.Files.Take(r)
	if err != nil {
		return err
	}
	if len(files[protocol.FileStore]) != 1 {
		return rpc.Errorf(rpc.Invalid, "vTPM: no connection to the store")
	}
	f := files[protocol.FileStore][0]
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return rpc.Errorf(rpc.Invalid, "vTPM: store: %v", err)
	}
	return s.store.Renew(c)
}

func (s *service) guest(uuid string) (*guest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.guests[uuid]
	if g == nil {
		return nil, rpc.Errorf(rpc.NotFound, "vTPM of %s: not attached", uuid)
	}
	return g, nil
}

func (s *service) event(e protocol.Event) {
	e.Time = time.Now()
	if err := s.peer.Notify(protocol.NoticeEvent, e); err != nil {
		s.log.Warn("event", "kind", e.Kind, "err", err)
	}
}

func (s *service) destroy(r *rpc.Request) error {
	var in protocol.Destroy
	if err := r.Decode(&in); err != nil {
		return err
	}
	s.mu.Lock()
	running := s.guests[in.UUID] != nil
	s.mu.Unlock()
	if running {
		return rpc.Errorf(rpc.Exists, "the vTPM is in use: stop its guest first")
	}
	err := s.manager.Remove(in.UUID)
	if errors.Is(err, manager.ErrUnknown) {
		return nil // never made, or destroyed already
	}
	if err != nil {
		return fmt.Errorf("destroy: %w", err)
	}
	return nil
}
