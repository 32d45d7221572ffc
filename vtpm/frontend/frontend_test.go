package frontend

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/vtpm/channel"
)

// recorder notes what happens to a guest, in order.
type recorder struct {
	mu    sync.Mutex
	did   []string
	fail  error         // of Pause
	held  chan struct{} // closed by Pause
	waits chan struct{} // closed by OnWait
}

func (r *recorder) note(s string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.did = append(r.did, s)
}

func (r *recorder) all() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.did, " ")
}

func (r *recorder) Pause() error {
	r.note("pause")
	if r.held != nil {
		close(r.held)
	}
	return r.fail
}

func (r *recorder) Resume() error { r.note("resume"); return nil }

var (
	command = []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0}
	reply   = []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0}
)

func connect(t *testing.T, r *recorder, pauseAfter time.Duration) (*Frontend, *channel.Conn) {
	t.Helper()
	a, b, err := ipc.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	back := channel.New(a)
	f := New(channel.New(b), Options{
		Guest: r, PauseAfter: pauseAfter,
		OnOpen: func(log []byte) error { r.note("log:" + string(log)); return nil },
		OnWait: func() {
			r.note("wait")
			if r.waits != nil {
				close(r.waits)
			}
		},
	})
	t.Cleanup(func() { back.Close(); f.Close() })
	return f, back
}

type outcome struct {
	reply []byte
	err   error
}

func execute(f *Frontend) <-chan outcome {
	out := make(chan outcome, 1)
	go func() {
		r, err := f.Execute(0, command)
		out <- outcome{r, err}
	}()
	return out
}

func send(t *testing.T, c *channel.Conn, f channel.Frame) {
	t.Helper()
	if err := c.Send(f); err != nil {
		t.Fatal(err)
	}
}

// TestPausedWhileItWaits: the log is in place before the guest goes on, and it goes on before
// its command is answered.
func TestPausedWhileItWaits(t *testing.T) {
	r := &recorder{held: make(chan struct{})}
	f, back := connect(t, r, 0)
	out := execute(f)
	<-r.held
	send(t, back, channel.Frame{Kind: channel.Open, Data: []byte("events")})
	send(t, back, channel.Frame{Kind: channel.Reply, Seq: 1, Data: reply})
	if o := <-out; o.err != nil || !bytes.Equal(o.reply, reply) {
		t.Fatalf("%x %v", o.reply, o.err)
	}
	if got := r.all(); got != "wait pause log:events resume" {
		t.Fatalf("happened: %s", got)
	}
}

// TestShortWaitDoesNotPause: below the bound the guest is left alone, and later commands do not
// wait at all.
func TestShortWaitDoesNotPause(t *testing.T) {
	r := &recorder{waits: make(chan struct{})}
	f, back := connect(t, r, time.Hour)
	for range 2 {
		out := execute(f)
		fr, err := back.Receive()
		if err != nil || fr.Kind != channel.Command || !bytes.Equal(fr.Data, command) {
			t.Fatalf("%+v %v", fr, err)
		}
		if !strings.Contains(r.all(), "log:") {
			<-r.waits // else the gate may open before the command has begun to wait
			send(t, back, channel.Frame{Kind: channel.Open})
		}
		send(t, back, channel.Frame{Kind: channel.Reply, Seq: fr.Seq, Data: reply})
		if o := <-out; o.err != nil {
			t.Fatal(o.err)
		}
	}
	if got := r.all(); got != "wait log:" {
		t.Fatalf("happened: %s", got)
	}
}

