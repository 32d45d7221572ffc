package asked

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/pciback"
	"redoubt.dev/redoubt/services/protocol"
)

const (
	pcibackProgram    = "redoubt-pciback"
	badPCIBackProgram = "bad-pciback"
)

// badPCIBack was taken over: for a guest with one disk it dies while it assigns, with two it hangs, with three its
// answer overlaps, with four it answers well and stays, and else it asks for what it may not have.
func badPCIBack(ctx context.Context, _ *slog.Logger, control *ipc.Conn) error {
	var peer *rpc.Peer
	peer = rpc.New(control, func(ctx context.Context, r *rpc.Request) (any, error) {
		var in topology.Request
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		t, err := topology.Assign(in)
		if err != nil {
			return nil, err
		}
		switch in.Devices[2].Count {
		case 1:
			return nil, unix.Kill(os.Getpid(), unix.SIGKILL)
		case 2:
			<-ctx.Done()
			return nil, ctx.Err()
		case 3:
			t.Places[1].Slot = t.Places[0].Slot
			return t, nil
		case 4:
			return t, nil
		}
		_, err = peer.Call(ctx, protocol.MethodBuild, struct{}{}, nil)
		return nil, err
	})
	return peer.Run(ctx)
}

// bus is an Asker with a log.
type bus struct {
	Asker
	t   *testing.T
	dir string
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newBus(t *testing.T) *bus {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	b := &bus{Asker: Asker{Log: quiet}, t: t, dir: t.TempDir()}
	var err error
	b.Journal, err = audit.OpenJournal(b.dir, audit.Actor{Service: services.Builder}, quiet, audit.Alive{})
	must(t, err)
	t.Cleanup(func() {
		b.Wait()
		b.Journal.Close()
	})
	return b
}

// TestMain makes the test binary PCIBack, too: links of those names lie beside it, where package
// process looks for them.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case pcibackProgram:
		process.Main(pcibackProgram, pciback.Serve)
	case badPCIBackProgram:
		process.Main(badPCIBackProgram, badPCIBack)
	}
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	for _, name := range []string{pcibackProgram, badPCIBackProgram} {
		if err := os.Symlink(self, filepath.Join(filepath.Dir(self), name)); err != nil && !errors.Is(err, os.ErrExist) {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// bare starts a program outside any sandbox.
func (b *bus) bare(program string) func(string) (*process.Process, error) {
	return func(string) (*process.Process, error) {
		return process.Start(process.Options{Program: program, LogDir: b.dir})
	}
}

func disks(n int) topology.Request { return topology.Guest(topology.Native, n, 0, true) }

// with has a bus assigned by PCIBacks of the test.
func (b *bus) with(start func(string) (*process.Process, error), limit time.Duration, n int) *Assignment {
	b.Start, b.Limit = start, limit
	return b.Assign("g", disks(n))
}

// instances are the records of PCIBacks' starts and ends.
func (b *bus) instances() (starts, ends int) {
	b.t.Helper()
	for r, err := range audit.Records(filepath.Join(b.dir, audit.Dir)) {
		must(b.t, err)
		if r.Object == services.PCIBack && r.Act == audit.ActInstanceStart {
			starts++
		}
		if r.Object == services.PCIBack && r.Act == audit.ActInstanceEnd {
			ends++
		}
	}
	return starts, ends
}

// TestPCIBackDiesAtAnyMoment: a PCIBack is killed at a random moment of its short life, or while it
// assigns; another one is asked and the bus is the same. Each one's start and end is on the record.
func TestPCIBackDiesAtAnyMoment(t *testing.T) {
	b := newBus(t)
	want, err := topology.Assign(disks(1))
	must(t, err)
	started, left := 0, 0
	for range 20 {
		deaths := 2
		start := func(guest string) (*process.Process, error) {
			started++
			if deaths--; deaths < 0 {
				return b.bare(pcibackProgram)(guest)
			}
			if deaths == 0 {
				return b.bare(badPCIBackProgram)(guest)
			}
			p, err := b.bare(pcibackProgram)(guest)
			if err == nil {
				after := time.Duration(rand.Int64N(int64(8 * time.Millisecond)))
				timer := time.AfterFunc(after, p.Kill)
				b.wg.Go(func() { <-p.Done(); timer.Stop() })
			}
			return p, err
		}
		a := b.with(start, 10*time.Second, 1)
		got, err := a.Wait(t.Context())
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%+v, %v", got, err)
		}
		if deaths == 1 {
			left++ // the first one was faster than its death
		}
		b.Wait()
	}
	t.Logf("%d PCIBacks for 20 guests, %d of which answered before they were killed", started, left)
	if starts, ends := b.instances(); starts != started || ends != started {
		t.Errorf("the log has %d starts and %d ends of %d", starts, ends, started)
	}
}

// TestBadPCIBack: one that always dies, hangs, lies or stays costs its own guest at most, in bounded
// time, and is gone afterwards.
func TestBadPCIBack(t *testing.T) {
	b := newBus(t)
	for n, c := range map[int]struct {
		asked        int
		failed, died bool
	}{
		1: {maxPCIBacks, true, true},
		2: {maxPCIBacks, true, true},
		3: {1, true, false},
		4: {1, false, false},
		5: {1, true, false},
	} {
		limit := time.Minute
		switch n { // where it is waited for that long
		case 2:
			limit = 300 * time.Millisecond
		case 4:
			limit = 3 * time.Second
		}
		var all []*process.Process
		a := b.with(func(guest string) (*process.Process, error) {
			p, err := b.bare(badPCIBackProgram)(guest)
			all = append(all, p)
			return p, err
		}, limit, n)
		_, err := a.Wait(t.Context())
		b.Wait()
		if (err != nil) != c.failed || errors.Is(err, errDied) != c.died || len(all) != c.asked {
			t.Errorf("%d disks: %v after %d", n, err, len(all))
		}
		for _, p := range all {
			select {
			case <-p.Done():
			default:
				t.Errorf("%d disks: it still runs", n)
			}
		}
	}
	refused := false
	for r, err := range audit.Records(filepath.Join(b.dir, audit.Dir)) {
		must(t, err)
		refused = refused || r.Act == calls.ActCall && r.Object == services.PCIBack && r.Outcome == audit.Refused
	}
	if !refused {
		t.Error("a call that it may not make is not on the record")
	}
	// A guest that is given up while its bus is assigned leaves nothing.
	a := b.with(b.bare(badPCIBackProgram), time.Hour, 2)
	a.End()
	if _, err := a.Wait(t.Context()); err == nil {
		t.Error("given up, and assigned")
	}
	b.Wait()
	if starts, ends := b.instances(); starts != ends {
		t.Errorf("%d starts, %d ends", starts, ends)
	}
}
