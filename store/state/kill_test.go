package state_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/disk"
	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/state"
	"redoubt.dev/redoubt/store/tree"
)

// child is a store of its own: descriptor 3 is its listening socket, 4 its directory. It runs
// until it is killed.
func child() {
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		panic(err)
	}
	t := tree.New(server.ReservedNames()...)
	db, err := disk.Open(os.NewFile(4, "dir"), t)
	if err != nil {
		panic(err)
	}
	workers := state.WorkersFunc(func(context.Context) (*state.Worker, error) {
		c, f, err := ipc.Pair()
		if err != nil {
			return nil, err
		}
		go func() { _ = logic.Serve(int(f.Fd())); f.Close() }()
		return &state.Worker{Conn: c, Kill: func() {}}, nil
	})
	accept := make(chan state.Client)
	go func() { _ = state.Listen(context.Background(), quiet(), l.(*net.UnixListener), accept) }()
	state.New(quiet(), state.Options{Tree: t, Persist: db.Keep, Workers: workers}).Run(context.Background(), accept)
}

// victim starts such stores, one after another, over one directory and one listening socket, so
// that clients connect whether or not a store runs just now.
type victim struct {
	tb       testing.TB
	socket   string
	listener *os.File
	dir      *os.File
	cmd      *exec.Cmd
}

func newVictim(tb testing.TB) *victim {
	d, err := os.MkdirTemp("", "store")
	must(tb, err)
	tb.Cleanup(func() { _ = os.RemoveAll(d) })
	v := &victim{tb: tb, socket: filepath.Join(d, "socket")}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: v.socket, Net: "unix"})
	must(tb, err)
	l.SetUnlinkOnClose(false)
	v.listener, err = l.File()
	must(tb, err)
	must(tb, l.Close())
	v.dir, err = os.Open(d)
	must(tb, err)
	tb.Cleanup(func() { v.kill(); v.listener.Close(); v.dir.Close() })
	return v
}

func (v *victim) start() {
	v.tb.Helper()
	v.cmd = exec.Command("/proc/self/exe")
	v.cmd.Env = []string{"STORE_TEST_ROLE=store"}
	v.cmd.ExtraFiles = []*os.File{v.listener, v.dir}
	v.cmd.Stderr = os.Stderr
	v.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	must(v.tb, v.cmd.Start())
}

func (v *victim) kill() {
	if v.cmd != nil {
		_ = v.cmd.Process.Kill()
		_ = v.cmd.Wait()
		v.cmd = nil
	}
}

func (v *victim) dial() *client.Client {
	v.tb.Helper()
	c, err := net.Dial("unix", v.socket)
	must(v.tb, err)
	return client.New(c)
}

