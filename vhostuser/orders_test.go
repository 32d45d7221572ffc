package vhostuser

import (
	"encoding/binary"
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"

	"redoubt.dev/redoubt/virtio"
)

// TestOrders: of several orders, sent before any is acknowledged, a refused one is named, and the connection goes on.
func TestOrders(t *testing.T) {
	own, theirs := socketpair(t)
	p := newPeer(own)
	defer p.close()
	taken := make(chan request, 16)
	go func() {
		defer func() { _ = theirs.Close() }()
		s := conn{c: theirs}
		for {
			m := &message{}
			var head [headerSize]byte
			if s.fill(m, head[:], true) != nil {
				return
			}
			le := binary.LittleEndian
			r := request(le.Uint32(head[:]))
			m.payload = make([]byte, le.Uint32(head[8:]))
			if s.fill(m, m.payload, false) != nil {
				return
			}
			m.closeFiles()
			taken <- r
			le.PutUint32(head[4:], flagVersion|flagReply)
			refused := uint64(0)
			if r == setVringAddr {
				refused = 1
			}
			if _, err := theirs.Write(append(head[:], u64(refused)...)); err != nil {
				return
			}
		}
	}()
	of := func(r request) order { return order{request: r, payload: u64(0)} }
	if err := p.do(of(setVringNum), of(setVringAddr), of(setVringBase)); !errors.Is(err, errRefused) || !errors.Is(err, ErrBackEnd) {
		t.Fatalf("%v", err)
	}
	if err := p.do(of(setOwner)); err != nil {
		t.Fatalf("after a refusal: %v", err)
	}
	for _, want := range []request{setVringNum, setVringAddr, setVringBase, setOwner} {
		if r := <-taken; r != want {
			t.Errorf("%v came where %v was sent", r, want)
		}
	}
}

// TestRelayMemory: a front end that tells of the same memory again, as QEMU does whenever its guest goes on, keeps no back end
// busy with that; of other memory the back end is told, and its queues go on in it.
func TestRelayMemory(t *testing.T) {
	b := disk(t, filepath.Join(t.TempDir(), "disk"))
	defer func() { _ = b.Close() }()
	f, e := overFrontend(t)
	var tables atomic.Int32
	own, between := socketpair(t)
	behind, theirs := socketpair(t)
	go func() { _ = Serve(t.Context(), theirs, b, Options{Memory: f.whitelist()}) }()
	go passCounting(between, behind, -1, setMemTable, &tables)
	go pass(behind, between, -1)
	if _, err := e.Connect(own); err != nil {
		t.Fatal(err)
	}
	front, relays := socketpair(t)
	f.c = front
	ended := make(chan error, 1)
	go func() { ended <- Relay(t.Context(), relays, e, RelayOptions{Memory: f.whitelist()}) }()

	offered := binary.LittleEndian.Uint64(f.must(getFeatures, nil, true))
	if _, err := f.c.Write(append([]byte{byte(setProtocolFeatures), 0, 0, 0, flagVersion, 0, 0, 0, 8, 0, 0, 0}, u64(protoNeeded)...)); err != nil {
		t.Fatal(err)
	}
	f.must(setOwner, nil, false)
	f.must(setFeatures, u64(offered&^virtio.FeatureEventIdx), false)
	tell := func(user uint64) {
		f.must(setMemTable, table(region{guestBase, memSize, user, 0}), false, f.mem)
	}
	tell(userBase)
	f.must(setVringNum, vringState{0, queueSize}.bytes(), false)
	f.must(setVringBase, vringState{0, 0}.bytes(), false)
	f.must(setVringAddr, addr(0, 0, atAvail, atUsed), false)
	f.must(setVringCall, u64(0), false, f.call)
	f.must(setVringKick, u64(0), false, f.kick)
	f.must(setVringEnable, vringState{0, 1}.bytes(), false)
	wants := func(n int32, slot int) {
		t.Helper()
		if s := f.do(slot, opRead, 0, 512); s != 0 {
			t.Errorf("slot %d: status %d", slot, s)
		}
		if got := tables.Load(); got != n {
			t.Errorf("the back end was told of memory %d times, not %d", got, n)
		}
	}
	wants(1, 0)
	tell(userBase)
	f.must(setVringEnable, vringState{0, 1}.bytes(), false)
	wants(1, 1)
	f.must(setMemTable, table(region{guestBase, memSize, userBase, 0}, region{guestBase + memSize, memSize, userBase + memSize, 0}), false, f.mem, f.mem)
	wants(2, 2)
	_ = f.close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
