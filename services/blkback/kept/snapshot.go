package kept

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	inspected "redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/keeper"
	"redoubt.dev/redoubt/services/protocol"
)

// The memory of a guest's snapshots and of the maps of its disks' changes is the Builder's: a BlkBack that is replaced gets
// it again.

// copies is how much memory a guest's BlkBack may take for copies of what is overwritten, in bytes.
func (s *Storage) copies() (sum uint64) {
	for _, d := range s.o.Spec.Disks {
		if !d.ReadOnly {
			sum += uint64(block.SnapshotSize(int64(s.o.Spec.Validated().Scratch)))
		}
	}
	return sum
}

// Snapshot has BlkBack begin a snapshot of all disks that can be written, once the guest stands still; see protocol.Hold for
// the two pipes. One that is lost over it may have begun one: the next is to be told that nothing was validated, so that no
// change is lost.
func (s *Storage) Snapshot(ctx context.Context, validated, force bool, stopped, begun *os.File) (out protocol.Snapshotted, err error) {
	s.Lock()
	defer s.Unlock()
	if s.run == nil {
		return out, rpc.Errorf(rpc.Unavailable, "the guest is being started: ask again")
	}
	s.forgetSnapshot()
	asked := false
	err = s.Serve(func(i *keeper.Instance) error {
		if asked { // by now the guest may run
			return rpc.Errorf(rpc.Unavailable, "BlkBack was lost over a snapshot: ask again")
		}
		asked = true
		in := protocol.Snapshot{Scratch: int64(s.o.Spec.Validated().Scratch), Validated: validated, Force: force}
		all := make([]*os.File, len(s.o.Disks))
		var files []*os.File
		for d := range s.o.Disks {
			if s.o.Changes[d] == nil {
				continue
			}
			f, err := memfd.New("snapshot", block.SnapshotSize(in.Scratch))
			if err != nil {
				ipc.CloseAll(files)
				return err
			}
			all[d], files = f, append(files, f)
			in.Disks, in.Files = append(in.Disks, d), append(in.Files, protocol.FileSnapshot)
		}
		if len(files) == 0 { // nothing of it can change
			s.snapshots = all
			_, err := begun.Write([]byte{1})
			return err
		}
		in.Files = append(in.Files, protocol.FileStopped, protocol.FileBegun)
		if _, err := i.Peer.Call(ctx, protocol.MethodSnapshot, in, &out, append(slices.Clone(files), stopped, begun)...); err != nil || out.InFlight > 0 && !force {
			ipc.CloseAll(files)
			return err
		}
		s.scratch, s.snapshots = in.Scratch, all
		return nil
	})
	return out, err
}

// DropSnapshot ends it.
func (s *Storage) DropSnapshot(ctx context.Context) error {
	s.Lock()
	defer s.Unlock()
	if s.snapshots == nil {
		return nil
	}
	s.forgetSnapshot() // a BlkBack that is started from here on knows of none
	i := s.Now()
	if i == nil {
		return nil
	}
	_, err := i.Peer.Call(ctx, protocol.MethodDropSnapshot, struct{}{}, nil)
	return err
}

func (s *Storage) forgetSnapshot() {
	for _, f := range s.snapshots {
		if f != nil {
			f.Close()
		}
	}
	s.snapshots = nil
}

// View is what an inspector needs to read the disks as they were at the snapshot: descriptors by which nothing can be changed.
func (s *Storage) View() (disks []inspected.Disk, err error) {
	s.Lock()
	defer s.Unlock()
	if s.snapshots == nil {
		return nil, rpc.Errorf(rpc.Unavailable, "there is no snapshot")
	}
	defer func() {
		if err != nil {
			inspected.CloseDisks(disks)
			disks = nil
		}
	}()
	for d := range s.o.Disks {
		v := inspected.Disk{Index: d, Scratch: s.scratch}
		for _, f := range []struct {
			from *os.File
			to   **os.File
		}{{s.o.Disks[d], &v.Image}, {s.o.Bases[d], &v.Base}, {s.o.Changes[d], &v.Changes}, {s.snapshots[d], &v.Snapshot}} {
			if f.from == nil {
				continue
			}
			if *f.to, err = memfd.ReadOnly(f.from); err != nil {
				return disks, fmt.Errorf("disks[%d]: %w", d, err)
			}
		}
		disks = append(disks, v)
	}
	return disks, nil
}

// written is how much a guest has written to its disks, as its BlkBacks tell.
type written struct {
	mu   sync.Mutex
	last map[int]uint64 // of each disk, since the present BlkBack has it
	sum  uint64
}

// leastWritten is how much a guest writes before its BlkBack tells, in bytes, at least.
const leastWritten = 1 << 20

// writtenEvery is after how many bytes BlkBack tells how much the guest has written; 0: nobody wants to know.
func (s *Storage) writtenEvery() uint64 {
	if w := uint64(s.o.Spec.Validated().Written); w > 0 {
		return max(w/8, leastWritten)
	}
	return 0
}

// wrote takes a BlkBack's word; a number that is less than the last is of another BlkBack.
func (s *Storage) wrote(in protocol.Written) {
	if in.Index < 0 || in.Index >= len(s.o.Disks) {
		return
	}
	w := &s.written
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last == nil {
		w.last = map[int]uint64{}
	}
	more := in.Bytes
	if last := w.last[in.Index]; last <= more {
		more -= last
	}
	w.last[in.Index] = in.Bytes
	w.sum += more
	s.o.Wrote(w.sum)
}
