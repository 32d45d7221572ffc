package builder

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/tree"
)

// storage is a guest's BlkBack, which lives as long as the guest and is replaced when it dies.
//
// Each disk's connection is a pair made here: one end goes to BlkBack with the image and the
// guest's memory, the other to the emulator. After a death the new BlkBack and the emulator get
// new pairs; the emulator's front ends know the rest.
type storage struct {
	*keeper.Keeper // its lock is over one attachment, too, and over what follows
	b              *Builder
	g              *guest

	run    *run        // whose emulator has the disks; nil while there is none that runs
	memory *os.File    // the run's guest memory
	domain tree.Domain // of the run, also while it is being started
	stale  bool        // BlkBack was replaced before the run could be told

	scratch   int64      // of each of snapshots, in bytes
	snapshots []*os.File // of the disks, nil of those that are only read; nil while there is none
}

// drainLimit is how long requests may take to end in a back end that is replaced.
const drainLimit = 2 * time.Second

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
	for _, d := range g.Build.Spec.Disks {
		var base *os.File
		if d.Base != "" {
			base, all = all[0], all[1:]
		}
		g.Bases = append(g.Bases, base)
	}
}

// makeChanges makes the maps of the changes of a guest's disks.
func (g *guest) makeChanges() error {
	for i, d := range g.Build.Spec.Disks {
		g.Changes = append(g.Changes, nil)
		if d.ReadOnly {
			continue
		}
		f := g.Disks[i]
		if g.Bases[i] != nil { // an overlay is as large as its base
			f = g.Bases[i]
		}
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if g.Changes[i], err = memfd.New("changes", block.ChangesSize(st.Size())); err != nil {
			return err
		}
	}
	return nil
}

// newStorage is for a guest that has disks; nil for one that has none. BlkBack is not started yet.
func (b *Builder) newStorage(g *guest) *storage {
	if len(g.Disks) == 0 {
		return nil
	}
	s := &storage{b: b, g: g}
	s.Keeper = keeper.New(keeper.Options{
		Service: services.BlkBack, About: g.name(), Log: b.log, Journal: b.journal,
		Start: func() (keeper.Process, error) {
			return b.procs.Start(services.BlkBack, launch.Order{Whose: g.name(), Memory: g.memory() + g.copies()})
		},
		Handler: func(*keeper.Instance) rpc.Handler {
			return calls.Watched(b.journal, services.BlkBack, g.name(), s.fromBlkBack)
		},
		Ready:  s.ready,
		Detail: []string{"guest", g.name()},
		Record: func(i *keeper.Instance) []audit.Entry { return b.gives(g, i.Name) },
		Guests: func() []string { return []string{g.name()} },
		Lost: func(err error) {
			if s.run != nil { // it must not go on without its disks
				s.run.fail(fmt.Sprintf("storage: %v", err))
			}
		},
		Idle:    func() bool { return s.run == nil },
		Overlap: true, Drain: drainLimit,
		Every: b.cfg.Resets[services.BlkBack], // what took it over has it for that long at most
	})
	return s
}

// open starts BlkBack. Where the guest has a run already, that is given its disks.
func (s *storage) open(ctx context.Context, r *run) error {
	if s == nil {
		return nil
	}
	s.Lock()
	defer s.Unlock()
	if r != nil {
		own, err := ipc.Duplicate(r.memory)
		if err != nil {
			return fmt.Errorf("disks: %w", err)
		}
		s.run, s.memory, s.domain = r, own[0], r.domain
	}
	return s.Begin(ctx)
}

// gives are the records of a guest's dependence on a back end, which may touch its memory.
func (b *Builder) gives(g *guest, to audit.Instance) []audit.Entry {
	return []audit.Entry{b.journal.Linked(g.name(), to), b.journal.Entry(ActHandOver, g.name(), audit.Done, "to", to.Service,
		audit.DetailInstance, to.ID, "memory", strconv.FormatUint(g.memory(), 10))}
}

// attach gives a new emulator its disks: what it needs for each is returned.
func (s *storage) attach(ctx context.Context, r *run, memory *os.File) (fronts []*os.File, err error) {
	if s == nil {
		return nil, nil
	}
	s.Lock()
	defer s.Unlock()
	own, err := ipc.Duplicate(memory)
	if err != nil {
		return nil, fmt.Errorf("disks: %w", err)
	}
	s.release()
	err = s.Serve(func(i *keeper.Instance) error {
		s.memory, s.stale = nil, false
		ipc.CloseAll(fronts)
		fronts = nil
		for d := range s.g.Disks {
			f, err := s.connect(ctx, i, d, r, own[0])
			if err != nil {
				return fmt.Errorf("disks[%d]: %w", d, err)
			}
			fronts = append(fronts, f)
		}
		return nil
	})
	if err != nil {
		ipc.CloseAll(append(fronts, own...))
		return nil, err
	}
	s.memory, s.domain = own[0], r.domain
	return fronts, nil
}

