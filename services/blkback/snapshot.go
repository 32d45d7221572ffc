package blkback

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// drainLimit is how long requests in flight may take to end before a moment is not safe: so long the guest's processors stand
// still beside what they do anyway.
const drainLimit = 10 * time.Millisecond

// snapshot begins a snapshot of the disks that it is asked for, all at one moment: no change of any of them is made
// meanwhile. Its emulator tells when the guest stands still, so that no request comes, and is told when it need not any more.
func (s *service) snapshot(in protocol.Snapshot, files map[string][]*os.File) (out protocol.Snapshotted, err error) {
	stopped, begun := files[protocol.FileStopped], files[protocol.FileBegun]
	memory := files[protocol.FileSnapshot]
	if len(stopped) != 1 || len(begun) != 1 || len(memory) != len(in.Disks) || len(in.Disks) == 0 ||
		!slices.IsSorted(in.Disks) || len(slices.Compact(slices.Clone(in.Disks))) != len(in.Disks) {
		return out, rpc.Errorf(rpc.Invalid, "blkback: descriptors %v for snapshots of disks %v", in.Files, in.Disks)
	}
	disks, snapshots, err := s.prepare(in, memory)
	defer func() {
		for _, n := range snapshots { // that no disk has taken
			err = errors.Join(err, n.Close())
		}
	}()
	if err != nil {
		return out, err
	}
	if err := stopped[0].SetReadDeadline(time.Now().Add(protocol.HoldLimit)); err != nil {
		return out, fmt.Errorf("stopped: %w", err)
	}
	if _, err := io.ReadFull(stopped[0], make([]byte, 1)); err != nil {
		return out, rpc.Errorf(rpc.Unavailable, "the guest was not stopped for a snapshot")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, d := range disks {
		if s.disks[in.Disks[i]] != d {
			return out, rpc.Errorf(rpc.Unavailable, "disks[%d]: the guest connected to it anew: ask again", in.Disks[i])
		}
	}
	// No request comes any more: those that are on their way are given a moment to end.
	drained := time.Now().Add(drainLimit)
	for _, d := range s.disks {
		d.rings.Drain(drained)
	}
	defer func() { // a snapshot that nobody learns of would take copies until its memory is full
		if err == nil || snapshots != nil {
			return
		}
		for _, d := range disks {
			err = errors.Join(err, d.image.Drop())
		}
	}()
	start := time.Now()
	for _, d := range disks {
		d.image.Hold()
		defer d.image.Release()
	}
	for _, d := range s.disks { // of those that are only read, too
		out.InFlight += d.rings.InFlight()
	}
	if out.InFlight == 0 || in.Force {
		for i, d := range disks {
			err = errors.Join(err, d.image.Begin(snapshots[i], in.Validated))
		}
		snapshots = nil // the disks'
	}
	out.Held = time.Since(start)
	if err == nil {
		_, err = begun[0].Write([]byte{1})
	}
	return out, err
}

// prepare is what of a snapshot needs no guest that stands still.
func (s *service) prepare(in protocol.Snapshot, memory []*os.File) (disks []*disk, snapshots []*block.Snapshot, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, index := range in.Disks {
		d := s.disks[index]
		if d == nil {
			return disks, snapshots, rpc.Errorf(rpc.Unavailable, "disks[%d]: the guest has no connection to it", index)
		}
		n, err := block.OpenSnapshot(memory[i], d.image.Size(), in.Scratch)
		if err != nil {
			return disks, snapshots, fmt.Errorf("disks[%d]: %w", index, err)
		}
		disks, snapshots = append(disks, d), append(snapshots, n)
	}
	return disks, snapshots, nil
}

// drop ends the snapshot of all disks.
func (s *service) drop() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.disks {
		err = errors.Join(err, d.image.Drop())
	}
	return err
}
