package backend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/client"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/backend"
	"redoubt.dev/redoubt/vtpm/channel"
	"redoubt.dev/redoubt/vtpm/frontend"
)

const (
	guest  = server.FirstGuest
	number = 7
)

// world is a store with its clients, one back end and one front end.
type world struct {
	t                       testing.TB
	builder, manager, front *client.Client
	hub                     *backend.Hub
	back                    *backend.Backend
	fe                      *frontend.Frontend
	tpm                     *fakeTPM
	dial                    func(tree.Domain) *client.Client

	mu      sync.Mutex
	reports []string
	paused  int
}

func (w *world) Pause() error  { w.mu.Lock(); defer w.mu.Unlock(); w.paused++; return nil }
func (w *world) Resume() error { return nil }

type fakeTPM struct {
	dead chan struct{}
	err  error
	seen chan []byte
}

func (f *fakeTPM) Execute(_ context.Context, _ uint32, _ uint8, cmd []byte) ([]byte, error) {
	select {
	case <-f.dead:
		return nil, f.err
	default:
	}
	f.seen <- bytes.Clone(cmd)
	return []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0}, nil
}
func (f *fakeTPM) Done() <-chan struct{} { return f.dead }
func (f *fakeTPM) Err() error            { return f.err }

var command = []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0}

func newWorld(t testing.TB, opt backend.Options) *world {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	accept := make(chan server.Client)
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	var wg sync.WaitGroup
	wg.Go(func() { server.New(quiet, server.ReservedNames()...).Run(ctx, accept) })
	w := &world{t: t, tpm: &fakeTPM{dead: make(chan struct{}), err: errors.New("killed"), seen: make(chan []byte, 16)}}
	var clients []*client.Client
	w.dial = func(d tree.Domain) *client.Client {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		w.must(err)
		var ends [2]net.Conn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "store")
			ends[i], err = net.FileConn(f)
			w.must(err)
			f.Close()
		}
		accept <- server.Client{Conn: ends[0], Domain: d}
		clients = append(clients, client.New(ends[1]))
		return clients[len(clients)-1]
	}
	w.builder, w.manager, w.front = w.dial(server.Builder), w.dial(server.VTPM), w.dial(guest)
	w.hub = backend.NewHub(w.manager, quiet)
	wg.Go(func() { _ = w.hub.Run(ctx) })

	// What the tool writes about a new guest (step 2).
	w.must(w.builder.Mkdir(server.FrontPath(guest)))
	w.must(w.builder.SetPerms(server.FrontPath(guest), tree.Perm{Domain: guest}, tree.Perm{Domain: server.VTPM, Access: tree.Read}))
	w.must(w.builder.Mkdir(server.BackPath(guest)))
	w.must(w.builder.SetPerms(server.BackPath(guest), tree.Perm{Domain: server.VTPM}))

	a, b, err := ipc.Pipe()
	w.must(err)
	opt.Domain, opt.Channel = guest, channel.New(a)
	opt.Report = func(kind string) { w.mu.Lock(); defer w.mu.Unlock(); w.reports = append(w.reports, kind) }
	w.back, err = w.hub.Attach(ctx, opt)
	w.must(err)
	w.fe = frontend.New(channel.New(b), frontend.Options{Guest: w, PauseAfter: time.Minute})
	t.Cleanup(func() {
		w.fe.Close()
		w.back.Close()
		cancel()
		for _, c := range clients {
			c.Close()
		}
		wg.Wait()
	})
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) connected() { w.must(w.front.Write(server.FrontPath(guest)+"/state", "4")) }
func (w *world) instance() {
	w.must(w.builder.Write(server.BackPath(guest)+"/instance", fmt.Sprint(number)))
}
func (w *world) node()   { w.must(w.manager.Write(server.ReadyNode(number), "1")) }
func (w *world) engine() { w.back.EngineUp(number, w.tpm, []byte("log")) }

