package asked

import (
	"bytes"
	"testing"
	"time"

	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services/protocol"
)

// TestSpare: once a guest was asked about, an inspector waits for the next question; it answers one, and one that died, was asked
// nothing for too long, or is of another guest, answers none.
func TestSpare(t *testing.T) {
	a := newAsker(t, badProgram, false)
	a.Spare = time.Hour
	var g Guest
	m := machine(t, bytes.NewReader(make([]byte, 4096)), 4096)
	answers := func() {
		t.Helper()
		if _, _, err := a.ask(&g, m, "much"); err != nil {
			t.Fatal(err)
		}
	}
	next := func() *process.Process { return <-a.starts }
	gone := func(p *process.Process) bool {
		select {
		case <-p.Done():
			return true
		default:
			return false
		}
	}

	answers()
	first, second := next(), next()
	<-first.Done()
	if gone(second) {
		t.Error("none waits")
	}
	answers()
	third := next()
	<-second.Done() // it was asked
	if gone(third) {
		t.Error("none waits now")
	}
	third.Kill()
	<-third.Done()
	answers()
	if _, _, err := a.ask(&g, m, "die"); err == nil {
		t.Error("one that died answered")
	}
	answers()

	for range 4 { // of the last three questions, the second of which was put to the first one's spare: the last one waits
		third = next()
	}
	o, err := m.Open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Ask(t.Context(), "another", &Guest{}, o, protocol.Question{What: []string{"much"}}); err != nil || gone(third) {
		t.Errorf("another guest has no inspector of its own: %v", err)
	}
	a.Close()
	for len(a.starts) > 0 {
		if p := next(); !gone(p) {
			t.Error("it is left")
		}
	}
	answers()
	<-next().Done()
	if len(a.starts) > 0 {
		t.Error("a spare after the end")
	}

	a = newAsker(t, badProgram, false)
	a.Spare = time.Millisecond
	answers()
	next()
	<-next().Done()
	a.Close()
}
