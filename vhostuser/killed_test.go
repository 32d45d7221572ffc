package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// A back end in a process of its own, which can be killed: descriptor 3 is the connection, 4
// the guest's memory, 5 a pipe to say on that the guest is served, the variable the image.
const childEnv = "VHOSTUSER_TEST_BACKEND"

// netBackEnd in place of an image asks for a network back end.
const netBackEnd = "net"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := child(path); err != nil {
			fmt.Fprintln(os.Stderr, "back end:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(path string) error {
	f := os.NewFile(3, "connection")
	c, err := net.FileConn(f)
	if err != nil {
		return err
	}
	st, err := os.NewFile(4, "memory").Stat()
	if err != nil {
		return err
	}
	if path == netBackEnd {
		return netChild(c.(*net.UnixConn), st)
	}
	b, err := openDisk(path)
	if err != nil {
		return err
	}
	return Serve(context.Background(), c.(*net.UnixConn), b, Options{
		Memory:  Whitelist{st},
		OnStart: func() { os.NewFile(5, "started").Close() },
	})
}

// spawnBackEnd starts a back end in a process of its own; it takes c over. The pipe ends when the
// guest is served, or the back end has.
func spawnBackEnd(t testing.TB, c *net.UnixConn, mem *os.File, path string, more ...*os.File) (*exec.Cmd, *os.File) {
	t.Helper()
	file, err := c.File()
	_ = c.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+path)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	cmd.ExtraFiles = append([]*os.File{file, mem, w}, more...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, r
}

// spawn starts a back end for this front end.
func (f *front) spawn(path string) *exec.Cmd {
	f.t.Helper()
	own, theirs := socketpair(f.t)
	f.c, f.end = own, nil
	cmd, started := spawnBackEnd(f.t, theirs, f.mem, path)
	started.Close()
	return cmd
}

// TestKilled kills the back end with requests in flight, again and again. Every request made
// is answered by some back end, without an error, exactly once, and every write that was
// answered is in the image.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	create(t, path, diskSize)
	f := newFront(t)
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	var cmd *exec.Cmd
	kill := func() {
		if cmd != nil {
			end(cmd)
		}
	}
	defer func() { kill() }()
	busy := make([]bool, slots)
	var content [slots]uint64 // of each slot's own sectors, as last written
	number := uint64(0)
	inFlight := 0
	fill := func() {
		for i := range slots {
			if !busy[i] {
				number++
				busy[i], content[i] = true, number
				inFlight++
				binary.LittleEndian.PutUint64(f.data(i), number)
				copy(f.data(i)[8:4096], bytes.Repeat([]byte{byte(number)}, 4088))
				f.submit(i, opWrite, uint64(8*i), 4096)
			}
		}
	}
	reap := func() {
		i := f.next()
		if !busy[i] || *f.status(i) != 0 {
			t.Fatalf("request %d: in flight %v, status %d", i, busy[i], *f.status(i))
		}
		busy[i] = false
		inFlight--
	}
	for range 40 {
		kill()
		cmd = f.spawn(path)
		f.start()
		for range random.IntN(60) {
			fill()
			reap()
		}
		fill() // killed with all slots in flight
	}
	kill()
	cmd = f.spawn(path)
	f.start()
	for inFlight > 0 {
		reap()
	}
	if f.used != f.avail {
		t.Errorf("%d answers to %d requests", f.used, f.avail)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range content {
		if got := binary.LittleEndian.Uint64(image[4096*i:]); got != want {
			t.Errorf("slot %d holds write %d, the last was %d", i, got, want)
		}
	}
}
