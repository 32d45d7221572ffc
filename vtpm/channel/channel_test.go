package channel

import (
	"bytes"
	"testing"
)

func FuzzParse(f *testing.F) {
	f.Add(Frame{Kind: Command, Locality: 3, Seq: 1, Data: make([]byte, minCommand)}.Append(nil))
	f.Add(Frame{Kind: Open, Data: []byte("log")}.Append(nil))
	f.Add(Frame{Kind: Failed, Data: []byte("why")}.Append(nil))
	f.Add(Frame{Kind: Again}.Append(nil))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, msg []byte) {
		fr, err := Parse(msg)
		if err != nil {
			return
		}
		if !bytes.Equal(fr.Append(nil), msg) {
			t.Fatalf("%+v does not encode to what it came from", fr)
		}
		if (fr.Kind == Command || fr.Kind == Reply) && (len(fr.Data) < minCommand || len(fr.Data) > MaxCommand) {
			t.Fatalf("%v of %d bytes accepted", fr.Kind, len(fr.Data))
		}
	})
}
