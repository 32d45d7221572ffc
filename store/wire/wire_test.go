package wire

import (
	"bytes"
	"testing"
)

func FuzzReadMessage(f *testing.F) {
	f.Add(Message{Type: Write, Request: 1, Payload: []byte("/a\x00v")}.Append(nil))
	f.Add(Message{Type: Directory, Tx: 9, Payload: Join("/")}.Append(nil))
	f.Add(bytes.Repeat([]byte{0xff}, 20))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ReadMessage(bytes.NewReader(b))
		if err != nil {
			return
		}
		if len(m.Payload) > MaxPayload || !bytes.HasPrefix(b, m.Append(nil)) {
			t.Fatalf("%+v does not encode to what it came from", m)
		}
		for n := 1; n < 4; n++ {
			if s, err := Split(m.Payload, n, false); err == nil && !bytes.Equal(Join(s...), m.Payload) {
				t.Fatalf("split %q", s)
			}
		}
	})
}
