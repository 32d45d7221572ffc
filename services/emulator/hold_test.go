package emulator

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"testing"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// A still machine notes that it is paused and resumed, and says which processors have their interrupts off.
type still struct {
	machine
	log    []string
	masked []int
	unsafe int // so many more times it is asked, only
	fails  error
	mute   error // why it cannot say which
}

func (s *still) Pause() error {
	s.log = append(s.log, "pause")
	return s.fails
}

func (s *still) Resume() error {
	s.log = append(s.log, "resume")
	return s.fails
}

func (s *still) Masked() ([]int, error) {
	if s.unsafe--; s.unsafe == 0 {
		s.masked = nil
	}
	return s.masked, s.mute
}

func (s *still) want(t *testing.T, want ...string) {
	t.Helper()
	if !slices.Equal(s.log, want) {
		t.Errorf("it was asked to %v, not %v", s.log, want)
	}
	s.log = nil
}

// TestHolder: the guest stands still while anybody holds it, and goes on when the last one lets go.
func TestHolder(t *testing.T) {
	m := &still{}
	h := &holder{guest: m}
	for _, who := range []protocol.Holder{protocol.HolderGate, protocol.HolderOperator, protocol.HolderOperator} {
		if err := h.hold(who); err != nil {
			t.Fatal(err)
		}
	}
	m.want(t, "pause")
	for _, who := range []protocol.Holder{protocol.HolderVerdict, protocol.HolderOperator, protocol.HolderOperator} {
		if _, err := h.letGo(who); err != nil {
			t.Fatal(err)
		}
	}
	m.want(t)
	if took, err := h.letGo(protocol.HolderGate); err != nil || took <= 0 {
		t.Fatal(took, err)
	}
	m.want(t, "resume")
	m.fails = errors.New("no")
	if err := h.hold(protocol.HolderGate); err == nil || len(h.who) != 0 {
		t.Error("a guest that is not paused is held")
	}
}

// A trap is a hold for a snapshot, with a BlkBack that says whether it has begun it.
func trap(t *testing.T, s *service, keep, begins bool) (protocol.Held, error) {
	t.Helper()
	hears, stopped, err := ipc.OneWay()
	if err != nil {
		t.Fatal(err)
	}
	reads, begun, err := ipc.OneWay()
	if err != nil {
		t.Fatal(err)
	}
	defer ipc.CloseAll([]*os.File{hears, reads})
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer begun.Close()
		if n, _ := hears.Read(make([]byte, 1)); n == 1 && begins {
			_, _ = begun.Write([]byte{1})
		}
	}()
	out, err := s.hold(t.Context(), protocol.Hold{Who: protocol.HolderValidation, Keep: keep}, map[string][]*os.File{
		protocol.FileStopped: {stopped}, protocol.FileBegun: {reads},
	})
	stopped.Close()
	<-done
	return out, err
}

