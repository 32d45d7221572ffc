package virtio

import (
	"encoding/binary"
	"errors"
	"runtime"
	"testing"
	"time"
)

// An echo copies what a chain carries into its writable part. It holds chains while told to.
type echo struct {
	hold  chan struct{} // nil: never
	stop  chan struct{}
	taken chan struct{}
}

func (e *echo) Info() Info {
	return Info{Name: "echo", ID: 42, Class: 0xff0000, Features: 3, Queues: []uint16{64, 64}}
}

func (e *echo) ReadConfig(offset uint64, p []byte) {
	if offset < 8 {
		copy(p, "config!!"[offset:])
	}
}
func (e *echo) Start(uint64) { e.stop = make(chan struct{}) }
func (e *echo) Stop()        { close(e.stop) }
func (e *echo) Close() error { return nil }
func (e *echo) Handle(_ int, c *Chain) error {
	if e.hold != nil {
		e.taken <- struct{}{}
		select {
		case <-e.hold:
		case <-e.stop:
		}
	}
	data := make([]byte, Length(c.Readable))
	Gather(data, c.Readable)
	if string(data) == "bad" {
		return errors.New("bad request")
	}
	c.Done(uint32(Scatter(c.Writable, data)))
	return nil
}

const plain = FeatureVersion1

var featureSets = map[string]uint64{
	"plain": plain, "event": plain | FeatureEventIdx, "all": transportFeatures,
}

func TestEcho(t *testing.T) {
	for name, features := range featureSets {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, &echo{})
			qs := g.start(features, 16)
			for i := range 200 { // the indexes go around
				q := qs[i%2]
				in := g.next
				out := g.alloc(32, 1)
				text := []byte("the text of one request")
				head := q.chain(buf{g.put(text[:5]), 5, false}, buf{g.put(text[5:]), uint32(len(text) - 5), false},
					buf{out, 7, true}, buf{0, 0, true}, buf{out + 7, 25, true})
				if features&FeatureIndirect != 0 && i%3 == 0 {
					head = q.indirect(buf{g.put(text), uint32(len(text)), false}, buf{out, 32, true})
				}
				if n := q.do(head); int(n) != len(text) || string(g.bytes(out, uint64(n))) != string(text) {
					t.Fatalf("request %d: %d bytes: %q", i, n, g.bytes(out, 32))
				}
				g.next = in
			}
		})
	}
}

// With event indexes one interrupt is enough for many requests.
func TestCoalescing(t *testing.T) {
	e := &echo{hold: make(chan struct{}), taken: make(chan struct{}, 64)}
	g := newGuest(t, e)
	q := g.start(plain|FeatureEventIdx, 32)[0]
	for range 20 {
		q.offer(q.chain(buf{g.put([]byte("x")), 1, false}))
	}
	// An interrupt only when the 20th is done (§2.7.10).
	a := g.bytes(q.avail, 8+2*uint64(q.size))
	store16(a[4+2*q.size:], 19)
	q.kick()
	close(e.hold)
	g.wait(1)
	u := g.bytes(q.used, 8)
	if n := loadHeader(u) >> 16; n != 20 {
		t.Errorf("interrupt after %d of 20", n)
	}
	if n := g.interrupts(1); n != 0 {
		t.Errorf("%d more interrupts", n)
	}
}

func TestRegisters(t *testing.T) {
	g := newGuest(t, &echo{})
	if f := g.features(); f != transportFeatures|3 {
		t.Errorf("features %#x", f)
	}
	g.write(regDeviceFeatureSelect, 4, 2)
	if f := g.read(regDeviceFeature, 4); f != 0 {
		t.Errorf("features beyond 64: %#x", f)
	}
	if g.negotiate(plain | 1<<20) {
		t.Error("a feature that was not offered was taken")
	}
	g.reset()
	if g.negotiate(1) {
		t.Error("a driver without VERSION_1 was taken")
	}
	g.write(regStatus, 1, 15)
	if g.status()&statusDriverOK != 0 {
		t.Error("DRIVER_OK without FEATURES_OK")
	}
	g.reset()
	if !g.negotiate(plain) {
		t.Fatal("refused")
	}
	for _, v := range []uint64{0, 3, 128, 65535} {
		g.write(regQueueSize, 2, v)
	}
	if n := g.read(regQueueSize, 2); n != 64 {
		t.Errorf("queue size %d", n)
	}
	g.write(regConfigVector, 2, 3)
	g.write(regQueueVector, 2, 2)
	if c, q := g.read(regConfigVector, 2), g.read(regQueueVector, 2); c != noVector || q != 2 {
		t.Errorf("vectors %#x, %#x", c, q)
	}
	g.write(regQueueArea+8, 8, 0x1122334455667788)
	if v := g.read(regQueueArea+12, 4); v != 0x11223344 {
		t.Errorf("area %#x", v)
	}
	g.write(regQueueEnable, 2, 1)
	g.write(regQueueSize, 2, 16)
	if n := g.read(regQueueSize, 2); n != 64 {
		t.Errorf("size of an enabled queue became %d", n)
	}
	g.write(regQueueSelect, 2, 2) // there is none
	g.write(regQueueEnable, 2, 1)
	if n := g.read(regQueueSize, 2); n != 0 {
		t.Errorf("absent queue has size %d", n)
	}
	if v := g.read(configOffset+2, 4); v != uint64(binary.LittleEndian.Uint32([]byte("nfig"))) {
		t.Errorf("config %#x", v)
	}
	for off := uint64(0); off < barSize; off++ { // any place, any width: no crash
		for _, w := range []int{1, 2, 4, 8} {
			if off+uint64(w) <= barSize {
				g.read(off, w)
			}
		}
	}
}

