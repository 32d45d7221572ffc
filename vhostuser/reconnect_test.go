package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/virtio"
)

// overFrontend gives the test's driver a Frontend in place of the protocol of its own.
func overFrontend(t *testing.T) (*front, *Frontend) {
	f := newFront(t)
	e := NewFrontend(1, queueSize)
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return f, e
}

func (f *front) setUp(e *Frontend) {
	f.t.Helper()
	if err := e.SetFeatures(virtio.FeatureVersion1); err != nil {
		f.t.Fatal(err)
	}
	if err := e.SetMemory([]Region{{Guest: guestBase, Size: memSize, File: f.mem}}); err != nil {
		f.t.Fatal(err)
	}
	if err := e.StartQueue(0, f.queue()); err != nil {
		f.t.Fatal(err)
	}
}

func (f *front) queue() QueueSetup {
	return QueueSetup{Size: queueSize, Areas: [3]uint64{guestBase, guestBase + atAvail, guestBase + atUsed}, Kick: f.kick, Call: f.call}
}

// TestFrontendKilled: as TestKilled, at any instant, also while a back end is being told where the
// device stands.
func TestFrontendKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	create(t, path, diskSize)
	f, e := overFrontend(t)
	f.setUp(e) // before there is any back end
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	for i := range slots {
		binary.LittleEndian.PutUint64(f.data(i), uint64(i)+1)
		f.submit(i, opWrite, uint64(8*i), 4096)
	}
	spawn := func() (*exec.Cmd, *net.UnixConn) {
		own, theirs := socketpair(t)
		cmd, started := spawnBackEnd(t, theirs, f.mem, path)
		started.Close()
		return cmd, own
	}
	for range 30 {
		cmd, c := spawn()
		killed := make(chan struct{})
		go func() {
			defer close(killed)
			for range random.IntN(1 << 21) { // while it starts, is greeted, or works
			}
			end(cmd)
		}()
		gone, err := e.Connect(c)
		<-killed
		if err == nil {
			<-gone
		}
	}
	cmd, c := spawn()
	defer end(cmd)
	if _, err := e.Connect(c); err != nil {
		t.Fatal(err)
	}
	for range slots {
		if i := f.next(); *f.status(i) != 0 {
			t.Fatalf("request %d: status %d", i, *f.status(i))
		}
	}
	if f.used != f.avail {
		t.Errorf("%d answers to %d requests", f.used, f.avail)
	}
	for i := range slots {
		if s := f.do(i, opRead, uint64(8*i), 4096); s != 0 || binary.LittleEndian.Uint64(f.data(i)) != uint64(i)+1 {
			t.Fatalf("slot %d: status %d, %d", i, s, binary.LittleEndian.Uint64(f.data(i)))
		}
	}
}

