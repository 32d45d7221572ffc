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
	want := bytes.Repeat([]byte("answer "), 1<<10)
	v, err := Get("a service", func(into *os.File) (int, error) {
		a, err := Put(into, want)
		return a.Size, err
	})
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
		if got, err := Read(w.Files, a); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	if _, err := w.Files[0].WriteAt([]byte("x"), 0); err == nil {
		t.Error("it can be written")
	}
	for _, size := range []int{-1, protocol.MaxAnswer + 1} {
		if _, err := Get("a service", func(*os.File) (int, error) { return size, nil }); err == nil || !strings.Contains(err.Error(), "a service: an answer of") {
			t.Errorf("%d bytes: %v", size, err)
		}
		if _, err := Read(w.Files, protocol.Answered{Size: size}); err == nil {
			t.Errorf("read %d bytes", size)
		}
	}
	if _, err := Read(nil, a); err == nil {
		t.Error("read without a descriptor")
	}
	if _, err := Put(w.Files[0], make([]byte, protocol.MaxAnswer+1)); rpc.KindOf(err) != rpc.Unavailable {
		t.Errorf("too long: %v", err)
	}
	failed := errors.New("failed")
	if _, err := Get("a service", func(*os.File) (int, error) { return 0, failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
}
