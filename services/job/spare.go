package job

import "time"

// mostSpares of a service wait at once: each takes a process's memory.
const mostSpares = 4

// A spare waits to be asked, or is still being started. It is its guest's as any other process is: what it knows of it is its name.
type spare struct {
	ready chan struct{} // closed when it was started, or was not
	taken chan struct{} // closed when it is somebody's
	p     *running
	err   error
}

// take gives the process that waits for the guest's next question, or starts one.
func (r *Runner) take(guest string) (*running, error) {
	r.mu.Lock()
	s := r.spares[guest]
	delete(r.spares, guest)
	r.mu.Unlock()
	if s == nil {
		return r.start(guest)
	}
	close(s.taken)
	<-s.ready
	if s.err == nil {
		select {
		case <-s.p.Done(): // it died while it waited
			s.p.end(false)
		default:
			return s.p, nil
		}
	}
	return r.start(guest)
}

// renew has another process started, beside the one that is about to answer.
func (r *Runner) renew(guest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Spare == 0 || r.closed || r.spares[guest] != nil || len(r.spares) == mostSpares {
		return
	}
	s := &spare{ready: make(chan struct{}), taken: make(chan struct{})}
	if r.spares == nil {
		r.spares = map[string]*spare{}
	}
	r.spares[guest] = s
	r.work.Go(func() { r.await(guest, s) })
}

// await starts a spare and ends it where nobody takes it.
func (r *Runner) await(guest string, s *spare) {
	s.p, s.err = r.start(guest)
	close(s.ready)
	if s.err != nil { // who asks next starts one and is told the reason
		r.forget(guest, s)
		return
	}
	late := time.NewTimer(r.Spare)
	defer late.Stop()
	select {
	case <-s.taken:
		return
	case <-s.p.Done():
	case <-late.C:
	}
	if r.forget(guest, s) {
		s.p.end(true)
	}
}

// forget takes a spare out of those that wait and says whether it waited.
func (r *Runner) forget(guest string, s *spare) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.spares[guest] != s {
		return false
	}
	delete(r.spares, guest)
	return true
}

// Close ends those that wait, and waits until they are gone. No more are started.
func (r *Runner) Close() {
	r.mu.Lock()
	r.closed = true
	all := r.spares
	r.spares = nil
	r.mu.Unlock()
	for _, s := range all {
		close(s.taken)
		if <-s.ready; s.err == nil {
			s.p.end(true)
		}
	}
	r.work.Wait()
}
