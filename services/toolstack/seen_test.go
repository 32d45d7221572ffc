package toolstack

import (
	"bytes"
	"io"
	"testing"
	"time"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// TestSeen: a listing goes to the Builder as it came, in memory whose size nobody can change; one that is too large, or does not say
// when it was begun, goes nowhere.
func TestSeen(t *testing.T) {
	var in protocol.Validate
	if files, err := seen(&v1.ValidateRequest{}, &in); err != nil || files != nil || in.Seen != nil {
		t.Errorf("none: %v, %v", files, err)
	}
	text := []byte("/\x00/etc\x00")
	files, err := seen(&v1.ValidateRequest{Seen: text, SeenAtNs: 5e9, SeenOf: "disk0p1"}, &in)
	if err != nil || len(files) != 1 || len(in.Files) != 1 {
		t.Fatal(files, in.Files, err)
	}
	defer files[0].Close()
	got, err := io.ReadAll(io.NewSectionReader(files[0], 0, 1<<20))
	if err != nil || !bytes.Equal(got, text) || in.Seen.Size != len(text) || !in.Seen.Begun.Equal(time.Unix(5, 0)) || in.Seen.Volume != "disk0p1" {
		t.Errorf("%q, %+v, %v", got, in.Seen, err)
	}
	if files[0].Truncate(1) == nil {
		t.Error("its size can be changed")
	}
	for name, r := range map[string]*v1.ValidateRequest{
		"no listing": {SeenAtNs: 5}, "a volume alone": {SeenOf: "disk0"}, "no time": {Seen: text}, "a time before": {Seen: text, SeenAtNs: -5},
		"too much": {Seen: make([]byte, protocol.MaxSeen+1), SeenAtNs: 5}, "a volume": {Seen: text, SeenAtNs: 5, SeenOf: string(make([]byte, 100))},
	} {
		if files, err := seen(r, &protocol.Validate{}); rpc.KindOf(err) != rpc.Invalid || files != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