// connect has BlkBack serve disk d and returns the front end's end.
func (s *storage) connect(ctx context.Context, i *keeper.Instance, d int, r *run, memory *os.File) (*os.File, error) {
	back, front, err := ipc.Streams("disk")
	if err != nil {
		return nil, err
	}
	defer back.Close()
	names := protocol.Files{protocol.FileDisk, protocol.FileMemory, protocol.FileBlock}
	files := []*os.File{s.g.Disks[d], memory, back}
	if base := s.g.Bases[d]; base != nil {
		names, files = append(names, protocol.FileBase), append(files, base)
	}
	if f := s.g.Changes[d]; f != nil {
		names, files = append(names, protocol.FileChanges), append(files, f)
	}
	if s.snapshots != nil && s.snapshots[d] != nil {
		names, files = append(names, protocol.FileSnapshot), append(files, s.snapshots[d])
	}
	_, err = i.Peer.Call(ctx, protocol.MethodAttachDisk, protocol.AttachDisk{
		Index: d, ReadOnly: s.g.Build.Spec.Disks[d].ReadOnly, Domain: r.domain, Scratch: s.scratch, Written: s.g.writtenEvery(), Files: names,
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
	s.Lock()
	defer s.Unlock()
	s.run = r
	_ = s.Serve(func(i *keeper.Instance) error {
		if !s.stale {
			return nil
		}
		return s.ready(context.Background(), i)
	})
}

// detach tells that the emulator has ended.
func (s *storage) detach() {
	if s == nil {
		return
	}
	s.Lock()
	defer s.Unlock()
	s.release()
}

func (s *storage) release() {
	s.run = nil
	if s.memory != nil {
		s.memory.Close()
		s.memory = nil
	}
}

// ready connects a new BlkBack with the emulator, if that runs.
func (s *storage) ready(ctx context.Context, i *keeper.Instance) error {
	s.stale = s.run == nil && s.memory != nil
	if s.run == nil {
		return nil
	}
	start := time.Now()
	for d := range s.g.Disks {
		front, err := s.connect(ctx, i, d, s.run, s.memory)
		if err == nil {
			_, err = s.run.peer.Call(ctx, protocol.MethodDisk,
				protocol.Disk{Index: d, Files: protocol.Files{protocol.FileBlock}}, nil, front)
			front.Close()
		}
		if err != nil {
			// Either of the two is gone or sick. The emulator's end is the guest's; a BlkBack
			// that cannot serve is replaced, within the bound.
			if s.run.ended() {
				return nil
			}
			return fmt.Errorf("disks[%d]: %w: %v", d, keeper.ErrSick, err) //nolint:errorlint // whoever is gone
		}
	}
	s.b.event(s.g, protocol.Event{Kind: protocol.EventStorage, Text: fmt.Sprintf("BlkBack was replaced in %v", time.Since(start).Round(10*time.Microsecond))})
	return nil
}

// fromBlkBack serves BlkBack's notices.
func (s *storage) fromBlkBack(_ context.Context, req *rpc.Request) (any, error) {
	if req.Method == protocol.NoticeWritten {
		return rpc.Answer(req, func(in protocol.Written) (any, error) {
			s.g.wrote(in, s.b.validations.Wrote)
			return nil, nil
		})
	}
	if req.Method != protocol.NoticeDiskFailed {
		return nil, rpc.Errorf(rpc.Refused, "builder: no call %q from BlkBack", req.Method)
	}
	var f protocol.DiskFailed
	if err := req.Decode(&f); err != nil {
		return nil, err
	}
	// Not here: a replacement may hold the lock and wait for an answer that comes behind this notice.
	s.b.wg.Go(func() {
		s.Lock()
		defer s.Unlock()
		if s.run != nil && s.run.domain == f.Domain {
			s.run.fail(fmt.Sprintf("disks[%d]: %s", f.Index, clip(f.Reason, 512)))
		}
	})
	return nil, nil
}

// close ends BlkBack with its guest.
func (s *storage) close() {
	if s == nil {
		return
	}
	s.Lock()
	s.release()
	s.forgetSnapshot()
	s.Unlock()
	s.Close(stopGrace / 2)
}
