// Package blkback is the BlkBack service: the disks of one guest (later: of one constraint tag),
// as vhost-user back ends over raw images and overlays. It has the images and the guest's memory and nothing
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
	overlaid int64 // bytes, of an overlay
	stop     context.CancelFunc
	done     chan struct{} // closed when nothing of it is left
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
	image, memory, front, base := files[protocol.FileDisk], files[protocol.FileMemory], files[protocol.FileBlock], files[protocol.FileBase]
	if len(image) != 1 || len(memory) != 1 || len(front) != 1 || len(base) > 1 {
		for _, fs := range files {
			for _, f := range fs {
				f.Close()
			}
		}
		return nil, rpc.Errorf(rpc.Invalid, "blkback: %s with other descriptors than image, memory, front end and base", r.Method)
	}
	return struct{}{}, s.attach(in, append(image, base...), memory[0], front[0])
}

// image opens a disk, of its file, or of an overlay's and its base's, which it takes over. What
// all overlays hold in memory is bounded. s.mu is held.
func (s *service) image(files []*os.File, readOnly bool) (img block.Image, overlaid int64, err error) {
	if len(files) == 1 {
		img, err = block.New(files[0], readOnly)
		return img, 0, err
	}
	o, err := block.NewOverlay(files[0], files[1], readOnly)
	if err != nil {
		return nil, 0, err
	}
	for _, d := range s.disks {
		overlaid += d.overlaid
	}
	if overlaid+o.Size() > block.MaxOverlay {
		return nil, 0, errors.Join(fmt.Errorf("overlays of one guest of %d bytes: the most is %d", overlaid+o.Size(), int64(block.MaxOverlay)), o.Close())
	}
	return o, o.Size(), nil
}

// attach serves a disk to a front end, in place of the last one's. It takes the files over.
func (s *service) attach(in protocol.AttachDisk, image []*os.File, memory, front *os.File) error {
	closeImage := func() {
		for _, f := range image {
			f.Close()
		}
	}
	defer memory.Close()
	defer front.Close()
	st, err := memory.Stat()
	if err != nil {
		closeImage()
		return fmt.Errorf("guest memory: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		closeImage()
		return rpc.Errorf(rpc.Unavailable, "blkback is going down")
	}
	if last := s.disks[in.Index]; last != nil {
		last.end()
		delete(s.disks, in.Index)
	}
	img, overlaid, err := s.image(image, in.ReadOnly)
	if err != nil {
		return err
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
	d := &disk{overlaid: overlaid, stop: cancel, done: make(chan struct{})}
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
