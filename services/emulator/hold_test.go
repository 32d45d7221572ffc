package emulator

import (
	"errors"
	"log/slog"
	"slices"
	"testing"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// A still machine notes that it is paused and resumed, and says which processors have their interrupts off.
type still struct {
	machine
	log    []string
	masked []int
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

func (s *still) Masked() ([]int, error) { return s.masked, s.mute }

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

// TestHoldSafe: where a processor has its interrupts off the guest goes on at once, unless it is to be held all the same; and with
// a Builder that validated it ends what that one held, but not what the operator does.
func TestHoldSafe(t *testing.T) {
	m := &still{masked: []int{1}}
	s := &service{log: slog.New(slog.DiscardHandler), machine: m, holder: &holder{guest: m}, resumed: make(chan struct{})}
	in := protocol.Hold{Who: protocol.HolderValidation, Safe: true}
	out, err := s.hold(in)
	if err != nil || !out.LetGo || !slices.Equal(out.Masked, []int{1}) {
		t.Fatalf("%+v, %v", out, err)
	}
	m.want(t, "pause", "resume")
	in.Force = true
	if out, err = s.hold(in); err != nil || out.LetGo || len(out.Masked) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	if _, err := s.letGo(protocol.LetGo{Who: in.Who}); err != nil {
		t.Fatal(err)
	}
	m.want(t, "pause", "resume")

	m.mute = errors.New("no register is told")
	if out, err = s.hold(in); err == nil || !out.LetGo {
		t.Fatalf("%+v, %v", out, err)
	}
	m.want(t, "pause", "resume")
	if err := s.holder.hold(protocol.HolderGate); err != nil {
		t.Fatal(err)
	}
	if out, err = s.hold(in); err == nil || !out.LetGo {
		t.Fatalf("%+v, %v", out, err)
	}
	m.want(t, "pause") // and the gate holds it still
	if _, err := s.holder.letGo(protocol.HolderGate); err != nil {
		t.Fatal(err)
	}
	m.want(t, "resume")
	m.fails = errors.New("no")
	if _, err = s.hold(in); err == nil || len(s.holder.who) != 0 {
		t.Fatalf("a guest that was not paused is held: %v", err)
	}
	m.fails, m.mute, m.log = nil, nil, nil
	if _, err = s.hold(in); err != nil {
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
		if _, err := s.hold(protocol.Hold{Who: who}); err != nil {
			t.Fatal(err)
		}
	}
	resumed()
	m.want(t, "pause")
	if _, err := s.hold(protocol.Hold{Who: protocol.HolderGate}); rpc.KindOf(err) != rpc.Invalid {
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
