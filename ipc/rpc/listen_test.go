package rpc

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"redoubt.dev/redoubt/ipc"
)

// TestListen: whoever connects is served, no more than so many at once, and serving ends with its
// context though they stay.
func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "rpc") // a socket's name is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil { // a Builder that was killed leaves one
		t.Fatal(err)
	}
	const most = 3
	var mu sync.Mutex
	now := 0
	socket, err := ipc.ListenMessages(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	serve, err := Serve(socket, most, func(context.Context, *Request) (any, error) {
		mu.Lock()
		defer mu.Unlock()
		now++
		return now, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); serve(ctx) }()
	dial := func() *Peer {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		f, err := c.File()
		_ = c.Close()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := ipc.FromFile(f)
		if err != nil {
			t.Fatal(err)
		}
		p := New(conn, nil)
		ran := make(chan struct{})
		go func() { defer close(ran); _ = p.Run(context.Background()) }()
		t.Cleanup(func() { p.Close(); <-ran })
		return p
	}
	var all []*Peer
	for range most {
		p := dial()
		if _, err := p.Call(t.Context(), "count", nil, nil); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	// One more waits until another one leaves.
	answered := make(chan error, 1)
	late := dial()
	go func() { _, err := late.Call(t.Context(), "count", nil, nil); answered <- err }()
	if _, err := all[0].Call(t.Context(), "count", nil, nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-answered:
		t.Errorf("more than %d are served: %v", most, err)
	default:
	}
	all[0].Close()
	if err := <-answered; err != nil {
		t.Error(err)
	}
	cancel()
	<-ended
}
