package builder

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

// storage is a guest's BlkBack, which lives as long as the guest and is replaced when it dies.
//
// Each disk's connection is a pair made here: one end goes to BlkBack with the image and the
// guest's memory, the other to the emulator. After a death the new BlkBack and the emulator get
// new pairs; the emulator's front ends know the rest.
type storage struct {
	b *Builder
	g *guest

	mu     sync.Mutex // over one attachment or replacement, too
	proc   *process.Process
	peer   *rpc.Peer
	is     tenure   // in the audit log
	run    *run     // whose emulator has the disks; nil while there is none that runs
	memory *os.File // the run's guest memory
	stale  bool     // BlkBack was replaced before the run could be told
	ending bool
	ended  chan struct{} // closed with ending
	deaths deaths
}

// A BlkBack that dies more than maxDeaths times within deathWindow fails its guest, and a store
// that does ends the Builder: it is not the accident that replacing is for.
const (
	drainLimit  = 2 * time.Second // of a BlkBack's requests when it is replaced; then it is killed
	maxDeaths   = 20
	deathWindow = 10 * time.Second
)

// overlays counts the disks that have a base.
func overlays(disks []spec.Disk) (n int) {
	for _, d := range disks {
		if d.Base != "" {
			n++
		}
	}
	return n
}

// takeBases keeps the bases of disks that are overlays: build has counted them.
func (g *guest) takeBases(files map[string][]*os.File) {
	all := files[protocol.FileBase]
	delete(files, protocol.FileBase)
	for _, d := range g.build.Spec.Disks {
		var base *os.File
		if d.Base != "" {
			base, all = all[0], all[1:]
		}
		g.bases = append(g.bases, base)
	}
}

// newStorage starts BlkBack for a guest that has disks; nil for one that has none.
func (b *Builder) newStorage(g *guest) (*storage, error) {
	if len(g.disks) == 0 {
		return nil, nil
	}
	s := &storage{b: b, g: g, ended: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.spawn(); err != nil {
		return nil, err
	}
	// What took it over has it for that long at most.
	if d := b.cfg.Resets[services.BlkBack]; d > 0 {
		b.wg.Go(func() { every(d, s.ended, func() { s.reset() }) })
	}
	return s, nil
}

// reset replaces a BlkBack that runs well: the next one is started before this one ends its
// requests, so that the guest waits for the hand-over only. It reports whether it did.
func (s *storage) reset() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending || s.run == nil {
		return false
	}
	last, was := s.proc, s.is
	if err := s.spawn(); err != nil {
		s.b.log.Warn("BlkBack is not replaced", "guest", s.g.build.Spec.Name, "err", err)
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainLimit)
	defer cancel()
	if err := last.Stop(ctx); err != nil {
		s.b.log.Warn("BlkBack ended badly", "guest", s.g.build.Spec.Name, "err", err)
	}
	s.reattach()
	s.b.journal.note(s.b.journal.ended(was, last.Err(), []string{s.g.build.Spec.Name}))
	return true
}

// spawn starts a BlkBack. s.mu is held.
func (s *storage) spawn() error {
	p, err := s.b.procs.start(services.BlkBack, s.g.build.Spec.Name, "", uint64(s.g.build.Spec.Memory))
	if err != nil {
		return err
	}
	name := s.g.build.Spec.Name
	peer := rpc.New(p.Control, s.b.refusals(services.BlkBack, name, s.fromBlkBack))
	s.proc, s.peer, s.is = p, peer, newTenure(services.BlkBack, p)
	s.b.wg.Go(func() { _ = peer.Run(context.Background()) })
	s.b.wg.Go(func() {
		<-p.Done()
		peer.Close()
		s.replace(p)
	})
	j := s.b.journal
	err = j.record(j.started(s.is, "guest", name), j.linked(name, s.is), j.entry(ActHandOver, name, audit.Done,
		"to", services.BlkBack, audit.DetailInstance, s.is.id, "memory", strconv.FormatInt(int64(s.g.build.Spec.Memory), 10)))
	if err != nil {
		s.end()
		p.Kill()
	}
	return err
}

// end ends the replacing of BlkBacks. s.mu is held.
func (s *storage) end() {
	if !s.ending {
		s.ending = true
		close(s.ended)
	}
}

