package blkback

import (
	"bytes"
	"os"
	"testing"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vhostuser"
)

const (
	testDisk    = 1 << 20
	testScratch = block.MinScratch
)

func memory(t *testing.T, size int64) *os.File {
	t.Helper()
	f, err := memfd.New("test", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestSnapshot: a snapshot is begun when the guest's emulator says that the guest stands still, which is told when it is begun;
// and where the emulator says nothing or is gone, or the disk is another connection's by then, there is none.
func TestSnapshot(t *testing.T) {
	own, err := ipc.Duplicate(memory(t, testDisk))
	if err != nil {
		t.Fatal(err)
	}
	image, err := block.New(own[0], false)
	if err != nil {
		t.Fatal(err)
	}
	changes, err := block.OpenChanges(memory(t, block.ChangesSize(testDisk)), testDisk)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{image: block.NewTracked(image, changes, nil), rings: vhostuser.NewRings()}
	t.Cleanup(func() { _ = d.image.Close() })
	s := &service{disks: map[int]*disk{0: d}}
	in := protocol.Snapshot{Disks: []int{0}, Scratch: testScratch, Files: protocol.Files{protocol.FileSnapshot, protocol.FileStopped, protocol.FileBegun}}
	write := func(b byte) {
		t.Helper()
		if _, err := d.image.WriteAt(bytes.Repeat([]byte{b}, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
	gone := false // the emulator, before it is told
	// begin has a snapshot begun; stop is what the emulator does meanwhile, which is over when it returns.
	begin := func(stop func(stopped *os.File)) (f *os.File, told bool, err error) {
		t.Helper()
		f = memory(t, block.SnapshotSize(testScratch))
		hears, stopped, err := ipc.OneWay()
		if err != nil {
			t.Fatal(err)
		}
		tells, begun, err := ipc.OneWay()
		if err != nil {
			t.Fatal(err)
		}
		if gone {
			tells.Close()
		}
		go func() {
			stop(stopped)
			stopped.Close()
		}()
		_, err = s.snapshot(in, map[string][]*os.File{protocol.FileSnapshot: {f}, protocol.FileStopped: {hears}, protocol.FileBegun: {begun}})
		ipc.CloseAll([]*os.File{hears, begun})
		n, _ := tells.Read(make([]byte, 1))
		tells.Close()
		return f, n == 1, err
	}
	shows := func(f *os.File, want byte) {
		t.Helper()
		own, err := ipc.Duplicate(f)
		if err != nil {
			t.Fatal(err)
		}
		defer ipc.CloseAll(own)
		b := make([]byte, 1)
		v, err := block.NewView(d.image.Vectored, own[0], testScratch)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.ReadAt(b, 0); err != nil || b[0] != want {
			t.Errorf("the snapshot shows %d, not %d: %v", b[0], want, err)
		}
	}

	write(1)
	f, told, err := begin(func(stopped *os.File) {
		write(2) // the guest still runs
		_, _ = stopped.Write([]byte{1})
	})
	if err != nil || !told {
		t.Fatal(told, err)
	}
	write(3)
	shows(f, 2)

	if _, told, err = begin(func(*os.File) {}); rpc.KindOf(err) != rpc.Unavailable || told {
		t.Errorf("a guest that was not stopped: %v, %v", told, err)
	}
	shows(f, 2) // of the last snapshot, which is in force
	gone = true
	f, told, err = begin(func(stopped *os.File) { _, _ = stopped.Write([]byte{1}) })
	if err == nil || told {
		t.Errorf("an emulator that is gone: %v, %v", told, err)
	}
	write(4)
	shows(f, 4) // nothing was copied
	gone = false
	_, told, err = begin(func(stopped *os.File) {
		s.mu.Lock()
		s.disks[0] = &disk{image: d.image, rings: d.rings}
		s.mu.Unlock()
		_, _ = stopped.Write([]byte{1})
	})
	if rpc.KindOf(err) != rpc.Unavailable || told {
		t.Errorf("a disk that was attached anew: %v, %v", told, err)
	}
	in.Disks = []int{0, 0}
	if _, told, err = begin(func(*os.File) {}); rpc.KindOf(err) != rpc.Invalid || told {
		t.Errorf("one memory for two disks: %v, %v", told, err)
	}
}
