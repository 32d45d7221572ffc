package qemu

import (
	"errors"
	"strings"
	"sync"
)

// Outcome is how a guest's life ended.
type Outcome string

// The outcomes.
const (
	PowerOff Outcome = "power-off" // the guest powered off
	Reboot   Outcome = "reboot"    // the guest reset itself (a triple fault, too): start a new machine
	Crash    Outcome = "crash"     // the guest or QEMU crashed, or its TPM failed
	Stopped  Outcome = "stopped"   // the host ended it
)

// outcomeOf translates a SHUTDOWN event's reason (QEMU qapi/run-state.json, ShutdownCause).
func outcomeOf(reason string) Outcome {
	switch reason {
	case "guest-shutdown":
		return PowerOff
	case "guest-reset", "subsystem-reset":
		return Reboot
	case "guest-panic", "host-error":
		return Crash
	case "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui":
		return Stopped
	}
	return Crash
}

// A tail keeps the last bytes written to it: QEMU's stderr.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const maxTail = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf); n > maxTail {
		t.buf = append(t.buf[:0], t.buf[n-maxTail:]...)
	}
	return len(p), nil
}

// err is the last lines as an error, nil when there are none.
func (t *tail) err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.TrimSpace(string(t.buf))
	if s == "" {
		return nil
	}
	return errors.New(strings.ReplaceAll(s, "\n", "; "))
}
