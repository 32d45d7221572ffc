package virtio

import (
	"bytes"
	"encoding/binary"
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"redoubt.dev/redoubt/block"
)

// A testImage is memory, with what was asked of it.
type testImage struct {
	mu       sync.Mutex
	data     []byte
	flushes  int
	discards int
	readOnly bool
	fail     bool
}

func (m *testImage) op(off, n int64) error {
	if m.fail || off < 0 || off+n > int64(len(m.data)) {
		return errors.New("failed")
	}
	return nil
}

func (m *testImage) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.op(off, int64(len(p))); err != nil {
		return 0, err
	}
	return copy(p, m.data[off:]), nil
}

func (m *testImage) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.op(off, int64(len(p))); err != nil {
		return 0, err
	}
	return copy(m.data[off:], p), nil
}

func (m *testImage) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return m.op(0, 0)
}

func (m *testImage) Discard(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.discards++
	if err := m.op(off, n); err != nil {
		return err
	}
	clear(m.data[off : off+n])
	return nil
}
func (m *testImage) Size() int64    { return int64(len(m.data)) }
func (m *testImage) ReadOnly() bool { return m.readOnly }
func (m *testImage) Close() error   { return nil }

func newBlock(t testing.TB, image block.Image) *Block {
	t.Helper()
	b, err := NewBlock(image, "serial-1")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func blkHead(kind uint32, at uint64) []byte {
	h := binary.LittleEndian.AppendUint32(nil, kind)
	h = binary.LittleEndian.AppendUint32(h, 0)
	return binary.LittleEndian.AppendUint64(h, at)
}

// request runs one request: out follows the header, room is for the answer. It returns the
// status and the answer.
func (q *vq) request(kind uint32, at uint64, out []byte, room int) (byte, []byte) {
	q.g.t.Helper()
	mark := q.g.next
	defer func() { q.g.next = mark }()
	h := blkHead(kind, at)
	bufs := []buf{{q.g.put(h), uint32(len(h)), false}}
	if len(out) > 0 {
		bufs = append(bufs, buf{q.g.put(out), uint32(len(out)), false})
	}
	answer := q.g.alloc(uint64(room)+1, 16)
	if room > 0 {
		bufs = append(bufs, buf{answer, uint32(room), true})
	}
	status := answer + uint64(room)
	q.g.bytes(status, 1)[0] = 0xff
	bufs = append(bufs, buf{status, 1, true})
	n := q.do(q.chain(bufs...))
	s := q.g.bytes(status, 1)[0]
	if n < 1 || (s != blkOK && n != 1) {
		q.g.t.Errorf("request %d: %d bytes written with status %d", kind, n, s)
	}
	return s, bytes.Clone(q.g.bytes(answer, uint64(room))[:n-1])
}

func span(at uint64, n, flags uint32) []byte {
	b := binary.LittleEndian.AppendUint64(nil, at)
	b = binary.LittleEndian.AppendUint32(b, n)
	return binary.LittleEndian.AppendUint32(b, flags)
}

func TestBlock(t *testing.T) {
	image := &testImage{data: make([]byte, 1<<20)}
	g := newGuest(t, newBlock(t, image))
	if n := g.read(configOffset, 8); n != 2048 {
		t.Errorf("capacity %d sectors", n)
	}
	q := g.start(g.features(), 16)[0]
	data := bytes.Repeat([]byte("0123456789abcdef"), 64)
	want := func(what string, status, want byte) {
		t.Helper()
		if status != want {
			t.Errorf("%s: status %d, want %d", what, status, want)
		}
	}
	s, _ := q.request(blkOut, 7, data, 0)
	want("write", s, blkOK)
	if !bytes.Equal(image.data[7*512:9*512], data) {
		t.Error("written data differ")
	}
	s, got := q.request(blkIn, 7, nil, 1024)
	want("read", s, blkOK)
	if !bytes.Equal(got, data) {
		t.Error("read data differ")
	}
	if s, _ = q.request(blkDoFlush, 0, nil, 0); s != blkOK || image.flushes != 1 {
		t.Errorf("flush: %d, %d flushes", s, image.flushes)
	}
	s, got = q.request(blkGetID, 0, nil, 20)
	if want("id", s, blkOK); string(bytes.TrimRight(got, "\x00")) != "serial-1" {
		t.Errorf("id %q", got)
	}
	s, _ = q.request(blkDiscards, 0, span(7, 1, 0), 0)
	want("discard", s, blkOK)
	s, _ = q.request(blkZeroes, 0, span(8, 1, 0), 0)
	want("write zeroes", s, blkOK)
	if !bytes.Equal(image.data[7*512:9*512], make([]byte, 1024)) || image.discards != 1 {
		t.Errorf("discard and write zeroes left data (%d discards)", image.discards)
	}
	s, _ = q.request(blkZeroes, 0, append(span(0, 1, 1), span(1, 1, 1)...), 0)
	if want("write zeroes, unmap", s, blkOK); image.discards != 3 {
		t.Errorf("%d discards", image.discards)
	}

	s, _ = q.request(blkIn, 2047, nil, 1024)
	want("read past the end", s, blkIOError)
	s, _ = q.request(blkIn, 1<<63, nil, 512)
	want("read at a wrapping sector", s, blkIOError)
	s, _ = q.request(blkOut, 0, data[:100], 0)
	want("write of a part of a sector", s, blkIOError)
	s, _ = q.request(99, 0, nil, 0)
	want("unknown request", s, blkUnsupported)
	s, _ = q.request(blkDiscards, 0, span(2047, 2, 0), 0)
	want("discard past the end", s, blkIOError)
	s, _ = q.request(blkDiscards, 0, span(0, 0xffff_ffff, 0), 0)
	want("huge discard", s, blkIOError)
	s, _ = q.request(blkDiscards, 0, span(0, 1, 1), 0)
	want("discard with unmap", s, blkUnsupported)
	s, _ = q.request(blkDiscards, 0, span(0, 1, 0)[:15], 0)
	want("part of a segment", s, blkUnsupported)
	image.fail = true
	s, _ = q.request(blkIn, 0, nil, 512)
	want("failing image", s, blkIOError)
}

// Many requests in flight at once each get their own answer, on a real file.
func TestBlockParallel(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := block.Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	image, err := block.Open(path, false)
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, newBlock(t, image))
	q := g.start(transportFeatures|blkFlush, 128)[0]
	statuses := map[uint16]uint64{}
	for i := range 40 {
		st := g.alloc(1, 1)
		g.bytes(st, 1)[0] = 0xff
		data := bytes.Repeat([]byte{byte(i)}, 512)
		head := q.chain(buf{g.put(blkHead(blkOut, uint64(i))), 16, false}, buf{g.put(data), 512, false}, buf{st, 1, true})
		statuses[head] = st
		q.offer(head)
	}
	q.kick()
	for range 40 {
		head, _ := q.take()
		if s := g.bytes(statuses[head], 1)[0]; s != blkOK {
			t.Fatalf("head %d: status %d", head, s)
		}
		delete(statuses, head)
	}
	for i := range 40 {
		if s, got := q.request(blkIn, uint64(i), nil, 512); s != blkOK || !bytes.Equal(got, bytes.Repeat([]byte{byte(i)}, 512)) {
			t.Fatalf("sector %d: %d %x", i, s, got[:4])
		}
	}
}

