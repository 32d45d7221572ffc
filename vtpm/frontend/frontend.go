// Package frontend is the vTPM front end (system A): the emulator's end of the TPM data
// channel. It sends the guest's commands, one at a time, and holds the guest still while a
// vTPM that is not ready makes the first one wait.
//
// The waiting itself needs no code: the back end reads nothing before the gate opens, so
// Execute sleeps in its receive and the vCPU in its exit. What this package adds is the bound:
// when the wait reaches Options.PauseAfter, the whole guest is paused and its clock stopped
// until the gate opens, so that no watchdog in it fires (facts: guests' watchdogs fire at
// about 20 s). An emulator that cannot sleep inside the exit (QEMU) sets PauseAfter to zero
// and is paused at once. The same bound holds for the reply to a later command, which a vTPM manager that is
// replaced may keep waiting, more than one after another too. QEMU's guest, whose driver would see its command time out, is
// paused there when the manager is lost, and when a reply takes longer than the driver is patient for: whoever would tell of
// the loss may be lost as well, or the host be busy.
package frontend

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/vtpm/channel"
)

// A Guest can be held still.
type Guest interface {
	// Pause stops every vCPU and the guest's clock. A vCPU inside Execute counts as stopped.
	Pause() error
	// Resume lets them go on, as if no time had passed.
	Resume() error
}

// Options of a front end.
type Options struct {
	Guest      Guest         // required
	PauseAfter time.Duration // wait before the guest is paused; 0: at once, and the guest is not held inside the exit
	// OnOpen is called once, when the gate opens, before the first reply and before the
	// guest is resumed, with the event log; it puts it into the guest's log area.
	OnOpen func(log []byte) error
	// OnWait is called when a command begins to wait for the gate, once.
	OnWait func()
}

// ErrClosed says that the channel ended: the back end is gone or the front end was closed.
var ErrClosed = errors.New("vTPM channel closed")

// A FailedError is the back end's final word: this guest's vTPM will not answer.
type FailedError struct{ Reason string }

func (e *FailedError) Error() string { return "vTPM failed: " + e.Reason }

// Frontend implements the emulated TPM's transport. Execute may be called by any goroutine.
type Frontend struct {
	conn *channel.Conn
	opt  Options

	exec sync.Mutex // held over one command and its reply

	mu      sync.Mutex
	waiting *channel.Frame // the command that has no reply
	seq     uint32         // of the last one
	alone   bool           // the back end is gone, and the next one has not come

	left chan struct{} // Lost → Execute; has room for one

	opened  chan struct{} // closed by receive on Open
	replies chan []byte   // receive → Execute
	done    chan struct{} // closed when receive ends; err is set before

	err error
}

// New starts the front end on conn; it owns one goroutine, ended by Close.
func New(conn *channel.Conn, opt Options) *Frontend {
	f := &Frontend{
		conn: conn, opt: opt,
		opened: make(chan struct{}), replies: make(chan []byte, 1), done: make(chan struct{}), left: make(chan struct{}, 1),
	}
	go f.receive()
	return f
}

// receive owns the channel's reading side.
func (f *Frontend) receive() {
	defer close(f.done)
	open := false
	for {
		fr, err := f.conn.Receive()
		if err != nil {
			f.err = fmt.Errorf("%w: %w", ErrClosed, err)
			return
		}
		switch {
		case fr.Kind == channel.Open && open: // of a new back end
		case fr.Kind == channel.Open:
			open = true
			if f.opt.OnOpen != nil {
				if err := f.opt.OnOpen(fr.Data); err != nil {
					f.err = fmt.Errorf("event log: %w", err)
					return
				}
			}
			close(f.opened)
		case fr.Kind == channel.Reply && open:
			if ok, err := f.replied(fr.Seq); err != nil {
				f.err = err
				return
			} else if ok {
				f.replies <- append([]byte(nil), fr.Data...) // has room: one command, one reply
			}
		case fr.Kind == channel.Again:
			if err := f.again(); err != nil {
				f.err = fmt.Errorf("%w: %w", ErrClosed, err)
				return
			}
		case fr.Kind == channel.Failed:
			f.err = &FailedError{string(fr.Data)}
			return
		default:
			f.err = fmt.Errorf("%w: unexpected %v", channel.ErrFrame, fr.Kind)
			return
		}
	}
}

