package ipc

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
)

func TestRefuse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	f, err := Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	early, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Refuse(ctx, f) }()
	late, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	for name, c := range map[string]net.Conn{"who waited": early, "who comes": late} {
		if _, err := c.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // a net.Conn's own
			t.Errorf("%s: %v", name, err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if l, err := net.FileListener(f); err != nil { // the socket itself goes on
		t.Error(err)
	} else {
		l.Close()
	}
}
