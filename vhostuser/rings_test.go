package vhostuser

import (
	"path/filepath"
	"testing"
	"time"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/virtio"
)

// A slow image makes no change before it may.
type slow struct {
	block.Image
	begun, may chan struct{}
}

func (s slow) WriteAt(p []byte, off int64) (int, error) {
	s.begun <- struct{}{}
	<-s.may
	return s.Image.WriteAt(p, off)
}

// TestRings: a request is in flight until it is answered, and whoever waits for that is told, or gives up in time.
func TestRings(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	create(t, path, diskSize)
	image, err := block.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	s := slow{image, make(chan struct{}), make(chan struct{})}
	b, err := virtio.NewBlock(s, "slow")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }()
	r := NewRings()
	if n := r.InFlight(); n != 0 {
		t.Errorf("%d in flight of a device that nobody serves", n)
	}
	f := newFront(t)
	f.rings = r
	f.serve(b)
	f.start()
	if n := r.Drain(time.Now().Add(time.Hour)); n != 0 {
		t.Errorf("%d in flight of a device that nobody asks", n)
	}
	f.submit(0, opWrite, 0, 512)
	<-s.begun
	if n := r.InFlight(); n != 1 {
		t.Errorf("%d in flight, not 1", n)
	}
	if n := r.Drain(time.Now()); n != 1 {
		t.Errorf("%d in flight at once, not 1", n)
	}
	drained := make(chan int)
	go func() { drained <- r.Drain(time.Now().Add(time.Hour)) }()
	close(s.may)
	f.next()
	if n := <-drained; n != 0 {
		t.Errorf("%d in flight when all is answered", n)
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
}
