package asked

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/introspect/inspect"
	"redoubt.dev/redoubt/introspect/introspecttest"
	"redoubt.dev/redoubt/introspect/types"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/sandbox"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/calls"
	"redoubt.dev/redoubt/services/inspector"
	"redoubt.dev/redoubt/services/job"
	"redoubt.dev/redoubt/services/protocol"
)

const (
	program    = "redoubt-inspector"
	badProgram = "bad-inspector"
)

// uid is of nobody on the machine.
const uid = 0x52450030

// attacks are what an inspector that was taken over tries with the guest's memory.
var attacks = map[string]func(*os.File) error{
	"write": func(f *os.File) error { _, err := f.WriteAt([]byte("changed"), 0); return err },
	"map": func(f *os.File) error {
		b, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err == nil {
			copy(b, "changed")
		}
		return err
	},
	"map, then more rights": func(f *os.File) error {
		b, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		if err == nil {
			err = unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE)
		}
		if err == nil {
			copy(b, "changed")
		}
		return err
	},
	"hole": func(f *os.File) error {
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
	},
	reopen: func(f *os.File) error {
		w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer w.Close()
		_, err = w.WriteAt([]byte("changed"), 0)
		return err
	},
}

// reopen is what only the sandbox stops.
const reopen = "open anew"

// bad was taken over: it does what it is asked in place of a question.
func bad(ctx context.Context, _ *slog.Logger, control *ipc.Conn) error {
	var peer *rpc.Peer
	var disks []*os.File
	peer = rpc.New(control, func(ctx context.Context, r *rpc.Request) (any, error) {
		switch r.Method {
		case protocol.MethodViewDisk:
			disks = append(disks, r.Files...)
			return struct{}{}, nil
		case protocol.MethodScan:
			defer peer.Drain()
			return badScan(ctx, r, disks)
		}
		var in protocol.Read
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		switch what := in.Question.What[0]; what {
		case "die":
			return nil, unix.Kill(os.Getpid(), unix.SIGKILL)
		case "hang":
			<-ctx.Done()
			return nil, ctx.Err()
		case "stay":
			return protocol.ReadOut{Answered: protocol.Answered{Size: 1}}, nil
		case "lie":
			return protocol.ReadOut{Answered: protocol.Answered{Size: protocol.MaxAnswer + 1}}, nil
		case "much":
			defer peer.Drain()
			return protocol.ReadOut{Layout: json.RawMessage(`"` + strings.Repeat("x", 2*maxLayout) + `"`)}, nil
		case "call":
			_, err := peer.Call(ctx, protocol.MethodBuild, struct{}{}, nil)
			return nil, err
		default:
			defer peer.Drain()
			if err := attacks[what](r.Files[0]); err != nil {
				return nil, fmt.Errorf("denied: %w", err)
			}
			return protocol.ReadOut{}, nil
		}
	})
	return peer.Run(ctx)
}

