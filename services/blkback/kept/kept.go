// Package kept is the Builder's side of a guest's BlkBack: it keeps one running, gives each the disks again, has it take
// snapshots, and keeps what must outlive it: the maps of the disks' changes and the memory of snapshots.
package kept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/tree"
)

// An Emulator is one that runs a guest.
type Emulator interface {
	Domain() tree.Domain
	Memory() *os.File // the guest's
	Call(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error)
	Fail(reason string) // ends the guest
	Ended() bool
}

// Options of a guest's storage. All are required.
type Options struct {
	Guest   string // as the log has it
	Spec    *spec.Guest
	Disks   []*os.File
	Bases   []*os.File // of those that are overlays, else nil
	Changes []*os.File // maps of changes, nil of those that are only read
	Log     *slog.Logger
	Journal *audit.Journal
	// Start starts a BlkBack that may take so much memory beside its own and the guest's, in bytes.
	Start  func(more uint64) (keeper.Process, error)
	Record func(audit.Instance) []audit.Entry // what is recorded with a start
	Tell   func(kind, text string)
	Wrote  func(bytes uint64) // is told how much the guest has written; returns at once
	// Dropped says whether the guest's disks answer nothing but errors. Each BlkBack is told.
	Dropped func() bool
	Every   time.Duration // how often BlkBack is replaced that runs well
	Drain   time.Duration // how long it may then take to end
	Stop    time.Duration // and with its guest
	Go      func(func())  // runs a goroutine that the Builder waits for
}

// Storage is a guest's BlkBack, which lives as long as the guest and is replaced when it dies. A nil one is of a guest without
// disks.
//
// Each disk's connection is a pair made here: one end goes to BlkBack with the image and the
// guest's memory, the other to the emulator. After a death the new BlkBack and the emulator get
// new pairs; the emulator's front ends know the rest.
type Storage struct {
	*keeper.Keeper // its lock is over one attachment, too, and over what follows
	o              Options

	run    Emulator    // that has the disks; nil while there is none that runs
	memory *os.File    // its guest memory
	domain tree.Domain // its domain, also while it is being started
	stale  bool        // BlkBack was replaced before it could be told

	scratch   int64      // of each of snapshots, in bytes
	snapshots []*os.File // of the disks, nil of those that are only read; nil while there is none
	written   written
}

// New is for a guest that has disks; nil for one that has none. BlkBack is not started yet.
func New(o Options) *Storage {
	if len(o.Disks) == 0 {
		return nil
	}
	s := &Storage{o: o}
	s.Keeper = keeper.New(keeper.Options{
		Service: services.BlkBack, About: o.Guest, Log: o.Log, Journal: o.Journal,
		Start: func() (keeper.Process, error) { return o.Start(s.copies()) },
		Handler: func(*keeper.Instance) rpc.Handler {
			return calls.Watched(o.Journal, services.BlkBack, o.Guest, s.fromBlkBack)
		},
		Ready:  s.ready,
		Detail: []string{"guest", o.Guest},
		Record: func(i *keeper.Instance) []audit.Entry { return o.Record(i.Name) },
		Guests: func() []string { return []string{o.Guest} },
		Lost: func(err error) {
			if s.run != nil { // it must not go on without its disks
				s.run.Fail(fmt.Sprintf("storage: %v", err))
			}
		},
		Idle:    func() bool { return s.run == nil },
		Overlap: true, Drain: o.Drain,
		Every: o.Every, // what took it over has it for that long at most
	})
	return s
}

// Open starts BlkBack. Where the guest has a run already, that is given its disks.
func (s *Storage) Open(ctx context.Context, r Emulator) error {
	if s == nil {
		return nil
	}
	s.Lock()
	defer s.Unlock()
	if r != nil {
		own, err := ipc.Duplicate(r.Memory())
		if err != nil {
			return fmt.Errorf("disks: %w", err)
		}
		s.run, s.memory, s.domain = r, own[0], r.Domain()
	}
	return s.Begin(ctx)
}

