package vhostuser

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/virtio"
)

const (
	opRead  = 0
	opWrite = 1
	opFlush = 4
	opID    = 8

	diskSize = 1 << 20
)

func disk(t testing.TB, path string) *virtio.Block {
	t.Helper()
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		create(t, path, diskSize)
	}
	b, err := openDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func create(t testing.TB, path string, size int64) {
	t.Helper()
	if err := block.Create(path, size); err != nil {
		t.Fatal(err)
	}
}

func openDisk(path string) (*virtio.Block, error) {
	image, err := block.Open(path, false)
	if err != nil {
		return nil, err
	}
	return virtio.NewBlock(image, "disk-1")
}

func TestBlock(t *testing.T) {
	b := disk(t, filepath.Join(t.TempDir(), "disk"))
	defer func() { _ = b.Close() }()
	f := newFront(t)
	f.serve(b)
	f.start()
	p := f.must(getConfig, append(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, 0), 60), make([]byte, 64)...), true)
	if n := binary.LittleEndian.Uint64(p[configHead:]); n != diskSize/512 {
		t.Errorf("capacity of %d sectors", n)
	}
	if n := binary.LittleEndian.Uint64(f.must(getQueueNum, nil, true)); n != 1 {
		t.Errorf("%d queues", n)
	}
	for round := range 50 { // more than the rings' length
		for i := range slots {
			copy(f.data(i), bytes.Repeat([]byte{byte(round), byte(i)}, 256))
			f.submit(i, opWrite, uint64(i), 512)
		}
		for range slots {
			if i := f.next(); *f.status(i) != 0 {
				t.Fatalf("write %d: status %d", i, *f.status(i))
			}
		}
	}
	if s := f.do(0, opFlush, 0, 0); s != 0 {
		t.Errorf("flush: status %d", s)
	}
	if s := f.do(1, opRead, 7, 512); s != 0 || !bytes.Equal(f.data(1)[:512], bytes.Repeat([]byte{49, 7}, 256)) {
		t.Errorf("read: status %d, % x…", s, f.data(1)[:4])
	}
	if s := f.do(2, opID, 0, 20); s != 0 || string(f.data(2)[:6]) != "disk-1" {
		t.Errorf("identity: status %d, %q", s, f.data(2)[:6])
	}
	// Stopped and started again, as by a reboot of the guest.
	if p := f.must(getVringBase, vringState{0, 0}.bytes(), true); uint16(binary.LittleEndian.Uint32(p[4:])) != f.avail {
		t.Errorf("stopped at %d, %d requests were made", binary.LittleEndian.Uint32(p[4:]), f.avail)
	}
	f.submit(3, opRead, 7, 512)
	f.must(setVringKick, u64(0), false, f.kick)
	if i := f.next(); i != 3 || *f.status(3) != 0 {
		t.Errorf("after the restart: request %d, status %d", i, *f.status(3))
	}
	// Memory laid out anew under a running ring.
	f.must(setMemTable, table(region{guestBase, memSize / 2, userBase, 0}, region{guestBase + memSize/2, memSize / 2, userBase + memSize/2, memSize / 2}), false, f.mem, f.mem)
	if s := f.do(4, opRead, 7, 512); s != 0 {
		t.Errorf("after a new memory table: status %d", s)
	}
	if err := f.close(); err != nil {
		t.Errorf("at the end: %v", err)
	}
}

