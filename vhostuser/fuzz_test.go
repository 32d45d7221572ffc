package vhostuser

import (
	"context"
	"encoding/binary"
	"io"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzSession plays a front end that may send anything. Each byte of the script is a request
// number, a flag whether the guest's memory or an eventfd comes along, and a payload's length
// and bytes. Whatever it says, the session ends by itself when the connection does.
func FuzzSession(f *testing.F) {
	f.Add([]byte{5, 1, 40, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 127, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{8, 0, 8, 0, 0, 0, 0, 64, 0, 0, 0, 12, 2, 8, 0, 0, 0, 0, 0, 0, 0, 0, 18, 0, 8, 0, 0, 0, 0, 1, 0, 0, 0})
	f.Add([]byte{24, 0, 20, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 64, 0, 0, 0, 0, 0})
	path := filepath.Join(f.TempDir(), "disk")
	b := disk(f, path)
	f.Cleanup(func() { _ = b.Close() })
	f.Fuzz(func(t *testing.T, script []byte) {
		own, theirs := socketpair(t)
		mem, bell := memfd(t, memSize, unix.F_SEAL_SHRINK), eventfd(t)
		st, err := mem.Stat()
		if err != nil {
			t.Fatal(err)
		}
		end := make(chan error, 1)
		go func() { end <- Serve(context.Background(), theirs, b, Options{Memory: Whitelist{st}}) }()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			_, _ = io.Copy(io.Discard, own)
		}()
		for len(script) >= 3 {
			r, with, n := script[0], script[1], min(int(script[2]), len(script)-3)
			payload := script[3 : 3+n]
			script = script[3+n:]
			m := binary.LittleEndian.AppendUint32(nil, uint32(r))
			m = binary.LittleEndian.AppendUint32(m, flagVersion|uint32(with>>4)&flagNeedAck)
			m = binary.LittleEndian.AppendUint32(m, uint32(n))
			var oob []byte
			switch with & 3 {
			case 1:
				oob = unix.UnixRights(int(mem.Fd()))
			case 2:
				oob = unix.UnixRights(int(bell.Fd()))
			}
			if _, _, err := own.WriteMsgUnix(append(m, payload...), oob, nil); err != nil {
				break
			}
		}
		if err := own.CloseWrite(); err != nil {
			_ = own.Close()
		}
		err = <-end
		t.Logf("ended: %v", err)
		_ = own.Close()
		<-drained
	})
}

// FuzzPayloads holds the parsers to their lengths.
func FuzzPayloads(f *testing.F) {
	f.Add(words(1, guestBase, memSize, userBase, 0))
	f.Add(words(1, 0, 1<<20))
	f.Add(make([]byte, 40))
	f.Fuzz(func(t *testing.T, p []byte) {
		if regions, err := parseMemTable(p); err == nil && 8+32*len(regions) != len(p) {
			t.Fatalf("%d regions of %d bytes", len(regions), len(p))
		}
		if _, size, err := parseConfig(p); err == nil && configHead+int(size) != len(p) {
			t.Fatalf("configuration of %d in %d bytes", size, len(p))
		}
		if h, err := parseInflight(p); err == nil && string(h.bytes(len(p))[:20]) != string(p[:20]) {
			t.Fatalf("%+v of % x", h, p)
		}
		_, _ = parseVringAddr(p)
		_, _ = parseVringState(p)
		_, _ = parseU64(p)
		if len(p) >= headerSize {
			if h, err := parseHeader(p); err == nil && h.size > maxPayload {
				t.Fatalf("header %+v", h)
			}
		}
	})
}

// FuzzRecover lets the region hold anything: heads are in range, each at most once.
func FuzzRecover(f *testing.F) {
	f.Add(make([]byte, inflightLength(8)), uint16(0))
	f.Fuzz(func(t *testing.T, data []byte, used uint16) {
		b := make([]byte, inflightLength(8))
		copy(b, data)
		seen := map[uint16]bool{}
		for _, h := range newTracker(b, 0, 8).recover(used) {
			if h >= 8 || seen[h] {
				t.Fatalf("head %d", h)
			}
			seen[h] = true
		}
	})
}
