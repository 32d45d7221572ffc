package manager

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/journal"
)

// lasting is a process that several managers wait for.
type lasting struct {
	programs.Running
	gone chan struct{}
	err  error
}

func (l *lasting) Wait() error {
	<-l.gone
	return l.err
}

type lastingStarter struct{}

func (lastingStarter) Start(ctx context.Context, p programs.Program) (programs.Running, error) {
	r, err := programs.Direct{}.Start(ctx, p)
	if err != nil {
		return nil, err
	}
	l := &lasting{Running: r, gone: make(chan struct{})}
	go func() {
		l.err = r.Wait()
		close(l.gone)
	}()
	return l, nil
}

// A heir is what is kept of a guest's vTPM.
type heir struct {
	t      *testing.T
	dir    string
	memory *os.File
	orphan Orphan
}

// begin starts a guest's vTPM under a manager that is never closed: it is as if it was killed.
func begin(t *testing.T) (*heir, *Manager, *Device) {
	t.Helper()
	tools(t)
	h := &heir{t: t, dir: stateDir(t)}
	m, err := Open(Options{Dir: h.dir, HostID: "test-host", Starter: lastingStarter{}})
	if err != nil {
		t.Fatal(err)
	}
	if h.memory, err = journal.Create(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.memory.Close() })
	j, _, err := journal.OpenFile(h.memory)
	if err != nil {
		t.Fatal(err)
	}
	events := boot(t, "quiet")
	d, err := m.Boot(t.Context(), guestA, Boot{Events: Fixed(events), Journal: j, Keep: func(k engine.Kept) error {
		h.orphan.Control, h.orphan.Data = k.Control, k.Data
		h.orphan.Process = func(io.Writer) (programs.Running, error) { return k.Process, nil }
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	made(t, d)
	log, err := eventlog.Encode(events)
	if err != nil || !j.SetLog(log) {
		t.Fatal(err)
	}
	j.Now(journal.Ready)
	return h, m, d
}

// next is the manager after m, which does nothing any more.
func (h *heir) next(m *Manager) *Manager {
	h.t.Helper()
	if err := m.lock.Close(); err != nil {
		h.t.Fatal(err)
	}
	return newManager(h.t, h.dir)
}

func (h *heir) adopt(m *Manager) (*Device, error) {
	h.t.Helper()
	j, fresh, err := journal.OpenFile(h.memory)
	if err != nil || fresh {
		h.t.Fatal(err, fresh)
	}
	h.orphan.Journal = j
	return m.Adopt(h.t.Context(), guestA, h.orphan)
}

// cut is an engine whose user is killed after some commands.
type cut struct {
	*engine.Engine
	left int
}

var errCut = errors.New("killed")

func (c *cut) Execute(ctx context.Context, locality uint8, cmd []byte) ([]byte, error) {
	if c.left == 0 {
		return nil, errCut
	}
	c.left--
	return c.Engine.Execute(ctx, locality, cmd)
}

// TestAdoptInTheHostsTurn: a manager that is killed after any command of a sequence of its own, in
// a TPM that the guest has filled, leaves the guest's objects and sessions to the next one, which
// has what else it needs.
func TestAdoptInTheHostsTurn(t *testing.T) {
	sequence := func(tpm transport.TPM) error {
		return withEK(tpm, func(tpm2.NamedHandle, *tpm2.TPMTPublic) error {
			_, end, err := tpm2.PolicySession(tpm, tpm2.TPMAlgSHA256, 16)
			if err != nil {
				return err
			}
			return end()
		})
	}
	aside := 0
	for n, done := 0, false; !done; n++ {
		h, m, d := begin(t)
		g := guest{d}
		handles, names := fill(t, g)
		var sessions []tpm2.TPMHandle
		for range 3 {
			s, _, err := tpm2.PolicySession(g, tpm2.TPMAlgSHA256, 16)
			if err != nil {
				t.Fatal(err)
			}
			sessions = append(sessions, s.Handle())
		}
		auth, log := d.platformAuth, d.log
		if err := d.take(t.Context()); err != nil { // and never given back
			t.Fatal(err)
		}
		d.note.BeginTurn()
		host := d.host(t.Context(), &turn{})
		host.eng = &cut{d.eng, n}
		err := sequence(host)
		if done = err == nil; !done && !errors.Is(err, errCut) {
			t.Fatal(err)
		}
		aside = max(aside, len(host.turn.objects)+len(host.turn.sessions))

		e, err := h.adopt(h.next(m))
		if err != nil {
			t.Fatalf("killed after %d commands: %v", n, err)
		}
		if !bytes.Equal(e.platformAuth, auth) || !bytes.Equal(e.log, log) {
			t.Errorf("killed after %d commands: authorisation or log is another", n)
		}
		g = guest{e}
		for i, h := range handles {
			pub, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(g)
			if err != nil || !bytes.Equal(pub.Name.Buffer, names[i]) {
				t.Errorf("killed after %d commands: object %#x: %v", n, h, err)
			}
		}
		for _, s := range append(sessions, handles...) {
			if _, err := (tpm2.FlushContext{FlushHandle: s}).Execute(g); err != nil {
				t.Errorf("killed after %d commands: %#x: %v", n, s, err)
			}
		}
		for _, first := range []uint32{firstTransient, firstLoadedSession} {
			if l, err := e.host(t.Context(), &turn{}).handles(first); err != nil || len(l) != 0 {
				t.Errorf("killed after %d commands: left loaded: %v, %v", n, l, err)
			}
		}
		made(t, e)
		q, err := e.Quote(t.Context(), []byte("n"), Selection(tpm2.TPMAlgSHA256, 0))
		if err != nil || !bytes.Equal(q.EventLog, log) {
			t.Errorf("killed after %d commands: quote: %v", n, err)
		}
		stop(t, e)
	}
	if aside < 2 {
		t.Errorf("%d of the guest's things were set aside: this test shows little", aside)
	}
}

// TestAdoptRefuses: what was not ready, is another's or unknown is not adopted, and its engine ends.
func TestAdoptRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(j *journal.Journal, h *heir)
		want string
	}{
		"not ready":   {func(j *journal.Journal, _ *heir) { j.NoMore(journal.Ready) }, ErrNotReady.Error()},
		"not durable": {func(j *journal.Journal, _ *heir) { j.NoMore(journal.Durable) }, ErrNotReady.Error()},
		"another's number": {func(j *journal.Journal, _ *heir) {
			j.Begin(77, nil)
			j.Now(journal.Ready | journal.Durable)
		}, "of instance 77, the guest's is 1"},
		"no log": {func(j *journal.Journal, _ *heir) { j.SetLog([]byte("nonsense")) }, "measurements: "},
	} {
		t.Run(name, func(t *testing.T) {
			h, m, d := begin(t)
			c.do(d.note, h)
			next := h.next(m)
			if _, err := h.adopt(next); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
			<-d.Done()
			stop(t, start(t, next, guestA, "quiet")) // as any other
		})
	}
}