// attach gives a new emulator its disks: what it needs for each is returned.
func (s *storage) attach(ctx context.Context, r *run, memory *os.File) (fronts []*os.File, err error) {
	if s == nil {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, err := unix.FcntlInt(memory.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("disks: %w", err)
	}
	s.release()
	s.memory, s.stale = os.NewFile(uintptr(fd), "memory"), false
	defer func() {
		if err != nil {
			for _, f := range fronts {
				f.Close()
			}
		}
	}()
	for i := range s.g.disks {
		f, err := s.connect(ctx, i, r)
		if err != nil {
			return fronts, fmt.Errorf("disks[%d]: %w", i, err)
		}
		fronts = append(fronts, f)
	}
	return fronts, nil
}

// connect has BlkBack serve disk i and returns the front end's end. s.mu is held.
func (s *storage) connect(ctx context.Context, i int, r *run) (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	back, front := os.NewFile(uintptr(fds[0]), "disk"), os.NewFile(uintptr(fds[1]), "disk")
	defer back.Close()
	names := protocol.Files{protocol.FileDisk, protocol.FileMemory, protocol.FileBlock}
	files := []*os.File{s.g.disks[i], s.memory, back}
	if base := s.g.bases[i]; base != nil {
		names, files = append(names, protocol.FileBase), append(files, base)
	}
	_, err = s.peer.Call(ctx, protocol.MethodAttachDisk, protocol.AttachDisk{
		Index: i, ReadOnly: s.g.build.Spec.Disks[i].ReadOnly, Domain: r.domain, Files: names,
	}, nil, files...)
	if err != nil {
		front.Close()
		return nil, err
	}
	return front, nil
}

// setRun tells that the emulator which attach was for runs.
func (s *storage) setRun(r *run) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.run = r
	if s.stale {
		s.reattach()
	}
}

// detach tells that the emulator has ended.
func (s *storage) detach() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.release()
}

func (s *storage) release() {
	s.run = nil
	if s.memory != nil {
		s.memory.Close()
		s.memory = nil
	}
}

// replace follows a BlkBack's end.
func (s *storage) replace(dead *process.Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc != dead {
		return
	}
	s.b.journal.note(s.b.journal.ended(s.is, dead.Err(), []string{s.g.build.Spec.Name}))
	if s.ending {
		return
	}
	reason := "BlkBack ended without a word"
	if err := dead.Err(); err != nil {
		reason = err.Error()
	}
	s.b.log.Warn("BlkBack is replaced", "guest", s.g.build.Spec.Name, "err", reason)
	if s.deaths.add(time.Now()) {
		s.fail("storage dies again and again: " + reason)
		return
	}
	if err := s.spawn(); err != nil {
		s.fail(fmt.Sprintf("storage: %v", err))
		return
	}
	s.stale = s.memory != nil
	if s.run != nil {
		s.reattach()
	}
}

// reattach connects a new BlkBack with the running emulator. s.mu is held.
func (s *storage) reattach() {
	s.stale = false
	start := time.Now()
	for i := range s.g.disks {
		front, err := s.connect(context.Background(), i, s.run)
		if err == nil {
			_, err = s.run.peer.Call(context.Background(), protocol.MethodDisk,
				protocol.Disk{Index: i, Files: protocol.Files{protocol.FileBlock}}, nil, front)
			front.Close()
		}
		if err != nil {
			// Either of the two is gone or sick. The emulator's end is the guest's; a BlkBack
			// that cannot serve is replaced, within the bound.
			if !s.run.ended() {
				s.b.log.Warn("disk", "guest", s.g.build.Spec.Name, "index", i, "err", err)
				s.proc.Kill()
			}
			return
		}
	}
	s.b.event(s.g, protocol.Event{Kind: protocol.EventStorage, Text: fmt.Sprintf("BlkBack was replaced in %v", time.Since(start).Round(10*time.Microsecond))})
}

// fail ends the guest: it must not go on without its disks. s.mu is held.
func (s *storage) fail(reason string) {
	if s.run != nil {
		s.run.fail(reason)
		return
	}
	s.b.log.Error("storage", "guest", s.g.build.Spec.Name, "err", reason)
}

// fromBlkBack serves BlkBack's notices.
func (s *storage) fromBlkBack(_ context.Context, req *rpc.Request) (any, error) {
	if req.Method != protocol.NoticeDiskFailed {
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from BlkBack", req.Method)
	}
	var f protocol.DiskFailed
	if err := req.Decode(&f); err != nil {
		return nil, err
	}
	// Not here: a replacement may hold mu and wait for an answer that comes behind this notice.
	s.b.wg.Go(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.run != nil && s.run.domain == f.Domain {
			s.fail(fmt.Sprintf("disks[%d]: %s", f.Index, clip(f.Reason, 512)))
		}
	})
	return nil, nil
}

// close ends BlkBack with its guest.
func (s *storage) close() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.end()
	s.release()
	p := s.proc
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), stopGrace/2)
	defer cancel()
	if err := p.Stop(ctx); err != nil {
		s.b.log.Warn("BlkBack ended badly", "guest", s.g.build.Spec.Name, "err", err)
	}
}
