package ipc_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"redoubt.dev/redoubt/ipc"
)

func pipe(t *testing.T) (*ipc.Conn, *ipc.Conn) {
	t.Helper()
	a, b, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestDescriptorsTravel(t *testing.T) {
	a, b := pipe(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := a.Send([]byte("take this"), w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	msg, files, err := b.Receive()
	if err != nil || len(files) != 1 || string(msg) != "take this" {
		t.Fatalf("%q %d files, %v", msg, len(files), err)
	}
	if _, err := files[0].WriteString("x"); err != nil {
		t.Fatal(err)
	}
	files[0].Close()
	if all, err := io.ReadAll(r); err != nil || string(all) != "x" {
		t.Fatalf("%q %v", all, err)
	}
}

// TestOneWay: an end that was sent has deadlines, as the one that stayed.
func TestOneWay(t *testing.T) {
	a, b := pipe(t)
	r, w, err := ipc.OneWay()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	err = a.Send([]byte("wait for this"), r)
	r.Close()
	if err != nil {
		t.Fatal(err)
	}
	_, files, err := b.Receive()
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	defer files[0].Close()
	if err := files[0].SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := files[0].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

// TestLastWordArrives: what a peer sent before it closed arrives, even when it closed with
// messages of ours unread.
func TestLastWordArrives(t *testing.T) {
	a, b := pipe(t)
	if err := a.Send([]byte("never read")); err != nil {
		t.Fatal(err)
	}
	if err := b.Send([]byte("last word")); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if msg, _, err := a.Receive(); err != nil || string(msg) != "last word" {
		t.Fatalf("%q %v", msg, err)
	}
	if _, _, err := a.Receive(); !errors.Is(err, io.EOF) {
		t.Fatalf("after the last word: %v", err)
	}
}

func TestBounds(t *testing.T) {
	a, b := pipe(t)
	if err := a.Send(make([]byte, ipc.MaxMessage+1)); !errors.Is(err, ipc.ErrTooLarge) {
		t.Fatalf("too large: %v", err)
	}
	if err := a.Send(nil); !errors.Is(err, ipc.ErrTooLarge) {
		t.Fatalf("empty: %v", err)
	}
	big := bytes.Repeat([]byte{7}, ipc.MaxMessage)
	go func() { _ = a.Send(big) }()
	if msg, _, err := b.Receive(); err != nil || !bytes.Equal(msg, big) {
		t.Fatalf("%d bytes, %v", len(msg), err)
	}
	if err := a.Send([]byte("longer than the buffer")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.ReceiveInto(make([]byte, 4)); !errors.Is(err, ipc.ErrTooLarge) {
		t.Fatalf("cut off: %v", err)
	}
}
