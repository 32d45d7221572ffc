package builder

import (
	"cmp"
	"context"
	"os"
	"strconv"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services"
	blkback "redoubt.dev/redoubt/services/blkback/kept"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/launch"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/tree"
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
		st, err := cmp.Or(g.Bases[i], g.Disks[i]).Stat() // an overlay is as large as its base
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
func (b *Builder) newStorage(g *guest) *blkback.Storage {
	return blkback.New(blkback.Options{
		Guest: g.name(), Spec: &g.Build.Spec, Disks: g.Disks, Bases: g.Bases, Changes: g.Changes, Log: b.log, Journal: b.journal,
		Start: func(more uint64) (keeper.Process, error) {
			return b.procs.Start(services.BlkBack, launch.Order{Whose: g.name(), Memory: g.memory() + more})
		},
		Record: func(i audit.Instance) []audit.Entry { return b.gives(g, i) },
		Tell:   func(kind, text string) { b.event(g, protocol.Event{Kind: kind, Text: text}) },
		Wrote:  func(n uint64) { b.validations.Wrote(g.Build.UUID, n) }, Dropped: func() bool { return b.validations.Dropped(g.Build.UUID) },
		Every: b.cfg.Resets[services.BlkBack], Drain: drainLimit, Stop: stopGrace / 2, Go: b.wg.Go,
	})
}

// A run is a blkback.Emulator.
func (r *run) Domain() tree.Domain { return r.domain }
func (r *run) Memory() *os.File    { return r.memory }
func (r *run) Fail(reason string)  { r.fail(reason) }
func (r *run) Ended() bool         { return r.ended() }
func (r *run) Call(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error) {
	return r.peer.Call(ctx, method, in, out, files...)
}

// gives are the records of a guest's dependence on a back end, which may touch its memory.
func (b *Builder) gives(g *guest, to audit.Instance) []audit.Entry {
	return []audit.Entry{b.journal.Linked(g.name(), to), b.journal.Entry(ActHandOver, g.name(), audit.Done, "to", to.Service,
		audit.DetailInstance, to.ID, "memory", strconv.FormatUint(g.memory(), 10))}
}