// TestKill: a store is killed at random instants while clients write, change several nodes in
// transactions, and make and remove subtrees. Whatever was acknowledged is there afterwards,
// and what was not is there whole or not at all.
func TestKill(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	v := newVictim(t)
	rng := rand.New(rand.NewPCG(3, 4))
	const keys = 10
	var written, tried [keys]string // what was acknowledged, what may be there instead
	var txDone, txTried, subDone, subTried string
	total := 0
	for round := range rounds {
		v.start()
		b := v.dial()
		check := func(what, got, done, tried string) {
			t.Helper()
			if got != done && got != tried {
				t.Fatalf("round %d: %s is %q; %q was acknowledged, %q tried", round, what, got, done, tried)
			}
		}
		read := func(p string) string {
			t.Helper()
			s, err := b.Read(p)
			if err != nil && !errors.Is(err, tree.ENOENT) {
				t.Fatalf("round %d: %v", round, err)
			}
			return s
		}
		for k := range keys {
			got := read(fmt.Sprintf("/w/%d", k))
			check(fmt.Sprintf("/w/%d", k), got, written[k], tried[k])
			written[k], tried[k] = got, got
		}
		x, y, z := read("/t/a"), read("/t/b/c"), read("/u")
		if x != y || y != z {
			t.Fatalf("round %d: half a transaction: %q %q %q", round, x, y, z)
		}
		check("the transaction", x, txDone, txTried)
		txDone, txTried = x, x
		sub, sub1 := read("/s/x/1/2/3"), read("/s/x/4")
		if sub != sub1 {
			t.Fatalf("round %d: half a subtree: %q %q", round, sub, sub1)
		}
		check("the subtree", sub, subDone, subTried)
		subDone, subTried = sub, sub

		var acks atomic.Int64
		limit := int64(1 + rng.IntN(120))
		dead := make(chan struct{})
		var once sync.Once
		ack := func() {
			if acks.Add(1) == limit {
				once.Do(func() { close(dead) })
			}
		}
		clients := []*client.Client{v.dial(), v.dial(), v.dial()}
		for _, c := range clients { // accepted: else it would wait for the next store
			_, err := c.List("/")
			must(t, err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i++ {
				k, val := i%keys, fmt.Sprintf("%d.%d", round, i)
				tried[k] = val
				if clients[0].Write(fmt.Sprintf("/w/%d", k), val) != nil {
					return
				}
				written[k] = val
				ack()
			}
		})
		wg.Go(func() {
			for i := 0; ; i++ {
				val := fmt.Sprintf("%d.%d", round, i)
				txTried = val
				if clients[1].Transaction(func(x *client.Tx) error {
					return errors.Join(x.Write("/t/a", val), x.Write("/t/b/c", val), x.Write("/u", val))
				}) != nil {
					return
				}
				txDone = val
				ack()
			}
		})
		wg.Go(func() {
			for i := 0; ; i++ {
				val := ""
				do := func(x *client.Tx) error { return x.Remove("/s/x") }
				if subDone == "" {
					val = fmt.Sprintf("%d.%d", round, i)
					do = func(x *client.Tx) error { return errors.Join(x.Write("/s/x/1/2/3", val), x.Write("/s/x/4", val)) }
				}
				subTried = val
				if clients[2].Transaction(do) != nil {
					return
				}
				subDone = val
				ack()
			}
		})
		<-dead
		v.kill()
		wg.Wait()
		total += int(acks.Load())
		for _, c := range append(clients, b) {
			c.Close()
		}
	}
	t.Logf("%d acknowledged changes, %d kills", total, rounds)
}

// TestKillWorkers: workers are killed at random instants. What a client is told was done is
// done, what was not is answered EIO, and the connection goes on.
func TestKillWorkers(t *testing.T) {
	var mu sync.Mutex
	var alive []*os.Process
	workers := programs(t, "/proc/self/exe", func(p *os.Process) {
		mu.Lock()
		defer mu.Unlock()
		alive = append(alive, p)
	}, "STORE_TEST_ROLE=logic")
	s := start(t, state.Options{Workers: workers, Reset: 20})
	c := s.dial(builder)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	tick := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-tick:
			}
			mu.Lock()
			i := rand.IntN(len(alive))
			_ = alive[i].Kill()
			alive = append(alive[:i], alive[i+1:]...)
			mu.Unlock()
		}
	})
	last := map[string]string{}
	lost, killed := 0, 0
	for i := range 600 {
		p, val := fmt.Sprintf("/k/%d", i%7), fmt.Sprint(i)
		if i%20 == 10 {
			tick <- struct{}{}
			killed++
		}
		err := c.Write(p, val)
		switch {
		case err == nil:
			last[p] = val
		case errors.Is(err, tree.EIO):
			lost++
		default:
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	for p, want := range last {
		got, err := c.Read(p)
		for ; errors.Is(err, tree.EIO) && lost < killed; lost++ { // to one of the last that were killed
			got, err = c.Read(p)
		}
		if err != nil || got != want {
			t.Errorf("%s is %q (%v), want %q", p, got, err, want)
		}
	}
	t.Logf("%d workers killed, %d requests lost", killed, lost)
	if lost > killed {
		t.Errorf("%d requests lost to %d workers", lost, killed)
	}
}
