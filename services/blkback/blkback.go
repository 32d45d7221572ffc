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
	image    *block.Tracked
	device   *virtio.Block
	rings    *vhostuser.Rings
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
	switch r.Method {
	case protocol.MethodAttachDisk:
		return rpc.Answer(r, func(in protocol.AttachDisk) (any, error) {
			files, err := in.Files.Take(r)
			if err != nil {
				return nil, err
			}
			return struct{}{}, s.attach(in, files)
		})
	case protocol.MethodSnapshot:
		defer ipc.CloseAll(r.Files)
		return rpc.Answer(r, func(in protocol.Snapshot) (any, error) {
			files, err := in.Files.Take(r)
			if err != nil {
				return nil, err
			}
			return s.snapshot(in, files)
		})
	case protocol.MethodDropDisks:
		ipc.CloseAll(r.Files)
		return rpc.Answer(r, func(in protocol.DropDisks) (any, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, d := range s.disks {
				d.device.Drop(in.Dropped)
			}
			return struct{}{}, nil
		})
	case protocol.MethodDropSnapshot:
		ipc.CloseAll(r.Files)
		return struct{}{}, s.drop()
	}
	ipc.CloseAll(r.Files)
	return nil, rpc.Errorf(rpc.Refused, "blkback: no call %q", r.Method)
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

// given are the descriptors of one disk.
type given struct {
	image, memory, front *os.File
	base                 *os.File // nil but for an overlay's
	changes, snapshot    *os.File // nil: there is none
}

func take(in protocol.AttachDisk, files map[string][]*os.File) (g given, err error) {
	for name, into := range map[string]**os.File{
		protocol.FileDisk: &g.image, protocol.FileMemory: &g.memory, protocol.FileBlock: &g.front, protocol.FileBase: &g.base,
		protocol.FileChanges: &g.changes, protocol.FileSnapshot: &g.snapshot,
	} {
		if len(files[name]) == 1 {
			*into = files[name][0]
			delete(files, name)
		}
	}
	if len(files) != 0 || g.image == nil || g.memory == nil || g.front == nil {
		for _, more := range files {
			ipc.CloseAll(more)
		}
		g.close(true)
		return g, rpc.Errorf(rpc.Invalid, "blkback: disks[%d]: other descriptors than image, memory, front end, base, changes and snapshot", in.Index)
	}
	return g, nil
}

// close closes what nobody takes over, and if all says so the image, too.
func (g *given) close(all bool) {
	for _, f := range []*os.File{g.memory, g.front, g.changes, g.snapshot} {
		if f != nil {
			f.Close()
		}
	}
	if !all {
		return
	}
	for _, f := range []*os.File{g.image, g.base} {
		if f != nil {
			f.Close()
		}
	}
}

// open opens a disk, noting its changes where they are to be noted. s.mu is held.
func (s *service) open(in protocol.AttachDisk, g given) (*block.Tracked, int64, error) {
	files := []*os.File{g.image}
	if g.base != nil {
		files = append(files, g.base)
	}
	img, overlaid, err := s.image(files, in.ReadOnly)
	if err != nil {
		return nil, 0, err
	}
	var changes *block.Changes
	var snapshot *block.Snapshot
	if g.changes != nil {
		changes, err = block.OpenChanges(g.changes, img.Size())
	}
	if err == nil && g.snapshot != nil {
		snapshot, err = block.OpenSnapshot(g.snapshot, img.Size(), in.Scratch)
	}
	tracked := block.NewTracked(img, changes, snapshot)
	if in.Written > 0 {
		tracked.OnWritten(in.Written, func(n uint64) {
			// Its reader takes notices as they come. One that is lost is followed by another.
			_ = s.peer.Notify(protocol.NoticeWritten, protocol.Written{Index: in.Index, Bytes: n})
		})
	}
	if err != nil {
		return nil, 0, errors.Join(err, tracked.Close())
	}
	return tracked, overlaid, nil
}

// attach serves a disk to a front end, in place of the last one's. It takes the files over.
func (s *service) attach(in protocol.AttachDisk, files map[string][]*os.File) error {
	g, err := take(in, files)
	if err != nil {
		return err
	}
	defer g.close(false)
	st, err := g.memory.Stat()
	if err != nil {
		g.close(true)
		return fmt.Errorf("guest memory: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		g.close(true)
		return rpc.Errorf(rpc.Unavailable, "blkback is going down")
	}
	if last := s.disks[in.Index]; last != nil {
		last.end()
		delete(s.disks, in.Index)
	}
	img, overlaid, err := s.open(in, g)
	if err != nil {
		return err
	}
	b, err := virtio.NewBlock(img, fmt.Sprintf("redoubt-%d", in.Index))
	if err != nil {
		return errors.Join(fmt.Errorf("disks[%d]: %w", in.Index, err), img.Close())
	}
	b.Drop(in.Dropped)
	c, err := net.FileConn(g.front)
	u, ok := c.(*net.UnixConn)
	if err != nil || !ok {
		return errors.Join(fmt.Errorf("disks[%d]: front end: not a Unix socket", in.Index), err, b.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	d := &disk{image: img, device: b, rings: vhostuser.NewRings(), overlaid: overlaid, stop: cancel, done: make(chan struct{})}
	s.disks[in.Index] = d
	go func() {
		defer close(d.done)
		defer cancel()
		err := vhostuser.Serve(ctx, u, b, vhostuser.Options{Memory: vhostuser.Whitelist{st}, Rings: d.rings})
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