// execute sends a command as the guest would and returns where its outcome will be.
func (w *world) execute() <-chan error {
	out := make(chan error, 1)
	go func() {
		_, err := w.fe.Execute(0, command)
		out <- err
	}()
	return out
}

// never fails the test if the channel yields within a moment in which it would have.
func (w *world) never(c <-chan error, what string) {
	w.t.Helper()
	// Everything that could open the gate has been acknowledged by the store; one more round
	// trip of the hub's own connection brings its events to the gate.
	w.must(w.manager.Write(server.BackPath(guest)+"/probe", "x"))
	select {
	case err := <-c:
		w.t.Fatalf("%s: the guest went on (%v)", what, err)
	case cmd := <-w.tpm.seen:
		w.t.Fatalf("%s: the TPM saw %x", what, cmd)
	case <-time.After(50 * time.Millisecond):
	}
}

func await(t testing.TB, c <-chan error) error {
	t.Helper()
	select {
	case err := <-c:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("still waiting")
		return nil
	}
}

// TestEveryOrder: through the real store, in each of the 24 orders of the four facts, the
// command waits until the last and is then answered; whether what was there before is looked for or not.
func TestEveryOrder(t *testing.T) {
	for _, fresh := range []bool{false, true} {
		t.Run(fmt.Sprintf("fresh=%t", fresh), func(t *testing.T) { everyOrder(t, fresh) })
	}
}

func everyOrder(t *testing.T, fresh bool) {
	var orders func(left []int, chosen []int)
	orders = func(left, chosen []int) {
		if len(left) > 0 {
			for i := range left {
				rest := append(append([]int(nil), left[:i]...), left[i+1:]...)
				orders(rest, append(chosen, left[i]))
			}
			return
		}
		t.Run(strings.Trim(fmt.Sprint(chosen), "[]"), func(t *testing.T) {
			w := newWorld(t, backend.Options{Fresh: fresh})
			out := w.execute()
			for _, i := range chosen {
				select {
				case err := <-out:
					t.Fatalf("answered before step %d: %v", i, err)
				default:
				}
				[]func(){w.connected, w.instance, w.node, w.engine}[i]()
			}
			if err := await(t, out); err != nil {
				t.Fatal(err)
			}
			if v, err := w.builder.Read(server.BackPath(guest) + "/state"); v != "9" {
				t.Fatalf("back end's state %q %v", v, err)
			}
		})
	}
	orders([]int{0, 1, 2, 3}, nil)
}

// TestForgedNodeOpensNothing: a guest and the Builder cannot create the ready node; and a
// stale one, there before the start, opens nothing without the engine's own answer.
func TestForgedNodeOpensNothing(t *testing.T) {
	w := newWorld(t, backend.Options{})
	out := w.execute()
	w.connected()
	w.instance()
	for _, c := range []*client.Client{w.front, w.builder} {
		if err := c.Write(server.ReadyNode(number), "1"); !errors.Is(err, tree.EACCES) {
			t.Fatalf("forging the node: %v", err)
		}
	}
	w.never(out, "forged node")
	w.node()
	w.never(out, "node without the engine")
	w.back.EngineUp(number+1, w.tpm, nil)
	w.never(out, "another instance's engine")
	w.engine()
	if err := await(t, out); err != nil {
		t.Fatal(err)
	}
}

// TestFailsClosed: whatever ends the wait, the guest's command fails and is never served.
func TestFailsClosed(t *testing.T) {
	for name, c := range map[string]struct {
		opt  backend.Options
		do   func(w *world)
		want string
	}{
		"engine":   {backend.Options{}, func(w *world) { w.back.Fail("state is corrupt") }, "state is corrupt"},
		"deadline": {backend.Options{Deadline: 30 * time.Millisecond}, func(*world) {}, "still missing: [instance number front end]"},
		"number":   {backend.Options{}, func(w *world) { w.must(w.builder.Write(server.BackPath(guest)+"/instance", "x")) }, `"x"`},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, c.opt)
			out := w.execute()
			c.do(w)
			var failed *frontend.FailedError
			if err := await(t, out); !errors.As(err, &failed) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			w.connected()
			<-w.back.Done()
			if w.back.Err() == nil {
				t.Fatal("no error kept")
			}
		})
	}
}

