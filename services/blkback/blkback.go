// Package blkback is the BlkBack service: the disks of one guest (later: of one constraint tag),
// as vhost-user back ends over raw images. It has the images and the guest's memory and nothing
// else, and may be killed and replaced at any instant: what it knows is in its front ends'
// hands (see vhostuser.Frontend) and in the images.
package blkback

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
	"redoubt.dev/redoubt/virtio"
)

// service is one BlkBack process.
type service struct {
	log  *slog.Logger
	peer *rpc.Peer

	mu    sync.Mutex
	disks map[int]*disk
	ended bool
}

// disk is one disk's connection to a front end.
type disk struct {
	stop context.CancelFunc
	done chan struct{} // closed when nothing of it is left
}

// Serve runs the service until its control connection or ctx ends.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	s := &service{log: log, disks: map[int]*disk{}}
	s.peer = rpc.New(control, s.handle)
	err := s.peer.Run(ctx)
	s.mu.Lock()
	s.ended = true
	all := s.disks
	s.mu.Unlock()
	for _, d := range all {
		d.end()
	}
	return err
}

func (d *disk) end() {
	d.stop()
	<-d.done
}

func (s *service) handle(_ context.Context, r *rpc.Request) (any, error) {
	if r.Method != protocol.MethodAttachDisk {
		return nil, rpc.Errorf(rpc.Refused, "blkback: no call %q", r.Method)
	}
	var in protocol.AttachDisk
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	files, err := in.Files.Take(r)
	if err != nil {
		return nil, err
	}
	image, memory, front := files[protocol.FileDisk], files[protocol.FileMemory], files[protocol.FileBlock]
	if len(image) != 1 || len(memory) != 1 || len(front) != 1 {
		for _, fs := range files {
			for _, f := range fs {
				f.Close()
			}
		}
		return nil, rpc.Errorf(rpc.Invalid, "blkback: %s with other descriptors than image, memory and front end", r.Method)
	}
	return struct{}{}, s.attach(in, image[0], memory[0], front[0])
}

// attach serves a disk to a front end, in place of the last one's. It takes the files over.
func (s *service) attach(in protocol.AttachDisk, image, memory, front *os.File) error {
	defer memory.Close()
	defer front.Close()
	st, err := memory.Stat()
	if err != nil {
		image.Close()
		return fmt.Errorf("guest memory: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		image.Close()
		return rpc.Errorf(rpc.Unavailable, "blkback is going down")
	}
	if last := s.disks[in.Index]; last != nil {
		last.end()
		delete(s.disks, in.Index)
	}
	img, err := block.New(image, in.ReadOnly)
	if err != nil {
		return fmt.Errorf("disks[%d]: %w", in.Index, err)
	}
	b, err := virtio.NewBlock(img, fmt.Sprintf("redoubt-%d", in.Index))
	if err != nil {
		return errors.Join(fmt.Errorf("disks[%d]: %w", in.Index, err), img.Close())
	}
	c, err := net.FileConn(front)
	u, ok := c.(*net.UnixConn)
	if err != nil || !ok {
		return errors.Join(fmt.Errorf("disks[%d]: front end: not a Unix socket", in.Index), err, b.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := &disk{stop: cancel, done: make(chan struct{})}
	s.disks[in.Index] = d
	go func() {
		defer close(d.done)
		defer cancel()
		err := vhostuser.Serve(ctx, u, b, vhostuser.Options{Memory: vhostuser.Whitelist{st}})
		if ctx.Err() != nil {
			err = nil
		}
		if err = errors.Join(err, b.Close()); err == nil {
			return
		}
		s.log.Error("disk", "index", in.Index, "err", err)
		f := protocol.DiskFailed{Index: in.Index, Domain: in.Domain, Reason: err.Error()}
		if err := s.peer.Notify(protocol.NoticeDiskFailed, f); err != nil {
			s.log.Warn("the Builder does not learn of it", "err", err)
		}
	}()
	return nil
}
