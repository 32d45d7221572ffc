// Package netback is the NetBack service: the guests' network devices, as vhost-user back ends over
// taps, and the bridges and the filter between them. It runs in a network namespace of Redoubt's
// own and has, for each NIC, the tap and the guest's memory, and nothing else. It may be killed and
// replaced at any instant: the namespace, and each tap, is held by the Builder, too, and what a
// device was told by its front end (see vhostuser.Frontend).
//
// The Builder starts the next NetBack once the last one's process is gone: the kernel's own data
// path, where it is used, may outlive the connection of a killed process by a moment, but not the
// process.
package netback

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
	"redoubt.dev/redoubt/virtio"
)

// service is one NetBack process.
type service struct {
	log  *slog.Logger
	peer *rpc.Peer

	mu        sync.Mutex // over one change of the network, too
	filtering *bool      // what the kernel's bridges can; nil before it was tried
	config    network.Config
	nics      map[int]*nic
	ended     bool
}

// nic is one NIC's connection to a front end.
type nic struct {
	stop context.CancelFunc
	done chan struct{} // closed when nothing of it is left
}

// Serve runs the service until its control connection or ctx ends. The process is in the
// network's namespace.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	s := &service{log: log, nics: map[int]*nic{}}
	s.peer = rpc.New(control, s.handle)
	err := s.peer.Run(ctx)
	s.mu.Lock()
	s.ended = true
	all := s.nics
	s.mu.Unlock()
	for _, n := range all {
		n.end()
	}
	return err
}

func (n *nic) end() {
	n.stop()
	<-n.done
}

func (s *service) handle(_ context.Context, r *rpc.Request) (any, error) {
	switch r.Method {
	case protocol.MethodNetwork:
		var c network.Config
		if err := r.Decode(&c); err != nil {
			return nil, err
		}
		return struct{}{}, s.setNetwork(c)
	case protocol.MethodAttachNIC:
		var in protocol.AttachNIC
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		files, err := in.Files.Take(r)
		if err != nil {
			return nil, err
		}
		return struct{}{}, s.attach(in, files)
	case protocol.MethodDetachNIC:
		var in protocol.DetachNIC
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.drop(in.ID)
		return struct{}{}, nil
	}
	return nil, rpc.Errorf(rpc.Refused, "netback: no call %q", r.Method)
}

// drop ends serving a NIC. s.mu is held.
func (s *service) drop(id int) {
	if n := s.nics[id]; n != nil {
		n.end()
		delete(s.nics, id)
	}
}

// setNetwork makes the network what c says. NICs that are not in it any more are served no more.
func (s *service) setNetwork(c network.Config) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.filtering == nil {
		can, err := network.VLANFiltering()
		if err != nil {
			return err
		}
		s.filtering = &can
	}
	p, err := network.NewPlan(c, *s.filtering)
	if err != nil {
		return rpc.Errorf(rpc.Invalid, "%v", err)
	}
	for id := range s.nics {
		if !slices.ContainsFunc(c.NICs, func(n network.NIC) bool { return n.ID == id }) {
			s.drop(id)
		}
	}
	s.config = c
	return network.Apply(p)
}

func single(files map[string][]*os.File, name string) *os.File {
	if len(files[name]) != 1 {
		return nil
	}
	return files[name][0]
}

// attach serves a NIC to a front end, in place of the last one's. It takes the files over.
func (s *service) attach(in protocol.AttachNIC, files map[string][]*os.File) (err error) {
	given := map[string]*os.File{}
	defer func() {
		for _, fs := range files {
			for _, f := range fs {
				f.Close() // those that were taken over are closed already, or copies
			}
		}
	}()
	for _, name := range []string{protocol.FileTun, protocol.FileMemory, protocol.FileNetwork} {
		if given[name] = single(files, name); given[name] == nil {
			return rpc.Errorf(rpc.Invalid, "netback: %s needs one %s", protocol.MethodAttachNIC, name)
		}
	}
	st, err := given[protocol.FileMemory].Stat()
	if err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return rpc.Errorf(rpc.Unavailable, "netback is going down")
	}
	at := slices.IndexFunc(s.config.NICs, func(n network.NIC) bool { return n.ID == in.ID })
	if at < 0 {
		return rpc.Errorf(rpc.Invalid, "netback: NIC %d is not in the network", in.ID)
	}
	s.drop(in.ID)
	cfg := s.config.NICs[at]
	tap, err := network.NewTap(given[protocol.FileTun], cfg.TapName())
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tap.File.Close()
		}
	}()
	// The tap may have been made just now: it becomes a port of its bridge.
	p, err := network.NewPlan(s.config, *s.filtering)
	if err == nil {
		err = network.Apply(p)
	}
	if err != nil {
		return err
	}
	b, err := s.device(tap, cfg.MAC, in.MTU, single(files, protocol.FileVhostNet))
	if err != nil {
		return err
	}
	c, err := net.FileConn(given[protocol.FileNetwork])
	if err != nil {
		return err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return errors.Join(errors.New("front end: not a Unix socket"), c.Close())
	}
	s.serve(in, u, b, vhostuser.Whitelist{st})
	return nil
}

// device is the NIC's back end: this process's own, or the kernel's.
func (s *service) device(tap *network.Tap, mac network.MAC, mtu uint16, vhost *os.File) (virtio.Backend, error) {
	if vhost != nil {
		own, err := unix.FcntlInt(vhost.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		return network.NewKernelNet(tap, os.NewFile(uintptr(own), network.VhostDevice), mac, mtu)
	}
	return virtio.NewNet(tap.Port(), mac, mtu)
}

// serve runs the NIC in a goroutine that drop waits for. s.mu is held.
func (s *service) serve(in protocol.AttachNIC, c *net.UnixConn, b virtio.Backend, allowed vhostuser.Whitelist) {
	ctx, cancel := context.WithCancel(context.Background())
	n := &nic{stop: cancel, done: make(chan struct{})}
	s.nics[in.ID] = n
	go func() {
		defer close(n.done)
		defer cancel()
		err := vhostuser.Serve(ctx, c, b, vhostuser.Options{Memory: allowed})
		if ctx.Err() != nil {
			err = nil
		}
		if err = errors.Join(err, b.Close()); err == nil {
			return
		}
		s.log.Error("nic", "id", in.ID, "err", err)
		f := protocol.NICFailed{ID: in.ID, Domain: in.Domain, Reason: err.Error()}
		if err := s.peer.Notify(protocol.NoticeNICFailed, f); err != nil {
			s.log.Warn("the Builder does not learn of it", "err", err)
		}
	}()
}
