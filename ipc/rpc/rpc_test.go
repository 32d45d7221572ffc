package rpc_test

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
)

// peers connects two and runs both.
func peers(t *testing.T, ha, hb rpc.Handler) (*rpc.Peer, *rpc.Peer) {
	t.Helper()
	ca, cb, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	a, b := rpc.New(ca, ha), rpc.New(cb, hb)
	var wg sync.WaitGroup
	for _, p := range []*rpc.Peer{a, b} {
		wg.Go(func() {
			if err := p.Run(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() { a.Close(); b.Close(); wg.Wait() })
	return a, b
}

func echo(_ context.Context, r *rpc.Request) (any, error) {
	var s string
	if err := r.Decode(&s); err != nil {
		return nil, err
	}
	switch r.Method {
	case "echo":
		return s, nil
	case "refuse":
		return nil, rpc.Errorf(rpc.Refused, "%s: not for you", s)
	case "open":
		f, err := os.Open(os.DevNull)
		return rpc.WithFiles{Value: s, Files: []*os.File{f}}, err
	case "big":
		return strings.Repeat("x", ipc.MaxMessage), nil
	}
	return nil, errors.New("no such method")
}

func TestCalls(t *testing.T) {
	a, b := peers(t, echo, echo)
	ctx := context.Background()
	var wg sync.WaitGroup
	for range 200 {
		for _, p := range []*rpc.Peer{a, b} {
			wg.Go(func() {
				var out string
				if _, err := p.Call(ctx, "echo", "hello", &out); err != nil || out != "hello" {
					t.Errorf("%q %v", out, err)
				}
			})
		}
	}
	wg.Wait()
	_, err := a.Call(ctx, "refuse", "x", nil)
	if rpc.KindOf(err) != rpc.Refused || err.Error() != "x: not for you" {
		t.Fatalf("the error lost its kind: %v", err)
	}
	files, err := a.Call(ctx, "open", "x", nil)
	if err != nil || len(files) != 1 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	files[0].Close()
	if _, err := a.Call(ctx, "big", "x", nil); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Fatalf("answer over the bound: %v", err)
	}
	if _, err := a.Call(ctx, "echo", 7, nil); rpc.KindOf(err) != rpc.Invalid {
		t.Fatalf("wrong body: %v", err)
	}
}

// TestPeerGone: calls open when the peer goes fail, and so do later ones.
func TestPeerGone(t *testing.T) {
	entered := make(chan struct{})
	a, b := peers(t, nil, func(ctx context.Context, _ *rpc.Request) (any, error) {
		close(entered)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	go func() { <-entered; b.Close() }()
	if _, err := a.Call(context.Background(), "wait", 0, nil); !errors.Is(err, rpc.ErrGone) {
		t.Fatalf("open call: %v", err)
	}
	if _, err := a.Call(context.Background(), "wait", 0, nil); !errors.Is(err, rpc.ErrGone) {
		t.Fatalf("later call: %v", err)
	}
}

func TestCallGivenUp(t *testing.T) {
	a, _ := peers(t, nil, func(ctx context.Context, _ *rpc.Request) (any, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := a.Call(ctx, "wait", 0, nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

// TestBound: a peer that does not read keeps nobody waiting for longer than the bound, neither who has something to say nor who
// waits for an answer.
func TestBound(t *testing.T) {
	ours, deaf, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	p := rpc.New(ours, nil)
	p.Bound(50 * time.Millisecond)
	ended := make(chan error, 1)
	go func() { ended <- p.Run(context.Background()) }()
	asked := make(chan error, 1)
	go func() {
		_, err := p.Call(context.Background(), "ask", 0, nil)
		asked <- err
	}()
	for p.Notify("tell", strings.Repeat("x", 1<<10)) == nil {
	}
	if err := <-asked; !errors.Is(err, rpc.ErrGone) {
		t.Errorf("a call: %v", err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestClosedFile: a file that was closed is the caller's mistake, and nobody's end.
func TestClosedFile(t *testing.T) {
	a, _ := peers(t, nil, func(context.Context, *rpc.Request) (any, error) { return nil, nil })
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := a.Call(context.Background(), "take", 0, nil, f); !errors.Is(err, os.ErrClosed) || errors.Is(err, rpc.ErrGone) {
		t.Errorf("call with a closed file: %v", err)
	}
	if _, err := a.Call(context.Background(), "go on", 0, nil); err != nil {
		t.Error(err)
	}
}

// TestNoticeFiles: descriptors beside a notice, which has none, are closed.
func TestNoticeFiles(t *testing.T) {
	ours, raw, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	noticed := make(chan int, 1)
	p := rpc.New(ours, func(_ context.Context, r *rpc.Request) (any, error) {
		noticed <- len(r.Files)
		return nil, nil
	})
	go func() { _ = p.Run(context.Background()) }()
	defer p.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := raw.Send([]byte(`{"method":"tell","body":0}`), w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if n := <-noticed; n != 0 {
		t.Errorf("the handler has %d", n)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the other end of what was sent: %v", err)
	}
}