// replied takes note of a reply, and reports whether it is waited for: a back end that replaced
// another may repeat what that one said last.
func (f *Frontend) replied(seq uint32) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.alone = false
	switch {
	case f.waiting != nil && f.waiting.Seq == seq:
		f.waiting = nil
		return true, nil
	case seq == f.seq || seq+1 == f.seq:
		return false, nil
	}
	return false, fmt.Errorf("%w: reply %d, the last command was %d", channel.ErrFrame, seq, f.seq)
}

// again repeats the command that has no reply.
func (f *Frontend) again() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.alone = false
	if f.waiting == nil {
		return nil
	}
	return f.conn.Send(*f.waiting)
}

// Lost tells that the back end is gone and another one will come. A guest that is not held inside
// the exit would see its command time out, so it is paused while one has no reply.
func (f *Frontend) Lost() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.alone = true
	select {
	case f.left <- struct{}{}:
	default:
	}
}

// isAlone reports whether a command that waits, waits for another back end.
func (f *Frontend) isAlone() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.alone && f.waiting != nil
}

// send sends the next command.
func (f *Frontend) send(locality uint8, command []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seq++; f.seq == 0 {
		f.seq = 1
	}
	// A copy: what is sent again is what was sent, whatever the guest does to its buffer.
	f.waiting = &channel.Frame{Kind: channel.Command, Locality: locality, Seq: f.seq, Data: bytes.Clone(command)}
	return f.conn.Send(*f.waiting)
}

// Done is closed when the front end can serve no more; Err then says why.
func (f *Frontend) Done() <-chan struct{} { return f.done }

// Err is the reason Done was closed, nil before.
func (f *Frontend) Err() error {
	select {
	case <-f.done:
		return f.err
	default:
		return nil
	}
}

// Execute sends one TPM command at a locality and waits for its response, however long the
// gate stays closed. Its error is final: the guest must be stopped.
func (f *Frontend) Execute(locality uint8, command []byte) ([]byte, error) {
	f.exec.Lock()
	defer f.exec.Unlock()
	if err := f.Err(); err != nil {
		return nil, err
	}
	if err := f.send(locality, command); err != nil {
		if errors.Is(err, unix.EPIPE) { // the peer has closed, so receive ends too, after its last word
			<-f.done
			return nil, f.err
		}
		return nil, fmt.Errorf("%w: %w", ErrClosed, err)
	}
	select {
	case <-f.opened:
	default:
		if err := f.waitOpen(); err != nil {
			return nil, err
		}
	}
	return f.reply(command)
}

// reply waits for the reply to the command that was sent.
func (f *Frontend) reply(command []byte) (r []byte, err error) {
	var late <-chan time.Time
	after, bounded := f.opt.PauseAfter, true
	if after == 0 {
		after, bounded = patience(command)
	}
	if bounded {
		t := time.NewTimer(after)
		defer t.Stop()
		late = t.C
	}
	paused, long := false, false
	for {
		if !paused && (long || f.opt.PauseAfter == 0 && f.isAlone()) {
			if err := f.opt.Guest.Pause(); err != nil {
				return nil, fmt.Errorf("pause while a TPM command waits: %w", err)
			}
			paused = true
		}
		select {
		case r = <-f.replies:
		case <-f.left:
			continue
		case <-late:
			long = true
			continue
		case <-f.done:
			select {
			case r = <-f.replies: // the reply came before the end
			default:
				return nil, f.err // the guest stays paused: it is about to be stopped
			}
		}
		if paused {
			if err := f.opt.Guest.Resume(); err != nil {
				return nil, fmt.Errorf("resume after a TPM command waited: %w", err)
			}
		}
		return r, nil
	}
}

// waitOpen waits for the gate and keeps the guest's clock from running away meanwhile.
func (f *Frontend) waitOpen() error {
	if f.opt.OnWait != nil {
		f.opt.OnWait()
	}
	if f.opt.PauseAfter > 0 {
		t := time.NewTimer(f.opt.PauseAfter)
		defer t.Stop()
		select {
		case <-f.opened:
			return nil
		case <-f.done:
			return f.err
		case <-t.C:
		}
	}
	if err := f.opt.Guest.Pause(); err != nil {
		return fmt.Errorf("pause while the vTPM is not ready: %w", err)
	}
	select {
	case <-f.opened:
	case <-f.done:
		return f.err // the guest stays paused: its vTPM failed and it is about to be stopped
	}
	if err := f.opt.Guest.Resume(); err != nil {
		return fmt.Errorf("resume after the vTPM became ready: %w", err)
	}
	return nil
}

// Close ends the front end and waits for its goroutine.
func (f *Frontend) Close() error {
	err := f.conn.Close()
	<-f.done
	return err
}