// TestHold: a guest that is held for a snapshot is looked at and goes on when that is begun, or is not; and with a Builder that
// validated it ends what that one held, but not what the operator does.
func TestHold(t *testing.T) {
	m := &still{masked: []int{1}}
	s := &service{log: slog.New(slog.DiscardHandler), machine: m, holder: &holder{guest: m}, resumed: make(chan struct{})}
	validation := protocol.Hold{Who: protocol.HolderValidation}
	for _, begins := range []bool{true, false} {
		out, err := trap(t, s, false, begins)
		if err != nil || !slices.Equal(out.Masked, []int{1}) || out.Begun != begins || out.Took <= 0 {
			t.Fatalf("%+v, %v", out, err)
		}
		m.want(t, "pause", "resume")
	}
	out, err := trap(t, s, true, true)
	if err != nil || !out.Begun || out.Took != 0 {
		t.Fatalf("%+v, %v", out, err)
	}
	m.want(t, "pause")
	m.mute = errors.New("no register is told")
	if out, err := trap(t, s, true, true); err == nil { // twice is once, but for the look
		t.Fatalf("%+v", out)
	}
	m.want(t)
	if err := s.holder.hold(protocol.HolderGate); err != nil {
		t.Fatal(err)
	}
	if out, err := trap(t, s, false, true); err == nil {
		t.Fatalf("%+v", out)
	}
	m.want(t) // the gate holds it still
	if _, err := s.holder.letGo(protocol.HolderGate); err != nil {
		t.Fatal(err)
	}
	m.want(t, "resume")
	m.fails = errors.New("no")
	if _, err := trap(t, s, false, true); err == nil || len(s.holder.who) != 0 {
		t.Fatalf("a guest that was not paused is held: %v", err)
	}
	m.want(t, "pause") // BlkBack was not told that it stands still
	one := map[string][]*os.File{protocol.FileStopped: {nil}}
	if _, err := s.hold(t.Context(), validation, one); rpc.KindOf(err) != rpc.Invalid {
		t.Errorf("one pipe of two: %v", err)
	}
	m.fails, m.log = nil, nil
	if _, err := s.hold(t.Context(), validation, nil); err != nil {
		t.Fatal(err)
	}
	resumed := func() {
		t.Helper()
		// Somebody holds the guest just now, which waits for what comes behind the notice.
		s.holder.mu.Lock()
		if _, err := s.handle(t.Context(), &rpc.Request{Method: protocol.NoticeResumed}); err != nil {
			t.Fatal(err)
		}
		s.holder.mu.Unlock()
		s.work.Wait()
	}
	resumed()
	m.want(t, "pause", "resume")
	for _, who := range []protocol.Holder{protocol.HolderOperator, protocol.HolderValidation} {
		if _, err := s.hold(t.Context(), protocol.Hold{Who: who}, nil); err != nil {
			t.Fatal(err)
		}
	}
	resumed()
	m.want(t, "pause")
	if _, err := s.hold(t.Context(), protocol.Hold{Who: protocol.HolderGate}, nil); rpc.KindOf(err) != rpc.Invalid {
		t.Errorf("the gate is another's to hold for: %v", err)
	}
	if err := s.holder.hold(protocol.HolderModules); err != nil {
		t.Fatal(err)
	}
	if _, err := s.letGo(protocol.LetGo{Who: protocol.HolderOperator}); err != nil {
		t.Fatal(err)
	}
	m.want(t, "resume") // what a module did is the operator's to look at, too
}

// TestPause: the operator's pause is at a moment at which no processor has its interrupts off, if one of the next is, and at the
// last else; who is paused already is not let go on, and neither is who somebody else holds.
func TestPause(t *testing.T) {
	m := &still{masked: []int{0}, unsafe: 3}
	s := &service{log: slog.New(slog.DiscardHandler), machine: m, holder: &holder{guest: m}}
	pause := func() {
		t.Helper()
		if _, err := s.hold(t.Context(), protocol.Hold{Who: protocol.HolderOperator}, nil); err != nil {
			t.Fatal(err)
		}
		if _, held := s.holder.others(protocol.HolderOperator); !held {
			t.Fatal("it is not held")
		}
	}
	resume := func() {
		t.Helper()
		if _, err := s.letGo(protocol.LetGo{Who: protocol.HolderOperator}); err != nil {
			t.Fatal(err)
		}
		m.log = nil
	}
	pause()
	m.want(t, "pause", "resume", "pause", "resume", "pause")
	m.masked = []int{0}
	pause()
	m.want(t)
	resume()
	pause()
	if len(m.log) != 2*pauseTries-1 {
		t.Errorf("%d times held and let go, of %d", len(m.log), 2*pauseTries-1)
	}
	resume()
	if err := s.holder.hold(protocol.HolderVerdict); err != nil {
		t.Fatal(err)
	}
	pause()
	m.want(t, "pause")
	if out, err := trap(t, s, false, true); err != nil || !out.Paused {
		t.Errorf("%+v, %v: others hold it", out, err)
	}
	resume()
	if _, err := s.letGo(protocol.LetGo{Who: protocol.HolderVerdict}); err != nil {
		t.Fatal(err)
	}
	m.log, m.mute = nil, errors.New("no register is told")
	pause()
	m.want(t, "pause")
	resume()
	m.mute = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.pause(ctx, s.holder, m); err == nil {
		t.Error("nobody waits for it, and it is held")
	}
}