// TestFrontendGreeting: a back end may end after any number of the requests of its greeting; it
// serves nobody then, and the next one does.
func TestFrontendGreeting(t *testing.T) {
	b := disk(t, filepath.Join(t.TempDir(), "disk"))
	defer func() { _ = b.Close() }()
	const greeting = 16 // requests, with one queue that runs
	for n := range greeting + 1 {
		f, e := overFrontend(t)
		f.setUp(e)
		// connect serves n requests, or all.
		connect := func(n int) (<-chan struct{}, error) {
			own, between := socketpair(t)
			behind, theirs := socketpair(t)
			ended := make(chan error, 1)
			go func() { ended <- Serve(t.Context(), theirs, b, Options{Memory: f.whitelist()}) }()
			go pass(between, behind, n)
			go pass(behind, between, -1)
			gone, err := e.Connect(own)
			if n >= 0 {
				if err := <-ended; err != nil {
					t.Errorf("after %d requests the back end ended with %v", n, err)
				}
			}
			return gone, err
		}
		gone, err := connect(n)
		switch {
		case err == nil:
			<-gone
		case !errors.Is(err, ErrBackEnd):
			t.Errorf("after %d requests: %v", n, err)
		}
		if e.Served() {
			t.Errorf("after %d requests: served by nobody", n)
		}
		if _, err := connect(-1); err != nil {
			t.Fatalf("the back end after the one of %d requests: %v", n, err)
		}
		if s := f.do(0, opWrite, 0, 512); s != 0 {
			t.Errorf("after %d requests: status %d", n, s)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
}

// pass hands n messages on, or all, and ends both connections.
func pass(from, to *net.UnixConn, n int) { passCounting(from, to, n, 0, nil) }

// passCounting is pass, and counts the requests of a kind.
func passCounting(from, to *net.UnixConn, n int, kind request, seen *atomic.Int32) {
	defer func() {
		_ = from.CloseRead()
		_ = to.CloseWrite()
	}()
	for ; n != 0; n-- {
		m := &message{}
		s := conn{c: from}
		var head [headerSize]byte
		if s.fill(m, head[:], true) != nil {
			return
		}
		if seen != nil && request(binary.LittleEndian.Uint32(head[:])) == kind {
			seen.Add(1)
		}
		m.payload = make([]byte, binary.LittleEndian.Uint32(head[8:]))
		err := s.fill(m, m.payload, false)
		var fds []int
		for _, f := range m.files {
			fds = append(fds, int(f.Fd()))
		}
		if err == nil {
			_, _, err = to.WriteMsgUnix(append(head[:], m.payload...), unix.UnixRights(fds...), nil)
		}
		m.closeFiles()
		if err != nil {
			return
		}
	}
}

// TestFrontend: queues stop and start, with and without a back end.
func TestFrontend(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	b := disk(t, path)
	defer func() { _ = b.Close() }()
	f, e := overFrontend(t)
	connect := func() (<-chan struct{}, context.CancelFunc, chan error) {
		own, theirs := socketpair(t)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- Serve(ctx, theirs, b, Options{Memory: f.whitelist()}) }()
		gone, err := e.Connect(own)
		if err != nil {
			t.Fatal(err)
		}
		return gone, cancel, ended
	}
	gone, cancel, ended := connect()
	var sectors [8]byte
	e.ReadConfig(0, sectors[:])
	if n := binary.LittleEndian.Uint64(sectors[:]); n != diskSize/512 {
		t.Errorf("%d sectors", n)
	}
	f.setUp(e)
	if s := f.do(0, opWrite, 0, 512); s != 0 {
		t.Fatalf("write: status %d", s)
	}
	if base, err := e.StopQueue(t.Context(), 0); base != 1 || err != nil {
		t.Errorf("stopped at %d, %v", base, err)
	}
	// The driver begins anew, with rings of zeros.
	f.reset()
	if err := e.StartQueue(0, f.queue()); err != nil {
		t.Fatal(err)
	}
	if s := f.do(1, opRead, 0, 512); s != 0 {
		t.Fatalf("read: status %d", s)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	<-gone
	if e.Served() {
		t.Error("served by nobody")
	}
	// Without a back end: requests are dropped by a reset, and made anew.
	f.submit(2, opRead, 0, 512)
	e.DropQueue(0)
	f.reset()
	if err := e.StartQueue(0, f.queue()); err != nil {
		t.Fatal(err)
	}
	copy(f.data(3), bytes.Repeat([]byte{7}, 512))
	f.submit(3, opWrite, 0, 512)
	_, cancel, ended = connect()
	if i := f.next(); i != 3 || *f.status(3) != 0 {
		t.Errorf("request %d, status %d", i, *f.status(3))
	}
	// Stopped in good order while there is no back end: the next one finishes what was begun.
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	f.submit(4, opRead, 0, 512)
	stopped := make(chan uint16)
	go func() {
		base, err := e.StopQueue(t.Context(), 0)
		if err != nil {
			t.Error(err)
		}
		stopped <- base
	}()
	_, cancel, ended = connect()
	if base := <-stopped; base != f.shownUsed() {
		t.Errorf("stopped at %d, the used ring is at %d", base, f.shownUsed())
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the back end ended with %v", err)
	}
	cancel()
}

// TestInterruptAgain: a back end killed after it gave a request back and before its interrupt
// leaves that interrupt to the next one.
func TestInterruptAgain(t *testing.T) {
	b := disk(t, filepath.Join(t.TempDir(), "disk"))
	defer func() { _ = b.Close() }()
	f, e := overFrontend(t)
	f.setUp(e)
	for range 2 {
		own, theirs := socketpair(t)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- Serve(ctx, theirs, b, Options{Memory: f.whitelist()}) }()
		if _, err := e.Connect(own); err != nil {
			t.Fatal(err)
		}
		// Nothing is in flight, and no interrupt is pending but the one that each makes.
		if err := f.call.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		var n [8]byte
		if _, err := f.call.Read(n[:]); err != nil {
			t.Fatalf("no interrupt from a new back end: %v", err)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
	}
}

// TestOtherDevice: a back end with another disk is refused.
func TestOtherDevice(t *testing.T) {
	dir := t.TempDir()
	f, e := overFrontend(t)
	for i, size := range []int64{diskSize, 2 * diskSize} {
		path := filepath.Join(dir, string(rune('a'+i)))
		create(t, path, size)
		b := disk(t, path)
		defer func() { _ = b.Close() }()
		own, theirs := socketpair(t)
		ended := make(chan error, 1)
		go func() { ended <- Serve(context.Background(), theirs, b, Options{Memory: f.whitelist()}) }()
		_, err := e.Connect(own)
		if (err == nil) != (i == 0) {
			t.Errorf("disk %d: %v", i, err)
		}
		if i == 1 {
			if err := <-ended; err != nil {
				t.Errorf("the refused one ended with %v", err)
			}
		}
	}
}