// TestMain makes the test binary the inspector and its launcher, too: links of those names lie beside it, where package
// process looks for them.
func TestMain(m *testing.M) {
	sandbox.LauncherMain()
	switch filepath.Base(os.Args[0]) {
	case program:
		process.Main(program, inspector.Serve)
	case badProgram:
		process.Main(badProgram, bad)
	}
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	for _, name := range []string{program, badProgram} {
		if err := os.Symlink(self, filepath.Join(filepath.Dir(self), name)); err != nil && !errors.Is(err, os.ErrExist) {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// asker is an Asker with a log, and what it started.
type asker struct {
	*Asker
	t       *testing.T
	dir     string
	started []*process.Process
	starts  chan *process.Process // the same, for who waits; has room
}

// newAsker has inspectors of a program started, in the sandbox of the table or in none.
func newAsker(t *testing.T, program string, confined bool) *asker {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	a := &asker{t: t, dir: t.TempDir(), starts: make(chan *process.Process, 64)}
	j, err := audit.OpenJournal(a.dir, audit.Actor{Service: services.Builder}, quiet, audit.Alive{})
	must(t, err)
	t.Cleanup(func() { j.Close() })
	a.Asker = New(j, func(string) (*process.Process, error) {
		o := process.Options{Program: program, LogDir: a.dir}
		if confined {
			s, err := services.Find(services.Inspector)
			if err != nil {
				return nil, err
			}
			if o.Sandbox, err = s.Sandbox(services.Instance{Label: program, UID: uid}); err != nil {
				return nil, err
			}
		}
		p, err := process.Start(o)
		if err == nil {
			if a.Spare == 0 { // else they are started beside the test
				a.started = append(a.started, p)
			}
			a.starts <- p
		}
		return p, err
	})
	a.Spare = 0 // but for the test of it
	return a
}

// machine is a guest's memory, filled, and a kernel that is none.
func machine(t *testing.T, content io.ReaderAt, size int64) Machine {
	t.Helper()
	m, err := memfd.New("guest memory", size)
	must(t, err)
	_, err = io.Copy(m, io.NewSectionReader(content, 0, size))
	must(t, err)
	path := filepath.Join(t.TempDir(), "kernel")
	must(t, os.WriteFile(path, []byte("no kernel"), 0o600))
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	k, err := memfd.Sealed("kernel", f)
	must(t, err)
	t.Cleanup(func() {
		m.Close()
		k.Close()
	})
	return Machine{Layout: "flat", Size: uint64(size), Memory: m, Kernel: k}
}

func (a *asker) ask(g *Guest, m Machine, what string) (protocol.Answered, []byte, error) {
	a.t.Helper()
	o, err := m.Open()
	must(a.t, err)
	return a.asked(g, o, what)
}

func (a *asker) asked(g *Guest, o Opened, what string) (out protocol.Answered, b []byte, err error) {
	a.t.Helper()
	v, err := a.Ask(a.t.Context(), "g", g, o, protocol.Question{What: []string{what}})
	for _, p := range a.started {
		select {
		case <-p.Done():
		default:
			a.t.Errorf("%s: it still runs", what)
		}
	}
	if err != nil {
		return out, nil, err
	}
	w, ok := v.(rpc.WithFiles)
	if !ok || len(w.Files) != 1 {
		a.t.Fatalf("%s: %+v", what, v)
	}
	defer ipc.CloseAll(w.Files)
	out, _ = w.Value.(protocol.Answered)
	b = make([]byte, out.Size)
	_, err = w.Files[0].ReadAt(b, 0)
	if _, werr := w.Files[0].WriteAt([]byte("x"), 0); werr == nil {
		a.t.Errorf("%s: the answer can be written", what)
	}
	return out, b, err
}

// TestAnswers: in its sandbox an inspector answers from a guest's memory, with a layout that is known; without one it needs
// the kernel's image.
func TestAnswers(t *testing.T) {
	s := introspecttest.NewSynthetic(t, 4, map[string]uint64{"modules": 0}, map[string]types.Field{
		"module.list.next": {Size: 8}, "module.name": {Offset: 16, Size: 16}, "module.state": {Offset: 32, Size: 4},
		"module.core_layout.base": {Offset: 40, Size: 8}, "module.core_layout.text_size": {Offset: 48, Size: 4},
		"module.init_layout.base": {Offset: 56, Size: 8}, "module.init_layout.text_size": {Offset: 64, Size: 4},
	})
	list := make([]byte, 256)
	for at, v := range map[int]uint64{0: introspecttest.Data + 128, 128: introspecttest.Data} {
		for i := range 8 {
			list[at+i] = byte(v >> (8 * i))
		}
	}
	copy(list[128+16:], "evil")
	s.Kernel(list)
	m := machine(t, s, 4<<20)
	a := newAsker(t, program, true)
	if _, _, err := a.ask(&Guest{}, m, inspect.Modules); rpc.KindOf(err) != rpc.Invalid || !strings.Contains(err.Error(), "not a bzImage") {
		t.Errorf("no kernel: %v", err)
	}
	l, err := json.Marshal(s.Layout)
	must(t, err)
	g := &Guest{}
	g.learn(l)
	_, b, err := a.ask(g, m, inspect.Modules)
	must(t, err)
	var answer inspect.Answer
	must(t, json.Unmarshal(b, &answer))
	if answer.Modules == nil || len(answer.Modules.Modules) != 1 || answer.Modules.Modules[0].Name != "evil" || answer.Modules.Damage != "" {
		t.Errorf("%s", b)
	}
	if _, _, err := a.ask(g, m, "everything"); rpc.KindOf(err) != rpc.Invalid {
		t.Errorf("another question: %v", err)
	}
	if _, _, err := a.ask(g, machine(t, bytes.NewReader(make([]byte, 4<<20)), 4<<20), inspect.Modules); rpc.KindOf(err) != rpc.Unavailable {
		t.Errorf("empty memory: %v", err)
	}
	for _, m := range []Machine{{Memory: m.Memory}, {Kernel: m.Kernel}} {
		if _, err := m.Open(); rpc.KindOf(err) != rpc.Unavailable {
			t.Errorf("%+v: %v", m, err)
		}
	}
}

// TestGuestMemoryIsReadOnly: an inspector that was taken over cannot change the guest's memory: not by the descriptor that
// it was given, and not by another one, which its sandbox keeps it from opening. With what they are given in place of
// that, all attacks succeed.
func TestGuestMemoryIsReadOnly(t *testing.T) {
	const was = "unchanged"
	for name, c := range map[string]struct{ confined, readOnly bool }{
		"as it is":               {true, true},
		"without the sandbox":    {false, true},
		"without any of the two": {false, false},
	} {
		a := newAsker(t, badProgram, c.confined)
		for attack := range attacks {
			content := make([]byte, 1<<16)
			copy(content, was)
			m := machine(t, bytes.NewReader(content), int64(len(content)))
			o, err := m.Open()
			must(t, err)
			if !c.readOnly {
				w, err := ipc.Duplicate(m.Memory)
				must(t, err)
				o.files[0].Close()
				o.files[0] = w[0]
			}
			_, _, err = a.asked(&Guest{}, o, attack)
			got := make([]byte, len(was))
			if _, rerr := m.Memory.ReadAt(got, 0); rerr != nil {
				t.Fatal(rerr)
			}
			changed := string(got) != was
			if want := !c.readOnly || attack == reopen && !c.confined; changed != want || (err == nil) != want {
				t.Errorf("%s: %s: the memory was changed: %v (%v)", name, attack, changed, err)
			}
		}
	}
}

// TestBadInspector: one that dies, hangs, stays or lies costs its own answer, is gone afterwards, and is in the log.
func TestBadInspector(t *testing.T) {
	a := newAsker(t, badProgram, false)
	m := machine(t, bytes.NewReader(make([]byte, 4096)), 4096)
	for what, c := range map[string]struct{ failed, died bool }{
		"die": {true, true}, "hang": {true, true}, "stay": {false, false}, "lie": {true, false}, "much": {false, false}, "call": {true, false},
	} {
		g := &Guest{}
		switch what { // where it is waited for that long
		case "hang":
			a.Limit = 300 * time.Millisecond
		case "stay":
			a.Limit = 3 * time.Second
		default:
			a.Limit = time.Minute
		}
		_, _, err := a.ask(g, m, what)
		if (err != nil) != c.failed || errors.Is(err, job.ErrDied) != c.died || g.known() != nil {
			t.Errorf("%s: %v, known %.20s", what, err, g.known())
		}
	}
	starts, ends, refused := 0, 0, false
	for r, err := range audit.Records(filepath.Join(a.dir, audit.Dir)) {
		must(t, err)
		if r.Object == services.Inspector && r.Act == audit.ActInstanceStart {
			starts++
			if r.Detail["memory"] != "read-only" || r.Detail["guest"] != "g" {
				t.Errorf("%+v", r)
			}
		}
		if r.Object == services.Inspector && r.Act == audit.ActInstanceEnd {
			ends++
		}
		refused = refused || r.Act == calls.ActCall && r.Object == services.Inspector && r.Outcome == audit.Refused
	}
	if starts != 6 || ends != starts || !refused {
		t.Errorf("%d starts, %d ends; a refusal is on the record: %v", starts, ends, refused)
	}
}

// TestSlots: who comes when as many inspectors run as may waits, as long as he likes.
func TestSlots(t *testing.T) {
	a := newAsker(t, program, false)
	for range most {
		a.slots <- struct{}{}
	}
	m := machine(t, bytes.NewReader(make([]byte, 4096)), 4096)
	o, err := m.Open()
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Ask(ctx, "g", &Guest{}, o, protocol.Question{What: []string{inspect.Tasks}}); !errors.Is(err, context.Canceled) || len(a.started) != 0 {
		t.Errorf("%v, %d were started", err, len(a.started))
	}
}