// TestDeadTPMFailsIdleGuest: a TPM that dies fails its guest though no command is under way.
func TestDeadTPMFailsIdleGuest(t *testing.T) {
	w := newWorld(t, backend.Options{})
	out := w.execute()
	w.connected()
	w.instance()
	w.node()
	w.engine()
	if err := await(t, out); err != nil {
		t.Fatal(err)
	}
	close(w.tpm.dead)
	<-w.fe.Done()
	if err := w.fe.Err(); !strings.Contains(err.Error(), "killed") {
		t.Fatalf("front end learnt %v", err)
	}
}

// TestLocality4Refused: the guest gets TPM_RC_LOCALITY and the TPM sees nothing.
func TestLocality4Refused(t *testing.T) {
	w := newWorld(t, backend.Options{})
	w.connected()
	w.instance()
	w.node()
	w.engine()
	r, err := w.fe.Execute(4, command)
	if err != nil || !bytes.Equal(r[6:], []byte{0, 0, 9, 7}) {
		t.Fatalf("%x %v", r, err)
	}
	select {
	case cmd := <-w.tpm.seen:
		t.Fatalf("the TPM saw %x", cmd)
	default:
	}
}

// TestNoGate: without the gate an early command is answered at once, with a failure: this is
// how a guest loses its trust.
func TestNoGate(t *testing.T) {
	w := newWorld(t, backend.Options{NoGate: true})
	r, err := w.fe.Execute(0, command)
	if err != nil || !bytes.Equal(r[6:], []byte{0, 0, 1, 1}) {
		t.Fatalf("%x %v", r, err)
	}
}

// BenchmarkGateWake measures how soon after the ready node is written the waiting vCPU thread
// runs, and the processor time of this whole process while it waits: beyond what the same
// process takes to wait as long with no guest at all (its own timer and runtime), which is the
// peer in the same run.
func BenchmarkGateWake(b *testing.B) {
	var wakes, waiting, idle []time.Duration
	const wait = time.Second
	for b.Loop() {
		w := newWorld(b, backend.Options{})
		ran := make(chan time.Time, 1)
		go func() {
			if _, err := w.fe.Execute(0, command); err != nil {
				b.Error(err)
			}
			ran <- time.Now()
		}()
		w.connected()
		w.instance()
		w.engine()
		waiting = append(waiting, cpuOver(b, wait))
		t0 := time.Now()
		w.node()
		wakes = append(wakes, (<-ran).Sub(t0))
		w.fe.Close()
		w.back.Close()
		idle = append(idle, cpuOver(b, wait))
	}
	perSecond := func(d []time.Duration) float64 { return float64(median(d).Microseconds()) / 1000 / wait.Seconds() }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(median(wakes).Microseconds())/1000, "ms")
	b.ReportMetric(perSecond(waiting)-perSecond(idle), "cpu-ms/s")
	b.ReportMetric(perSecond(idle), "idle-cpu-ms/s")
}

// cpuOver is the processor time that this process takes in d, once the garbage is collected
// and the collector's threads are at rest.
func cpuOver(b *testing.B, d time.Duration) time.Duration {
	b.Helper()
	runtime.GC()
	<-time.After(d / 4)
	before := cpuTime(b)
	<-time.After(d)
	return cpuTime(b) - before
}

func cpuTime(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func median(d []time.Duration) time.Duration {
	s := append([]time.Duration(nil), d...)
	for i := range s {
		for j := i + 1; j < len(s); j++ {
			if s[j] < s[i] {
				s[i], s[j] = s[j], s[i]
			}
		}
	}
	return s[len(s)/2]
}
