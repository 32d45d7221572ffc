package store_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/store"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/disk"
	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
)

const stateProgram = "redoubt-store-state"

// TestMain makes the test binary the store's programs, too: links of those names lie beside it,
// where package process looks for them.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case stateProgram:
		process.Main(stateProgram, store.Serve)
	case store.LogicProgram:
		if logic.Serve(3) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	for _, name := range []string{stateProgram, store.LogicProgram} {
		if err := os.Symlink(self, filepath.Join(filepath.Dir(self), name)); err != nil && !errors.Is(err, os.ErrExist) {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// service is a running redoubt-store-state and the test as its Builder.
type service struct {
	t    *testing.T
	p    *process.Process
	peer *rpc.Peer
	stop func()
}

func start(t *testing.T, logs string) *service {
	t.Helper()
	spawner := store.NewSpawner(func() (*process.Process, error) {
		return process.Start(process.Options{Program: store.LogicProgram, LogDir: logs})
	})
	p, err := process.Start(process.Options{Program: stateProgram, LogDir: logs})
	must(t, err)
	s := &service{t: t, p: p, peer: rpc.New(p.Control, spawner.Handle)}
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.peer.Run(context.Background()) })
	s.stop = sync.OnceFunc(func() {
		p.Kill()
		<-p.Done()
		wg.Wait()
		spawner.Close()
	})
	t.Cleanup(s.stop)
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *service) call(method string, in any, f ...*os.File) error {
	_, err := s.peer.Call(s.t.Context(), method, in, nil, f...)
	for _, f := range f {
		f.Close()
	}
	return err
}

func (s *service) configure(dir string, reset int) error {
	s.t.Helper()
	return s.call(store.MethodConfigure, store.Configure{Reset: reset, Dir: dir})
}

func (s *service) connect(d tree.Domain) *client.Client {
	s.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(s.t, err)
	must(s.t, s.call(store.MethodConnect, store.Connect{Domain: d}, os.NewFile(uintptr(fds[0]), "theirs")))
	f := os.NewFile(uintptr(fds[1]), "ours")
	defer f.Close()
	c, err := net.FileConn(f)
	must(s.t, err)
	cl := client.New(c)
	s.t.Cleanup(func() { cl.Close() })
	return cl
}

// TestService: the programs as the Builder runs them. The store is killed, started again, and
// has what was acknowledged; clients connect anew and their watches tell them to look.
func TestService(t *testing.T) {
	logs, dir := t.TempDir(), t.TempDir()
	s := start(t, logs)
	must(t, s.configure(dir, 0))
	if err := s.configure(dir, 0); rpc.KindOf(err) != rpc.Exists {
		t.Errorf("configured twice: %v", err)
	}
	c := s.connect(server.Builder)
	must(t, c.Watch("/a", "t"))
	must(t, c.Transaction(func(x *client.Tx) error { return errors.Join(x.Write("/a/b", "1"), x.Write("/c", "2")) }))
	must(t, s.connect(server.VTPM).Write(server.ReadyNode(3), "1"))

	other := start(t, logs)
	if err := other.configure(dir, 0); rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second store over the same contents: %v", err)
	}
	s.stop()
	if _, err := c.Read("/a/b"); !errors.Is(err, client.ErrClosed) {
		t.Errorf("read from a store that was killed: %v", err)
	}

	s = start(t, logs)
	must(t, s.configure(dir, -1))
	c = s.connect(server.Builder)
	for p, want := range map[string]string{"/a/b": "1", "/c": "2", server.ReadyNode(3): "1"} {
		if v, err := c.Read(p); v != want || err != nil {
			t.Errorf("%s: %q %v", p, v, err)
		}
	}
	if err := c.Write(server.ReadyNode(3), "forged"); !errors.Is(err, tree.EACCES) {
		t.Errorf("the ready node: %v", err)
	}
	must(t, c.Watch("/a", "t"))
	if e := <-c.Events(); e.Path != "/a" {
		t.Errorf("%v", e)
	}
}

// TestListen: who is root and connects to the socket is domain 0.
func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "store")
	must(t, err)
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	must(t, err)
	must(t, l.Close())
	s := start(t, t.TempDir())
	must(t, s.configure(t.TempDir(), 0))
	must(t, s.call(store.MethodListen, struct{}{}, f))
	nc, err := net.Dial("unix", path)
	must(t, err)
	c := client.New(nc)
	defer c.Close()
	must(t, c.Write("relative", "v"))
	if v, err := c.Read("/local/domain/0/relative"); v != "v" || err != nil {
		t.Errorf("%q %v", v, err)
	}
}

// TestDamagedContents: the service says why it does not take them and changes nothing.
func TestDamagedContents(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, disk.File)
	must(t, os.WriteFile(path, []byte("something else"), 0o600))
	s := start(t, t.TempDir())
	if err := s.configure(dir, 0); rpc.KindOf(err) != rpc.Unavailable || !strings.Contains(err.Error(), path) {
		t.Errorf("%v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "something else" {
		t.Errorf("%q %v", b, err)
	}
}

// TestNotConfigured: a Builder that only connects gets a store in memory.
func TestNotConfigured(t *testing.T) {
	s := start(t, t.TempDir())
	c := s.connect(server.Builder)
	must(t, c.Write("/a", "1"))
	r, w, err := os.Pipe()
	must(t, err)
	defer w.Close()
	if err := s.call("nonsense", struct{}{}, r); rpc.KindOf(err) != rpc.Invalid {
		t.Errorf("%v", err)
	}
}
