package isolate

import (
	"sync"
	"sync/atomic"
	"time"
)

// A slicer ends runs of a view that last longer than they may. To set a timer at each of them and stop it after would cost more than many a run
// does: the runtime has another thread wait anew. So the timer stays set when a run is over, and looks when it fires whether there is one
// that is due, and when the next one will be.
//
// One goroutine at a time calls begin and end.
type slicer struct {
	kick func() // called when a run is due; it may be over by then

	due atomic.Int64 // when the run is to end, since epoch; 0: there is none, or it was kicked
	at  atomic.Int64 // when the timer fires, at the latest; 0: it is not set

	mu    sync.Mutex // over at's writes, and the timer
	timer *time.Timer
}

// epoch is where a slicer's times count from: one more nanosecond, so that none is 0.
var epoch = time.Now().Add(-1)

func since() int64 { return int64(time.Since(epoch)) }

// begin says that a run begins now, since epoch, which may last for d.
func (s *slicer) begin(now int64, d time.Duration) {
	due := now + int64(d)
	s.due.Store(due)
	if at := s.at.Load(); at != 0 && at <= due { // fire sees due, or at is 0 here
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := s.at.Load(); at == 0 || at > due {
		s.set(due, d)
	}
}

// end says that the run is over.
func (s *slicer) end() { s.due.Store(0) }

// set has the timer fire; mu is held.
func (s *slicer) set(at int64, d time.Duration) {
	s.at.Store(at)
	if s.timer == nil {
		s.timer = time.AfterFunc(d, s.fire)
		return
	}
	s.timer.Reset(d)
}

// fire ends the run that is due.
func (s *slicer) fire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		due := s.due.Load()
		if due == 0 {
			s.at.Store(0)
			if s.due.Load() == 0 {
				return
			}
			continue
		}
		if left := due - since(); left > 0 {
			s.set(due, time.Duration(left))
			return
		}
		if s.due.CompareAndSwap(due, 0) {
			s.kick()
		}
	}
}
