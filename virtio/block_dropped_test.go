package virtio

import (
	"bytes"
	"testing"
	"time"
)

// TestBlockDropped: a disk that is dropped answers every request with an I/O error, and changes nothing, until that ends.
func TestBlockDropped(t *testing.T) {
	image := &testImage{data: bytes.Repeat([]byte("x"), 1<<20)}
	b := newBlock(t, image)
	g := newGuest(t, b)
	q := g.start(g.features(), 16)[0]
	requests := func(want byte) {
		t.Helper()
		for kind, out := range map[uint32][]byte{
			blkIn: nil, blkOut: make([]byte, 512), blkDoFlush: nil, blkGetID: nil, blkDiscards: span(9, 1, 0), blkZeroes: span(10, 1, 0),
		} {
			room := 0
			if kind == blkIn {
				room = 512
			}
			if s, got := q.request(kind, 3, out, room); s != want || s != blkOK && len(got) > 0 {
				t.Errorf("request %d: status %d, not %d, and %d bytes", kind, s, want, len(got))
			}
		}
	}
	b.Drop(true)
	before, flushes := bytes.Clone(image.data), image.flushes
	requests(blkIOError)
	if !bytes.Equal(image.data, before) || image.flushes != flushes {
		t.Error("the image of a dropped disk has changed")
	}
	b.Drop(false)
	requests(blkOK)
}

// A slowImage has its writes wait.
type slowImage struct {
	testImage
	writing, release chan struct{}
}

func (s *slowImage) WriteAt(p []byte, off int64) (int, error) {
	close(s.writing)
	<-s.release
	return s.testImage.WriteAt(p, off)
}

// TestBlockDropWaits: once a disk is dropped nothing is written any more, not even by a request that came before.
func TestBlockDropWaits(t *testing.T) {
	image := &slowImage{testImage{data: make([]byte, 1<<20)}, make(chan struct{}), make(chan struct{})}
	b := newBlock(t, image)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	status, answered := []byte{0xff}, make(chan uint32, 1)
	c := &Chain{Readable: [][]byte{blkHead(blkOut, 0), bytes.Repeat([]byte("w"), 512)}, Writable: [][]byte{status}, done: func(_ *Chain, n uint32) { answered <- n }}
	go func() {
		if err := b.Handle(0, c); err != nil {
			t.Error(err)
		}
	}()
	<-image.writing
	dropped := make(chan struct{})
	go func() {
		b.Drop(true)
		close(dropped)
	}()
	early := time.NewTimer(20 * time.Millisecond)
	defer early.Stop()
	select {
	case <-dropped:
		t.Error("it is dropped while a write is under way")
	case <-early.C:
	}
	close(image.release)
	<-dropped
	if <-answered; status[0] != blkOK || image.data[0] != 'w' {
		t.Errorf("status %d", status[0])
	}
}
