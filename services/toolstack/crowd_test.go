package toolstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/api/redoubt/v1/redoubtv1connect"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

const stranger = 0x52450201

// served is a toolstack's API for operator stranger+1 and viewer stranger+2, on a socket for all, and whom it turned away.
func served(t *testing.T) (path string, denied chan protocol.Denied) {
	t.Helper()
	return serve(t, withBuilder(t, func(context.Context, *rpc.Request) (any, error) { return struct{}{}, nil }))
}

func serve(t *testing.T, ts *Toolstack) (path string, denied chan protocol.Denied) {
	t.Helper()
	denied = make(chan protocol.Denied, 1<<10)
	ts.roles = &roles{"acme", []uint32{stranger + 1}, []uint32{stranger + 2}, func(d protocol.Denied) { denied <- d }}
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	path = filepath.Join(dir, "api")
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o666)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ts.serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path, denied
}

// dialAs connects as another user: whose a connection is the kernel has from the thread that connects.
func dialAs(t *testing.T, uid int, path string) net.Conn {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: run as root, as `make unit` is")
	}
	got := make(chan net.Conn)
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); e != 0 {
			failed <- e
			return
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			failed <- err
			return
		}
		got <- c
	}()
	select {
	case c := <-got:
		t.Cleanup(func() { c.Close() })
		return c
	case err := <-failed:
		t.Fatal(err)
		return nil
	}
}

// over is an HTTP client on one connection.
func over(c net.Conn) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
}

// TestGate: of who may not make a call nothing is unpacked or decoded: that a body is damaged only those learn who may.
func TestGate(t *testing.T) {
	path, denied := served(t)
	post := func(uid int) (status int, text string) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://x"+redoubtv1connect.GuestServiceValidateProcedure,
			strings.NewReader("this is not packed"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Content-Encoding", "gzip")
		res, err := over(dialAs(t, uid, path)).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	if status, text := post(stranger); status != http.StatusForbidden || !strings.Contains(text, "has no part in tenant acme") {
		t.Errorf("%d: %s", status, text)
	}
	if d := <-denied; d.Method != "Validate" || d.Caller.UID != stranger {
		t.Errorf("denied %+v", d)
	}
	for _, uid := range []int{0, stranger + 1} {
		if status, text := post(uid); status != http.StatusBadRequest || !strings.Contains(text, "gzip") {
			t.Errorf("user %d: %d: %s", uid, status, text)
		}
	}
	if len(denied) > 0 {
		t.Errorf("denied %+v", <-denied)
	}
}

// closed tells whether the server has closed a connection: it says nothing by itself.
func closed(t *testing.T, c net.Conn) bool {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// TestCrowd: a user has so many connections at a time and no more; others have theirs.
func TestCrowd(t *testing.T) {
	path, _ := served(t)
	var all []net.Conn
	for range maxConnections + 1 {
		all = append(all, dialAs(t, stranger, path))
	}
	if !closed(t, all[maxConnections]) {
		t.Errorf("connection %d of one user is served", maxConnections+1)
	}
	for _, c := range []net.Conn{all[0], dialAs(t, stranger+1, path), dialAs(t, 0, path)} {
		if closed(t, c) {
			t.Error("another one is closed")
		}
	}
	if err := all[0].Close(); err != nil {
		t.Fatal(err)
	}
	for try := 0; ; try++ { // the server sees the end some time
		if c := dialAs(t, stranger, path); !closed(t, c) {
			break
		} else if try == 100 {
			t.Fatal("there is no room for another one")
		}
	}
}

// TestStrangers: a user who has others' numbers to use, too, does not take the place of those who have a part in the tenant.
func TestStrangers(t *testing.T) {
	path, _ := served(t)
	for n := range maxStrangers {
		dialAs(t, stranger+10+n/maxConnections, path)
	}
	if !closed(t, dialAs(t, stranger+100, path)) {
		t.Errorf("connection %d of strangers is served", maxStrangers+1)
	}
	for _, uid := range []int{0, stranger + 1, stranger + 2} {
		if closed(t, dialAs(t, uid, path)) {
			t.Errorf("user %d has none", uid)
		}
	}
}

// TestCrowdLeaves: connections that ended are not counted, whatever was spoken on them.
func TestCrowdLeaves(t *testing.T) {
	path, _ := served(t)
	for range 2 * maxStrangers {
		client := http2(dialAs(t, stranger, path))
		if _, err := client.List(t.Context(), &v1.ListRequest{}); connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Fatal(err)
		}
		client.close()
	}
}