func TestBlockReadOnly(t *testing.T) {
	image := &testImage{data: make([]byte, 4096), readOnly: true}
	g := newGuest(t, newBlock(t, image))
	if g.features()&blkReadOnly == 0 {
		t.Error("read-only is not offered")
	}
	q := g.start(plain, 16)[0] // the driver may ignore it
	for _, kind := range []uint32{blkOut, blkDiscards, blkZeroes} {
		if s, _ := q.request(kind, 0, make([]byte, 512), 0); s != blkIOError {
			t.Errorf("request %d: status %d", kind, s)
		}
	}
}

// A driver without the flush feature has write-through (§5.2.6.2).
func TestBlockWriteThrough(t *testing.T) {
	image := &testImage{data: make([]byte, 4096)}
	g := newGuest(t, newBlock(t, image))
	q := g.start(plain, 16)[0]
	q.request(blkOut, 0, make([]byte, 512), 0)
	if image.flushes != 1 {
		t.Errorf("%d flushes", image.flushes)
	}
}

func TestBlockMalformed(t *testing.T) {
	for name, bufs := range map[string][]buf{
		"no header":    {{ramBase, 15, false}, {ramBase + 64, 1, true}},
		"no status":    {{ramBase, 16, false}},
		"nothing":      {{ramBase, 0, true}},
		"only a reply": {{ramBase, 512, true}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, newBlock(t, &testImage{data: make([]byte, 4096)}))
			q := g.start(plain, 16)[0]
			q.offer(q.chain(bufs...))
			q.kick()
			g.waitNeedsReset()
		})
	}
}

func FuzzBlock(f *testing.F) {
	f.Add(blkHead(blkIn, 0), []byte{0, 1}, uint16(513))
	f.Add(append(blkHead(blkDiscards, 0), span(0, 1, 0)...), []byte{4}, uint16(1))
	f.Add(append(blkHead(blkOut, 1), make([]byte, 512)...), []byte{255}, uint16(1))
	image := &testImage{data: make([]byte, 4096)}
	b, err := NewBlock(image, "")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, out, cuts []byte, room uint16) {
		c := &Chain{done: func(*Chain, uint32) {}}
		for _, n := range cuts { // split the readable part anywhere
			k := min(int(n), len(out))
			c.Readable, out = append(c.Readable, out[:k]), out[k:]
		}
		c.Readable = append(c.Readable, out)
		answer := make([]byte, room)
		c.Writable = [][]byte{answer[:room/3], answer[room/3:]}
		r, err := parseBlock(c)
		if err != nil {
			return
		}
		if Length(r.in)+1 != uint64(room) {
			t.Fatalf("%d bytes of answer and a status in %d", Length(r.in), room)
		}
		if status, n := b.do(r); uint64(n) > Length(r.in) || (status != blkOK && status != blkIOError && status != blkUnsupported) {
			t.Fatalf("status %d, %d bytes of %d", status, n, Length(r.in))
		}
	})
}