// Each way to break a queue stops the device, and a reset mends it.
func TestBrokenQueue(t *testing.T) {
	cases := map[string]func(g *guest, q *vq){
		"loop": func(g *guest, q *vq) {
			q.raw(0, buf{ramBase, 1, false}, descNext, 1)
			q.raw(1, buf{ramBase, 1, false}, descNext, 0)
			q.offer(0)
		},
		"next outside": func(g *guest, q *vq) {
			q.raw(0, buf{ramBase, 1, false}, descNext, 16)
			q.offer(0)
		},
		"head outside":        func(g *guest, q *vq) { q.offer(16) },
		"address zero":        func(g *guest, q *vq) { q.offer(q.chain(buf{0, 1, false})) },
		"address wraps":       func(g *guest, q *vq) { q.offer(q.chain(buf{^uint64(0), 2, false})) },
		"end outside":         func(g *guest, q *vq) { q.offer(q.chain(buf{ramBase + 4<<20 - 1, 2, false})) },
		"huge":                func(g *guest, q *vq) { q.offer(q.chain(buf{ramBase, 0xffff_ffff, true})) },
		"readable after":      func(g *guest, q *vq) { q.offer(q.chain(buf{ramBase, 1, true}, buf{ramBase, 1, false})) },
		"index jumps":         func(g *guest, q *vq) { q.availIdx += 100; q.offer(0) },
		"indirect odd":        func(g *guest, q *vq) { q.raw(0, buf{ramBase, 17, false}, descIndirect, 0); q.offer(0) },
		"indirect empty":      func(g *guest, q *vq) { q.raw(0, buf{ramBase, 0, false}, descIndirect, 0); q.offer(0) },
		"indirect outside":    func(g *guest, q *vq) { q.raw(0, buf{16, 16, false}, descIndirect, 0); q.offer(0) },
		"indirect and next":   func(g *guest, q *vq) { q.raw(0, buf{ramBase, 16, false}, descIndirect|descNext, 1); q.offer(0) },
		"indirect in itself":  func(g *guest, q *vq) { self := g.next; q.offer(q.indirectFlags(self)) },
		"indirect too long":   func(g *guest, q *vq) { q.offer(q.indirect(make([]buf, 17)...)) },
		"back end's own rule": func(g *guest, q *vq) { q.offer(q.chain(buf{g.put([]byte("bad")), 3, false})) },
	}
	for name, breakIt := range cases {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, &echo{})
			q := g.start(transportFeatures, 16)[0]
			breakIt(g, q)
			q.kick()
			g.waitNeedsReset()
			if g.dev.Err() == nil {
				t.Error("no reason")
			}
			q.offer(0)
			q.kick() // no more is taken
			g.reset()
			q = g.start(transportFeatures, 16)[1]
			if n := q.do(q.chain(buf{g.put([]byte("ok")), 2, false}, buf{g.alloc(8, 8), 8, true})); n != 2 {
				t.Errorf("after the reset: %d bytes", n)
			}
		})
	}
}

// indirectFlags is an indirect table whose only entry is indirect.
func (q *vq) indirectFlags(self uint64) uint16 {
	at := q.g.put(descriptor(buf{addr: self, length: 16}, descIndirect, 0))
	q.raw(0, buf{addr: at, length: 16}, descIndirect, 0)
	return 0
}

// A head that is in flight cannot be given again.
func TestHeadTwice(t *testing.T) {
	ram := make(testRAM, 8192)
	r, err := NewRing(ram, 4, [3]uint64{ramBase, ramBase + 256, ramBase + 512}, 0)
	if err != nil {
		t.Fatal(err)
	}
	copy(ram, descriptor(buf{ramBase, 1, true}, 0, 0))
	storeHeader(ram[256:], 2<<16) // head 0 at both places
	c, err := r.Take()
	if c == nil || err != nil {
		t.Fatal(err)
	}
	if _, err := r.Take(); !errors.Is(err, ErrRing) {
		t.Errorf("second: %v", err)
	}
	r.Put(c, 0)
	if c, err = r.Take(); c == nil || err != nil {
		t.Errorf("after it was given back: %v", err)
	}
}