// TestAgain: a new back end has the command that has no reply once more, and none that has one; what it
// says twice is dropped.
func TestAgain(t *testing.T) {
	f, back := connect(t, &recorder{}, time.Hour)
	send(t, back, channel.Frame{Kind: channel.Open})
	for seq := uint32(1); seq <= 3; seq++ {
		out := execute(f)
		var got channel.Frame
		for range 3 { // the first back end's, and two that were asked for
			var err error
			if got, err = back.Receive(); err != nil || got.Kind != channel.Command || got.Seq != seq || !bytes.Equal(got.Data, command) {
				t.Fatalf("%+v %v", got, err)
			}
			send(t, back, channel.Frame{Kind: channel.Open})
			send(t, back, channel.Frame{Kind: channel.Again})
		}
		if seq > 1 {
			send(t, back, channel.Frame{Kind: channel.Reply, Seq: seq - 1, Data: make([]byte, 10)})
		}
		for range 2 {
			send(t, back, channel.Frame{Kind: channel.Reply, Seq: seq, Data: reply})
		}
		if o := <-out; o.err != nil || !bytes.Equal(o.reply, reply) {
			t.Fatalf("%x %v", o.reply, o.err)
		}
		if got, err := back.Receive(); err != nil || got.Seq != seq { // the third that was asked for
			t.Fatalf("%+v %v", got, err)
		}
	}
	send(t, back, channel.Frame{Kind: channel.Again})
	send(t, back, channel.Frame{Kind: channel.Reply, Seq: 9, Data: reply})
	<-f.Done()
	if !errors.Is(f.Err(), channel.ErrFrame) {
		t.Errorf("a reply to no command: %v", f.Err())
	}
}

// TestLost: a guest that is not held inside the exit stands still while its command waits for another
// back end, and no longer than until it has its reply; one without a command does not.
func TestLost(t *testing.T) {
	r := &recorder{held: make(chan struct{})}
	f, back := connect(t, r, 0)
	send(t, back, channel.Frame{Kind: channel.Open})
	turn := func(seq uint32, before, after func()) {
		t.Helper()
		before()
		out := execute(f)
		if fr, err := back.Receive(); err != nil || fr.Seq != seq {
			t.Fatalf("%+v %v", fr, err)
		}
		after()
		send(t, back, channel.Frame{Kind: channel.Reply, Seq: seq, Data: reply})
		if o := <-out; o.err != nil {
			t.Fatal(o.err)
		}
	}
	nothing := func() {}
	turn(1, nothing, nothing) // it may have waited for the gate
	begin := r.all()
	turn(2, nothing, func() {
		r.held = make(chan struct{})
		f.Lost()
		<-r.held
	})
	turn(3, func() {
		r.held = make(chan struct{})
		f.Lost()
	}, func() { <-r.held })
	turn(4, nothing, nothing)
	if got := strings.TrimSpace(strings.TrimPrefix(r.all(), begin)); got != "pause resume pause resume" {
		t.Errorf("happened: %s", got)
	}
}

// TestPatience: a guest that is not held inside the exit is paused when a command's reply takes longer than its driver is patient
// for, whether anybody tells that the manager is lost or not; one that makes a key is not.
func TestPatience(t *testing.T) {
	r := &recorder{}
	f, back := connect(t, r, 0)
	send(t, back, channel.Frame{Kind: channel.Open})
	<-f.opened
	r.held = make(chan struct{})
	out := execute(f)
	if fr, err := back.Receive(); err != nil || fr.Seq != 1 {
		t.Fatalf("%+v %v", fr, err)
	}
	<-r.held
	send(t, back, channel.Frame{Kind: channel.Reply, Seq: 1, Data: reply})
	if o := <-out; o.err != nil {
		t.Fatal(o.err)
	}
	if got := r.all(); got != "log: pause resume" {
		t.Errorf("happened: %s", got)
	}
	code := func(c tpm2.TPMCC) []byte {
		return binary.BigEndian.AppendUint32([]byte{0x80, 2, 0, 0, 0, 10}, uint32(c))
	}
	for c, most := range map[tpm2.TPMCC]time.Duration{tpm2.TPMCCPCRExtend: mediumDuration, tpm2.TPMCCGetCapability: mediumDuration, tpm2.TPMCCSelfTest: longDuration} {
		if d, bounded := patience(code(c)); !bounded || d <= most/2 || d >= most {
			t.Errorf("%#x: %v, %t", uint32(c), d, bounded)
		}
	}
	for _, b := range [][]byte{code(tpm2.TPMCCCreatePrimary), code(tpm2.TPMCCCreate), code(tpm2.TPMCCVerifySignature), code(tpm2.TPMCCSign), nil, {0x80, 1}} {
		if _, bounded := patience(b); bounded {
			t.Errorf("%x is bounded", b)
		}
	}
}

