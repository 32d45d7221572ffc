package vtpm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/services/foreign"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vtpm/backend"
	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/journal"
	"redoubt.dev/redoubt/vtpm/manager"
)

// keepLimit bounds the call with which an engine is given into the Builder's keeping.
const keepLimit = 10 * time.Second

// keep gives the manager's end of an engine into the Builder's keeping, before the engine is used.
func (g *guest) keep(k engine.Kept) error {
	files := []*os.File{k.Control, k.Data}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	line, output, err := foreign.Handles(k.Process)
	if err != nil {
		return err
	}
	files = append(files, line, output)
	ctx, stop := context.WithTimeout(g.ctx, keepLimit)
	defer stop()
	_, err = g.s.peer.Call(ctx, protocol.MethodKeep, protocol.Keep{
		UUID: g.uuid, PID: k.Process.PID(),
		Files: protocol.Files{protocol.FileControl, protocol.FileData, protocol.FileLifeline, protocol.FileOutput},
	}, nil, files...)
	if err != nil {
		return fmt.Errorf("keep the engine: %w", err)
	}
	return nil
}

// inherit goes on with a guest of a manager that was killed.
func (s *service) inherit(ctx context.Context, r *rpc.Request) (any, error) {
	var in protocol.Inherit
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	files, err := in.Files.Take(r)
	if err != nil {
		return nil, err
	}
	defer closeFiles(files)
	count := func(name string) int { return len(files[name]) }
	engines := count(protocol.FileControl)
	if count(protocol.FileJournal) != 1 || count(protocol.FileTPM) > 1 || engines > 1 ||
		count(protocol.FileData) != engines || count(protocol.FileLifeline) != engines || count(protocol.FileOutput) != engines {
		return nil, rpc.Errorf(rpc.Invalid, "vTPM: inherit needs one journal, and at most one channel and one engine")
	}
	fresh := false
	g, err := s.join(in.UUID, func() (j *journal.Journal, err error) {
		j, fresh, err = journal.OpenFile(files[protocol.FileJournal][0])
		return j, err
	})
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	err = manager.ErrNotReady
	if engines == 1 {
		err = g.adopt(ctx, in.PID, files, fresh)
	}
	ready := err == nil
	switch {
	case ready:
	case !fresh && g.journal.Is(journal.Open|journal.Durable):
		return nil, err // the guest has used it: before both no command runs
	case !errors.Is(err, manager.ErrNotReady):
		s.log.Warn("a vTPM is started anew", "guest", in.UUID, "err", err)
	}
	if count(protocol.FileTPM) == 1 {
		if err := g.goOn(in.Attach, files[protocol.FileTPM], ready); err != nil {
			return nil, err
		}
	}
	return protocol.Inherited{Ready: ready}, nil
}

// adopt finds the guest's device over the engine in files. g.mu is held.
func (g *guest) adopt(ctx context.Context, pid int, files map[string][]*os.File, fresh bool) error {
	o := manager.Orphan{
		Journal: g.journal, Control: files[protocol.FileControl][0], Data: files[protocol.FileData][0],
		Process: func(w io.Writer) (programs.Running, error) {
			line, output := files[protocol.FileLifeline][0], files[protocol.FileOutput][0]
			delete(files, protocol.FileLifeline) // the process has them
			delete(files, protocol.FileOutput)
			return foreign.Adopt(pid, line, output, w), nil
		},
	}
	if fresh {
		return errors.Join(manager.ErrNotReady, o.End())
	}
	d, err := g.s.manager.Adopt(ctx, g.uuid, o)
	if err != nil {
		return err
	}
	g.device, g.number, g.log = d, d.Instance(), g.journal.Log()
	g.s.wg.Go(func() { g.watchManufacture(d) })
	return nil
}

// goOn serves the guest's emulator: at once where the gate was open. g.mu is held.
func (g *guest) goOn(in protocol.Attach, ch []*os.File, ready bool) error {
	if !ready || !g.journal.Is(journal.Open) {
		again := func(ctx context.Context, opt backend.Options) (*backend.Backend, error) {
			opt.Again, opt.Fresh = true, false
			return g.s.hub.Attach(ctx, opt)
		}
		if err := g.serve(in, ch, again); err != nil || !ready {
			return err
		}
		back := g.back
		g.work.Go(func() {
			if err := g.up(back); err != nil {
				back.Fail(err.Error())
			}
		})
		return nil
	}
	log := g.log
	if !g.journal.Is(journal.GuestLog) {
		log = nil
	}
	return g.serve(in, ch, func(ctx context.Context, opt backend.Options) (*backend.Backend, error) {
		return g.s.hub.Resume(ctx, opt, g.device, log)
	})
}
