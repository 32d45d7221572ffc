package engine

import (
	"bytes"
	"encoding/binary"
	"testing"
	"testing/iotest"
)

// A response is whole or refused, however it is split.
func FuzzResponse(f *testing.F) {
	f.Add([]byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0})
	f.Add([]byte{0x80, 0x02, 0, 0, 0, 11, 0, 0, 0, 0, 9, 9})
	f.Add([]byte{0x00, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x1e})
	f.Fuzz(func(t *testing.T, in []byte) {
		rsp, err := readResponse(bytes.NewReader(in))
		split, err2 := readResponse(iotest.OneByteReader(bytes.NewReader(in)))
		if (err == nil) != (err2 == nil) || !bytes.Equal(rsp, split) {
			t.Fatalf("whole: %x, %v; split: %x, %v", rsp, err, split, err2)
		}
		if err != nil {
			return
		}
		if len(rsp) > MaxMessage || int(binary.BigEndian.Uint32(rsp[2:])) != len(rsp) || !bytes.HasPrefix(in, rsp) {
			t.Fatalf("accepted %x of %x", rsp, in)
		}
	})
}

// A control reply is whole and successful or refused.
func FuzzReply(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0}, uint8(0))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0x3f, 0xff}, uint8(4))
	f.Add([]byte{0, 0, 0, 9}, uint8(4))
	f.Fuzz(func(t *testing.T, in []byte, n uint8) {
		body, err := readReply(iotest.HalfReader(bytes.NewReader(in)), ctlInit, int(n))
		if err == nil && (len(body) != int(n) || !bytes.Equal(body, in[4:4+int(n)]) || binary.BigEndian.Uint32(in) != 0) {
			t.Fatalf("accepted %x of %x", body, in)
		}
	})
}

// A command that is let through has one meaning for us and for the engine.
func FuzzRefuse(f *testing.F) {
	f.Add([]byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8})
	f.Add([]byte{0, 0, 0, 8, 4, 0, 0, 0, 12, 0x80, 0x01})
	f.Fuzz(func(t *testing.T, cmd []byte) {
		rsp := refuse(cmd)
		if rsp == nil {
			if len(cmd) < headerSize || len(cmd) > MaxMessage || cmd[0] != 0x80 || int(binary.BigEndian.Uint32(cmd[2:])) != len(cmd) {
				t.Fatalf("let through %x", cmd)
			}
			return
		}
		if _, err := readResponse(bytes.NewReader(rsp)); err != nil {
			t.Fatalf("refusal %x is no response: %v", rsp, err)
		}
	})
}
