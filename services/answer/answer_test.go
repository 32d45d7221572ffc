package answer

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// TestAnswer: an answer comes whole, who gets it cannot change it, and one who lies of its length is found out.
func TestAnswer(t *testing.T) {
	want, list := bytes.Repeat([]byte("answer "), 1<<10), []byte("a list")
	v, err := Get("a service", func(into *os.File) (protocol.Answered, error) { return Put(into, want, list) })
	if err != nil {
		t.Fatal(err)
	}
	w, ok := v.(rpc.WithFiles)
	if !ok {
		t.Fatalf("%T", v)
	}
	defer ipc.CloseAll(w.Files)
	a, _ := w.Value.(protocol.Answered)
	for range 2 { // where its descriptor stands does not matter
		if got, raw, err := Read(w.Files, a); err != nil || !bytes.Equal(got, want) || !bytes.Equal(raw, list) {
			t.Errorf("%d bytes, %q, %v", len(got), raw, err)
		}
	}
	if _, err := w.Files[0].WriteAt([]byte("x"), 0); err == nil {
		t.Error("it can be written")
	}
	for _, lie := range []protocol.Answered{{Size: -1}, {Size: protocol.MaxAnswer + 1}, {Size: 1, Raw: 2}, {Raw: -1}} {
		if _, err := Get("a service", func(*os.File) (protocol.Answered, error) { return lie, nil }); err == nil || !strings.Contains(err.Error(), "a service: an answer of") {
			t.Errorf("%+v: %v", lie, err)
		}
		if _, _, err := Read(w.Files, lie); err == nil {
			t.Errorf("read %+v", lie)
		}
	}
	if _, _, err := Read(nil, a); err == nil {
		t.Error("read without a descriptor")
	}
	if _, err := Put(w.Files[0], make([]byte, protocol.MaxAnswer+1), nil); rpc.KindOf(err) != rpc.Unavailable {
		t.Errorf("too long: %v", err)
	}
	failed := errors.New("failed")
	if _, err := Get("a service", func(*os.File) (protocol.Answered, error) { return protocol.Answered{}, failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
}