// Areas outside memory or not aligned: the device never starts.
func TestBadAreas(t *testing.T) {
	for _, change := range []func(*vq){
		func(q *vq) { q.desc = 8 << 40 },
		func(q *vq) { q.avail = 0 },
		func(q *vq) { q.used = ramBase + 4<<20 - 8 },
		func(q *vq) { q.desc += 8 },
		func(q *vq) { q.avail++ },
		func(q *vq) { q.used += 2 },
		func(q *vq) { q.used = ^uint64(0) &^ 15 },
	} {
		g := newGuest(t, &echo{})
		if !g.negotiate(plain) {
			t.Fatal("refused")
		}
		g.write(regConfigVector, 2, 0)
		q := g.queue(0, 16)
		change(q)
		g.program(q)
		g.write(regStatus, 1, 15)
		g.waitNeedsReset()
		g.reset()
	}
}

// A reset waits for requests in flight; the status reads 0 only then.
func TestResetWaits(t *testing.T) {
	before := runtime.NumGoroutine()
	e := &echo{hold: make(chan struct{}), taken: make(chan struct{}, 64)}
	g := newGuest(t, e)
	q := g.start(plain, 16)[0]
	q.offer(q.chain(buf{g.put([]byte("x")), 1, false}))
	q.kick()
	<-e.taken
	g.write(regStatus, 1, 0)
	g.reset()
	g.dev.mu.Lock()
	started := g.dev.started
	g.dev.mu.Unlock()
	if started {
		t.Error("reset is done, the back end not stopped")
	}
	if err := g.bus.Close(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
		runtime.Gosched()
	}
}

// Without bus mastering nothing is taken.
func TestBusMaster(t *testing.T) {
	g := newGuest(t, &echo{})
	q := g.start(plain, 16)[0]
	g.bus.WriteConfig(8*4096+4, []byte{2, 0})
	q.offer(q.chain(buf{g.put([]byte("x")), 1, false}))
	g.dev.run(0)
	if n := loadHeader(g.bytes(q.used, 8)) >> 16; n != 0 {
		t.Error("a device that is no bus master wrote to memory")
	}
}

// FuzzQueue lets the fuzzer write rings and descriptors.
func FuzzQueue(f *testing.F) {
	g := testRAM(make([]byte, 64<<10))
	seed := make([]byte, 512)
	copy(seed, descriptor(buf{ramBase, 16, false}, descNext, 1))
	copy(seed[16:], descriptor(buf{ramBase + 4096, 16, true}, 0, 0))
	binary.LittleEndian.PutUint16(seed[256+2:], 1)
	f.Add(seed, uint8(2), true)
	copy(seed, descriptor(buf{ramBase + 16, 32, false}, descIndirect, 0))
	f.Add(seed, uint8(4), false)
	f.Fuzz(func(t *testing.T, data []byte, shift uint8, event bool) {
		clear(g)
		copy(g, data)
		size := uint16(1) << (shift % 5)
		features := FeatureIndirect
		if event {
			features |= FeatureEventIdx
		}
		r, err := NewRing(g, size, [3]uint64{ramBase, ramBase + 256, ramBase + 512}, features)
		if err != nil {
			t.Fatal(err)
		}
		held := map[uint16]bool{}
		for range 64 {
			c, err := r.Take()
			if err != nil {
				return
			}
			if c == nil {
				r.Rearm()
				return
			}
			if held[c.head] {
				t.Fatalf("head %d given twice", c.head)
			}
			held[c.head] = true
			if Length(c.Readable)+Length(c.Writable) > maxChain || len(c.Readable)+len(c.Writable) > int(max(size, 1)) {
				t.Fatalf("chain of %d+%d buffers", len(c.Readable), len(c.Writable))
			}
			if len(held)%2 == 0 {
				delete(held, c.head)
				r.Put(c, 1)
			}
		}
	})
}

// FuzzRegisters writes registers in any order and width.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{0x14, 1, 1, 0x14, 1, 3, 0x14, 1, 11, 0x14, 1, 15, 0x14, 1, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		g := newGuest(t, &echo{})
		for ; len(data) >= 3; data = data[3:] {
			width := 1 << (data[1] & 3)
			off := uint64(data[0]&0x3f) + uint64(data[1]>>4)*0x400
			if off+uint64(width) > barSize {
				continue
			}
			g.write(off, width, uint64(data[2])*0x0101_0101_0101_0101)
			g.read(off, width)
		}
	})
}