// TestLongCommand: a guest that is held inside the exit is paused when a command's reply takes longer than the bound, however
// many managers that one is asked of meanwhile; and only then.
func TestLongCommand(t *testing.T) {
	r := &recorder{}
	f, back := connect(t, r, 10*time.Millisecond)
	send(t, back, channel.Frame{Kind: channel.Open})
	<-f.opened
	r.held = make(chan struct{})
	out := execute(f)
	for range 3 {
		if fr, err := back.Receive(); err != nil || fr.Seq != 1 {
			t.Fatalf("%+v %v", fr, err)
		}
		f.Lost()
		send(t, back, channel.Frame{Kind: channel.Again})
	}
	<-r.held
	send(t, back, channel.Frame{Kind: channel.Reply, Seq: 1, Data: reply})
	if o := <-out; o.err != nil {
		t.Fatal(o.err)
	}
	if got := r.all(); got != "log: pause resume" {
		t.Errorf("happened: %s", got)
	}
	r = &recorder{}
	f, back = connect(t, r, time.Hour)
	send(t, back, channel.Frame{Kind: channel.Open})
	<-f.opened
	out = execute(f)
	f.Lost()
	send(t, back, channel.Frame{Kind: channel.Again})
	send(t, back, channel.Frame{Kind: channel.Reply, Seq: 1, Data: reply})
	if o := <-out; o.err != nil {
		t.Fatal(o.err)
	}
	if got := r.all(); got != "log:" {
		t.Errorf("happened: %s", got)
	}
}

// TestFailures: whatever ends the wait is the command's error, and the guest is not resumed.
func TestFailures(t *testing.T) {
	pause := errors.New("cannot pause")
	for name, c := range map[string]struct {
		fail error
		do   func(*testing.T, *channel.Conn)
		want func(error) bool
	}{
		"failed": {nil, func(t *testing.T, b *channel.Conn) {
			send(t, b, channel.Frame{Kind: channel.Failed, Data: []byte("no state")})
		}, func(err error) bool { var f *FailedError; return errors.As(err, &f) && f.Reason == "no state" }},
		"gone": {nil, func(_ *testing.T, b *channel.Conn) { b.Close() }, func(err error) bool { return errors.Is(err, ErrClosed) }},
		"early reply": {nil, func(t *testing.T, b *channel.Conn) {
			send(t, b, channel.Frame{Kind: channel.Reply, Seq: 1, Data: reply})
		}, func(err error) bool { return errors.Is(err, channel.ErrFrame) }},
		"no pause": {pause, func(*testing.T, *channel.Conn) {}, func(err error) bool { return errors.Is(err, pause) }},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{held: make(chan struct{}), fail: c.fail}
			f, back := connect(t, r, 0)
			out := execute(f)
			<-r.held
			c.do(t, back)
			if o := <-out; !c.want(o.err) {
				t.Fatalf("error %v", o.err)
			}
			if got := r.all(); got != "wait pause" {
				t.Fatalf("happened: %s", got)
			}
		})
	}
}

// TestLastWordBeforeTheCommand: a back end that failed and closed before the guest's first
// command is still believed about the reason.
func TestLastWordBeforeTheCommand(t *testing.T) {
	for range 100 { // the send and the receive race
		f, back := connect(t, &recorder{}, time.Hour)
		send(t, back, channel.Frame{Kind: channel.Failed, Data: []byte("no state")})
		back.Close()
		var failed *FailedError
		if o := <-execute(f); !errors.As(o.err, &failed) || failed.Reason != "no state" {
			t.Fatalf("error %v", o.err)
		}
	}
}
