package emulator

import (
	"bytes"
	"io"
	"sync"
	"time"
)

const (
	// lineDelay is how long a line without an end waits for more: too short for a person to notice,
	// long enough for a driver's next FIFO of 16 bytes.
	lineDelay = 5 * time.Millisecond
	// maxLine is how much of a line waits at most, in bytes.
	maxLine = 1 << 10
)

// A lineWriter passes a console's output on in lines. A driver writes as much as its device's FIFO
// takes, and every write to the console wakes whoever reads it: a line at once costs a fifth of that.
// What is written without a line's end, as a prompt, is passed on after lineDelay.
type lineWriter struct {
	mu    sync.Mutex
	out   io.Writer
	part  []byte // of the current line
	timer *time.Timer
	armed bool
}

func newLineWriter(out io.Writer) *lineWriter {
	w := &lineWriter{out: out}
	w.timer = time.AfterFunc(time.Hour, w.Flush)
	w.timer.Stop()
	return w
}

// Write implements io.Writer. A console that nobody can take is no reason to stop a guest: there is
// never an error.
func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.part = append(w.part, p...)
	if bytes.IndexByte(p, '\n') >= 0 || len(w.part) >= maxLine {
		w.flush()
	} else if !w.armed {
		w.armed = true
		w.timer.Reset(lineDelay)
	}
	return len(p), nil
}

// Flush passes on what waits. It ends the writer's timer: after the last Write it is to be called.
func (w *lineWriter) Flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flush()
}

func (w *lineWriter) flush() {
	if w.armed {
		w.armed = false
		w.timer.Stop()
	}
	if len(w.part) > 0 {
		_, _ = w.out.Write(w.part)
		w.part = w.part[:0]
	}
}