// Attach gives a new emulator its disks: what it needs for each is returned.
func (s *Storage) Attach(ctx context.Context, of tree.Domain, memory *os.File) (fronts []*os.File, err error) {
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
		for d := range s.o.Disks {
			f, err := s.connect(ctx, i, d, of, own[0])
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
	s.memory, s.domain = own[0], of
	return fronts, nil
}

// connect has BlkBack serve disk d and returns the front end's end.
func (s *Storage) connect(ctx context.Context, i *keeper.Instance, d int, of tree.Domain, memory *os.File) (*os.File, error) {
	back, front, err := ipc.Streams("disk")
	if err != nil {
		return nil, err
	}
	defer back.Close()
	names := protocol.Files{protocol.FileDisk, protocol.FileMemory, protocol.FileBlock}
	files := []*os.File{s.o.Disks[d], memory, back}
	if base := s.o.Bases[d]; base != nil {
		names, files = append(names, protocol.FileBase), append(files, base)
	}
	if f := s.o.Changes[d]; f != nil {
		names, files = append(names, protocol.FileChanges), append(files, f)
	}
	if s.snapshots != nil && s.snapshots[d] != nil {
		names, files = append(names, protocol.FileSnapshot), append(files, s.snapshots[d])
	}
	_, err = i.Peer.Call(ctx, protocol.MethodAttachDisk, protocol.AttachDisk{
		Index: d, ReadOnly: s.o.Spec.Disks[d].ReadOnly, Domain: of, Scratch: s.scratch, Written: s.writtenEvery(), Dropped: s.o.Dropped(), Files: names,
	}, nil, files...)
	if err != nil {
		front.Close()
		return nil, err
	}
	return front, nil
}

// Restrict has BlkBack serve the disks, or none of their requests, as Dropped says now. A BlkBack that is lost over it is followed
// by one that does.
func (s *Storage) Restrict(ctx context.Context) error {
	if s == nil {
		return nil
	}
	s.Lock()
	defer s.Unlock()
	return s.Serve(func(i *keeper.Instance) error {
		_, err := i.Peer.Call(ctx, protocol.MethodDropDisks, protocol.DropDisks{Dropped: s.o.Dropped()}, nil)
		return err
	})
}

// Runs tells that the emulator which Attach was for runs.
func (s *Storage) Runs(r Emulator) {
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

// Detach tells that the emulator has ended.
func (s *Storage) Detach() {
	if s == nil {
		return
	}
	s.Lock()
	defer s.Unlock()
	s.release()
}

func (s *Storage) release() {
	s.run = nil
	if s.memory != nil {
		s.memory.Close()
		s.memory = nil
	}
}

// tellLimit bounds what an emulator may take to take a new BlkBack; its guest is failed then.
const tellLimit = 20 * time.Second

// ready connects a new BlkBack with the emulator, if that runs.
func (s *Storage) ready(ctx context.Context, i *keeper.Instance) error {
	s.stale = s.run == nil && s.memory != nil
	if s.run == nil {
		return nil
	}
	start := time.Now()
	for d := range s.o.Disks {
		front, err := s.connect(ctx, i, d, s.run.Domain(), s.memory)
		if err == nil {
			told, cancel := context.WithTimeout(ctx, tellLimit)
			_, err = s.run.Call(told, protocol.MethodDisk,
				protocol.Disk{Index: d, Files: protocol.Files{protocol.FileBlock}}, nil, front)
			cancel()
			front.Close()
			if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
				s.run.Fail(fmt.Sprintf("disks[%d]: its emulator was told of a new BlkBack and has not answered in %v", d, tellLimit))
				return nil
			}
		}
		if err != nil {
			// Either of the two is gone or sick. The emulator's end is the guest's; a BlkBack
			// that cannot serve is replaced, within the bound.
			if s.run.Ended() {
				return nil
			}
			return fmt.Errorf("disks[%d]: %w: %v", d, keeper.ErrSick, err) //nolint:errorlint // whoever is gone
		}
	}
	s.o.Tell(protocol.EventStorage, fmt.Sprintf("BlkBack was replaced in %v", time.Since(start).Round(10*time.Microsecond)))
	return nil
}

// fromBlkBack serves BlkBack's notices.
func (s *Storage) fromBlkBack(_ context.Context, req *rpc.Request) (any, error) {
	if req.Method == protocol.NoticeWritten {
		return rpc.Answer(req, func(in protocol.Written) (any, error) {
			s.wrote(in)
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
	s.o.Go(func() {
		s.Lock()
		defer s.Unlock()
		if s.run != nil && s.run.Domain() == f.Domain {
			s.run.Fail(fmt.Sprintf("disks[%d]: %.512s", f.Index, f.Reason))
		}
	})
	return nil, nil
}

// End ends BlkBack with its guest.
func (s *Storage) End() {
	if s == nil {
		return
	}
	s.Lock()
	s.release()
	s.forgetSnapshot()
	s.Unlock()
	s.Close(s.o.Stop)
}

// Again has the BlkBack that there is serve a disk of the emulator that is being started, or the next one.
func (s *Storage) Again(ctx context.Context, of tree.Domain, d int) (f *os.File, err error) {
	s.Lock()
	defer s.Unlock()
	if s.memory == nil || s.run != nil || s.domain != of {
		return nil, ErrRuns
	}
	err = s.Serve(func(i *keeper.Instance) (err error) {
		f, err = s.connect(ctx, i, d, of, s.memory)
		return err
	})
	return f, err
}

// ErrRuns refuses an emulator whose guest runs, or that is none of this guest's.
var ErrRuns = rpc.Errorf(rpc.Refused, "builder: an emulator whose guest runs, or is none of this guest's, asks for a back end")