// TestHostile: each lie ends the connection, and nothing else.
func TestHostile(t *testing.T) {
	dir := t.TempDir()
	foreign := memfd(t, memSize, unix.F_SEAL_SHRINK)
	for name, lie := range map[string]func(f *front){
		"foreign memory": func(f *front) {
			_, _, _ = f.send(setMemTable, table(region{guestBase, memSize, userBase, 0}), false, foreign)
		},
		"memory beyond its file": func(f *front) {
			_, _, _ = f.send(setMemTable, table(region{guestBase, 2 * memSize, userBase, 0}), false, f.mem)
		},
		"memory at an odd address": func(f *front) {
			_, _, _ = f.send(setMemTable, table(region{guestBase + 1, memSize, userBase, 0}), false, f.mem)
		},
		"no descriptor": func(f *front) {
			_, _, _ = f.send(setMemTable, table(region{guestBase, memSize, userBase, 0}), false)
		},
		"overlap": func(f *front) {
			r := region{guestBase, memSize, userBase, 0}
			_, _, _ = f.send(setMemTable, table(r, r), false, f.mem, f.mem)
		},
		"ring outside": func(f *front) { _, _, _ = f.send(setVringAddr, addr(0, memSize-16, atAvail, atUsed), false) },
		"ring not aligned": func(f *front) {
			_, _, _ = f.send(setVringAddr, addr(0, 8, atAvail, atUsed), false)
		},
		"queue 1":      func(f *front) { _, _, _ = f.send(setVringNum, vringState{1, 8}.bytes(), false) },
		"size 3":       func(f *front) { _, _, _ = f.send(setVringNum, vringState{0, 3}.bytes(), false) },
		"features":     func(f *front) { _, _, _ = f.send(setFeatures, u64(1<<60), false) },
		"kick is file": func(f *front) { _, _, _ = f.send(setVringKick, u64(0), false, f.mem) },
		"no kick":      func(f *front) { _, _, _ = f.send(setVringKick, u64(noDescriptor), false) },
		"more than the ring holds": func(f *front) { // however many of them were taken meanwhile
			f.submit(0, opRead, 0, 512)
			f.submit(0, opRead, 0, 512)
			binary.LittleEndian.PutUint16(f.ram[atAvail+2:], f.avail+queueSize+1)
			_, _ = f.kick.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0})
		},
		"long payload": func(f *front) { _, _, _ = f.send(setFeatures, make([]byte, maxPayload+1), false) },
		"cut payload":  func(f *front) { _, _, _ = f.send(setVringAddr, make([]byte, 39), false) },
		"in-flight region not ours": func(f *front) {
			_, _, _ = f.send(setInflight, inflightHead{1 << 20, 0, 1, queueSize}.bytes(24), false, memfd(t, 1<<20, 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := disk(t, filepath.Join(dir, name))
			defer func() { _ = b.Close() }()
			f := newFront(t)
			f.serve(b)
			f.start()
			lie(f)
			if err := <-f.end; !errors.Is(err, ErrProtocol) && !errors.Is(err, virtio.ErrRing) {
				t.Errorf("ended with %v", err)
			}
			f.end = nil
		})
	}
}

// TestUnsupported: what is not known is refused, and the session goes on.
func TestUnsupported(t *testing.T) {
	b := disk(t, filepath.Join(t.TempDir(), "disk"))
	defer func() { _ = b.Close() }()
	f := newFront(t)
	f.serve(b)
	f.start()
	if _, _, err := f.send(request(37), nil, false); err == nil {
		t.Error("request 37 was done")
	}
	if s := f.do(0, opRead, 0, 512); s != 0 {
		t.Errorf("afterwards: status %d", s)
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
}

// TestRecover: what the region says is believed exactly as far as it can be.
func TestRecover(t *testing.T) {
	fresh := func() *tracker { return newTracker(make([]byte, inflightLength(8)), 0, 8) }
	tr := fresh()
	if again := tr.recover(5); again != nil {
		t.Fatalf("a new region has %v in flight", again)
	}
	for _, h := range []uint16{3, 1, 6} {
		tr.Took(h)
	}
	tr.Giving(1)
	tr.Gave(1, 6)
	killed := func() *tracker { return &tracker{b: append([]byte(nil), tr.b...), depth: 8} }
	if got := killed().recover(6); len(got) != 2 || got[0] != 3 || got[1] != 6 {
		t.Errorf("in flight: %v, want 3 and 6 in that order", got)
	}
	tr.Giving(3) // killed before the used entry was published
	if got := killed().recover(6); len(got) != 2 {
		t.Errorf("given but not published: %v", got)
	}
	if got := killed().recover(7); len(got) != 1 || got[0] != 6 { // killed after
		t.Errorf("published: %v, want 6", got)
	}
	next := killed()
	next.recover(7)
	next.Took(0)
	if got := (&tracker{b: next.b, depth: 8}).recover(7); len(got) != 2 || got[0] != 6 || got[1] != 0 {
		t.Errorf("second life: %v, want 6 and 0", got)
	}
}
