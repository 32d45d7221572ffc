package virtio

import (
	"errors"
	"testing"

	"redoubt.dev/redoubt/block"
)

// A vectorImage has its first half in memory; reads of the other half wait for release.
type vectorImage struct {
	testImage
	release chan struct{}
	waiting chan struct{}
	cached  int
}

func (v *vectorImage) ReadCached(p [][]byte, off int64) bool {
	if off >= int64(len(v.data))/2 || v.moves().ReadVector(p, off) != nil {
		return false
	}
	v.cached++
	return true
}

func (v *vectorImage) ReadVector(p [][]byte, off int64) error {
	v.waiting <- struct{}{}
	<-v.release
	return v.moves().ReadVector(p, off)
}

func (v *vectorImage) WriteVector(p [][]byte, off int64) error { return v.moves().WriteVector(p, off) }

// moves is the image below, a buffer after another.
func (v *vectorImage) moves() block.Vectored { return block.AsVectored(&v.testImage) }

// What is in memory is read while reads of what is not wait for their device, and so is what was
// written meanwhile.
func TestBlockCached(t *testing.T) {
	v := &vectorImage{
		testImage: testImage{data: make([]byte, 1<<20)},
		release:   make(chan struct{}), waiting: make(chan struct{}, blkWorkers),
	}
	var _ block.Vectored = v
	copy(v.data, "near")
	copy(v.data[1<<19:], "far")
	b := newBlock(t, v)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	request := func(kind uint32, at uint64, payload []byte) (answer chan uint32, status []byte) {
		t.Helper()
		answer, status = make(chan uint32, 1), []byte{0xff}
		c := &Chain{Readable: [][]byte{blkHead(kind, at)}, Writable: [][]byte{status}}
		if kind == blkIn {
			c.Writable = [][]byte{payload[:2], payload[2:], status}
		} else {
			c.Readable = append(c.Readable, payload)
		}
		c.OnDone(func(_ *Chain, n uint32) { answer <- n })
		if err := b.Handle(0, c); err != nil {
			t.Fatal(err)
		}
		return answer, status
	}
	far := make([]byte, 512)
	late, lateStatus := request(blkIn, 1<<19/sector, far)
	<-v.waiting
	near := make([]byte, 512)
	done, status := request(blkIn, 0, near)
	if n := <-done; n != 513 || status[0] != blkOK || string(near[:4]) != "near" || v.cached != 1 {
		t.Errorf("cached read: %d bytes, status %d, %q", n, status[0], near[:4])
	}
	news := make([]byte, 512)
	copy(news, "news")
	if done, status = request(blkOut, 0, news); <-done != 1 || status[0] != blkOK {
		t.Errorf("write beside a waiting read: status %d", status[0])
	}
	if done, _ = request(blkIn, 0, near); <-done != 513 || string(near[:4]) != "news" {
		t.Errorf("read after a write: %q", near[:4])
	}
	select {
	case <-late:
		t.Error("a read was answered without its data")
	default:
	}
	close(v.release)
	if n := <-late; n != 513 || lateStatus[0] != blkOK || string(far[:3]) != "far" {
		t.Errorf("waiting read: %d bytes, status %d, %q", n, lateStatus[0], far[:3])
	}
	v.fail = true
	for _, kind := range []uint32{blkIn, blkOut} {
		if done, status = request(kind, 0, near); <-done != 1 || status[0] != blkIOError {
			t.Errorf("failing request %d: status %d", kind, status[0])
		}
	}
	if err := b.Handle(0, &Chain{Readable: [][]byte{make([]byte, 3)}}); !errors.Is(err, ErrRing) {
		t.Errorf("a cut header: %v", err)
	}
}
