// Package engine runs one software TPM 2.0 (swtpm over libtpms) for the whole life of a guest.
//
// An Engine is a process of its own on a state directory of its own, encrypted with a key of its
// own. It is reached over two socket pairs that only the two of them hold, a control
// channel and a data channel; there is no path to connect to and nothing to poll: the reply
// to INIT is the readiness event, the end of the process is noticed by waiting for it.
//
// Guarantees:
//   - Commands are executed one at a time, whole; a reply is checked before it is returned.
//   - An engine that breaks the protocol, exceeds a time limit or dies is finished: Done is
//     closed, Err says why with the end of the engine's own log, and no later command
//     reaches it.
//   - State on disk is never replaced: state that is missing where some is expected, or that
//     does not open (corrupt, other key, in use), is an error and the files stay as they were.
//   - The process ends with its Engine, and with this program if that is killed, unless its ends
//     were given to a keeper (Config.Keep): then [Adopt] goes on with it in another process, in
//     whatever this one was killed (package journal).
package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/journal"
)

// KeySize is the length of a state key in bytes (AES-256).
const KeySize = 32

// StateFile is the name of the file with a TPM's permanent state in its directory.
const StateFile = "tpm2-00.permall"

// Time limits. A vTPM operation takes milliseconds, save RSA key generation, which
// takes seconds and has no bound.
const (
	controlLimit = 10 * time.Second
	commandLimit = 120 * time.Second
	endLimit     = 5 * time.Second
)

// Errors that callers tell apart; the errors returned wrap them.
var (
	ErrNoState = errors.New("vTPM state is missing")               // Existing was asked for
	ErrState   = errors.New("vTPM state is present")               // a new one was asked for
	ErrInUse   = errors.New("vTPM state is in use by another one") // locked by a running engine
	ErrOpen    = errors.New("vTPM state does not open")            // corrupt, or another key's
	ErrDead    = errors.New("vTPM engine has ended")
)

// Config says what to run.
type Config struct {
	Dir      string        // state directory: exists, and is private to the caller
	Key      [KeySize]byte // encrypts the state
	Existing bool          // state must be there already; otherwise there must be none

	Starter programs.Starter // of swtpm; nil: as a child

	// Journal is told of every command before it is sent; nil: nobody adopts this engine.
	Journal *journal.Journal
	// Keep, if not nil, is given copies of the channels' ends and the process before the engine is
	// used: what Adopt takes.
	Keep func(Kept) error

	// commandLimit and controlLimit replace the constants where they are not zero.
	commandLimit, controlLimit time.Duration
}

// An Engine is a running TPM. Its methods may be called concurrently.
type Engine struct {
	dir  string
	proc *process
	data *net.UnixConn

	requests chan request  // to the worker
	stop     chan struct{} // closed to end the worker
	stopOnce sync.Once
	done     chan struct{} // closed by the worker when it ended and the process is reaped
	err      error         // set before done is closed

	commandLimit, controlLimit time.Duration

	// Owned by the worker.
	ctl  control
	note *journal.Journal
}

// A request is a task for the worker: a command of the guest's or of the host's, or what is set.
type request struct {
	command  []byte
	locality uint8
	guest    bool
	seq      uint32 // of a guest's command
	reset    bool
	shutdown bool
	reply    chan result // has room for one
}

type result struct {
	rsp []byte
	err error
}

// work owns the channels: it serves requests until the engine fails or is shut down.
func (e *Engine) work() {
	err := e.serve()
	// Whatever the way out, the process ends before the engine is called done.
	if errors.Is(err, errOrderly) {
		t := time.NewTimer(endLimit)
		select {
		case <-e.proc.done:
		case <-t.C:
		}
		t.Stop()
		err = fmt.Errorf("%w: shut down", ErrDead)
	} else {
		err = fmt.Errorf("vTPM engine on %s: %w: %w", e.dir, ErrDead, e.explain(err))
	}
	_ = e.ctl.conn.Close()
	_ = e.data.Close()
	e.proc.kill()
	e.err = err
	close(e.done)
}

// errOrderly and errKilled are serve's reasons that are not the engine's fault.
var (
	errOrderly = errors.New("shut down")
	errKilled  = errors.New("killed")
)

func (e *Engine) serve() error {
	for {
		var q request
		select {
		case q = <-e.requests:
		case <-e.stop:
			return errKilled
		case <-e.proc.done:
			return errors.New("process ended unasked")
		}
		var r result
		var fatal error
		switch {
		case q.reset:
			fatal = e.reset()
		case q.shutdown:
			if fatal = e.shutdown(); fatal == nil {
				fatal = errOrderly
			}
		default:
			r.rsp, fatal = e.take(q)
		}
		if fatal != nil && !errors.Is(fatal, errOrderly) {
			r.err = e.explain(fatal)
		}
		q.reply <- r
		if fatal != nil {
			return fatal
		}
	}
}

// take runs one command of either party. One of the guest's that was answered before is not
// executed again: it had the number, and its response is given once more.
func (e *Engine) take(q request) ([]byte, error) {
	if !q.guest {
		return e.execute(q.locality, q.command)
	}
	if s := e.note.Guest; s.State() == journal.Answered && s.Seq() == q.seq {
		return s.Response(), nil
	}
	return e.run(e.note.Guest, q.seq, q.locality, q.command)
}

// execute runs one command of the host.
func (e *Engine) execute(locality uint8, cmd []byte) ([]byte, error) {
	return e.run(e.note.Host, e.note.Host.Seq()+1, locality, cmd)
}

// run runs one command. Any error is fatal: the channel's position is unknown after it.
func (e *Engine) run(s journal.Slot, seq uint32, locality uint8, cmd []byte) ([]byte, error) {
	s.Execute(seq, locality, cmd)
	if locality != e.note.Locality() {
		e.note.SetLocality(journal.SettingLocality)
		if _, err := e.ctl.do(time.Now().Add(e.controlLimit), ctlSetLocality, []byte{locality}, 0); err != nil {
			return nil, err
		}
		e.note.SetLocality(locality)
	}
	if err := e.data.SetDeadline(time.Now().Add(e.commandLimit)); err != nil {
		return nil, err
	}
	if _, err := e.data.Write(cmd); err != nil {
		return nil, fmt.Errorf("command %#x: %w", uint32(CommandCode(cmd)), err)
	}
	rsp, err := e.receive(s)
	if err != nil {
		return nil, fmt.Errorf("command %#x: %w", uint32(CommandCode(cmd)), err)
	}
	return rsp, nil
}

// shutdownTPM tells the TPM that power goes. A TPM that was never started up refuses; nothing
// is lost then, so the response does not matter.
func (e *Engine) shutdownTPM() error {
	_, err := e.execute(0, shortCommand(ccShutdown, tpm2.TPMSUClear))
	return err
}

func (e *Engine) reset() error {
	if err := e.shutdownTPM(); err != nil {
		return err
	}
	limit := time.Now().Add(e.controlLimit)
	if _, err := e.ctl.do(limit, ctlStop, nil, 0); err != nil {
		return err
	}
	if err := e.init(limit); err != nil {
		return e.openError(err, true)
	}
	return e.startup()
}

func (e *Engine) startup() error {
	rsp, err := e.execute(0, shortCommand(ccStartup, tpm2.TPMSUClear))
	if err != nil {
		return err
	}
	return e.startedUp(rsp)
}

// startedUp judges the response to TPM2_Startup.
func (e *Engine) startedUp(rsp []byte) error {
	switch rc := ResponseCode(rsp); rc {
	case tpm2.TPMRCSuccess:
		return nil
	case tpm2.TPMRCFailure:
		return fmt.Errorf("TPM on %s is in failure mode: is the disk full? (its log: %s)", e.dir, e.Log())
	default:
		return fmt.Errorf("TPM on %s answered TPM2_Startup with %#x", e.dir, uint32(rc))
	}
}

func (e *Engine) shutdown() error {
	if err := e.shutdownTPM(); err != nil {
		return err
	}
	_, err := e.ctl.do(time.Now().Add(e.controlLimit), ctlShutdown, nil, 0)
	return err
}

// ask hands a request to the worker. A request that was handed over is carried out even if ctx
// ends meanwhile; only its answer is lost.
func (e *Engine) ask(ctx context.Context, q request) result {
	q.reply = make(chan result, 1)
	select {
	case e.requests <- q:
	case <-e.done:
		return result{err: e.err}
	case <-ctx.Done():
		return result{err: ctx.Err()}
	}
	select {
	case r := <-q.reply:
		return r
	case <-ctx.Done():
		return result{err: ctx.Err()}
	}
}

// Execute runs one command at a locality and returns the response, which may carry a TPM error
// code. A malformed command, and any at locality 4 or above, is answered as a TPM would and does
// not reach the engine. An error means that there is no response: either ctx ended, and the
// command may or may not have been executed, or the engine is finished (ErrDead, or the fault
// that finished it).
func (e *Engine) Execute(ctx context.Context, locality uint8, cmd []byte) ([]byte, error) {
	if locality > 3 {
		return ErrorResponse(tpm2.TPMRCLocality), nil
	}
	if rsp := refuse(cmd); rsp != nil {
		return rsp, nil
	}
	// The worker may still read it after ctx ended and the caller has it back.
	r := e.ask(ctx, request{locality: locality, command: append([]byte(nil), cmd...)})
	return r.rsp, r.err
}

// ExecuteGuest is Execute for a command of the guest, whose number seq its sender gave it. The
// last number again has the last response again: nothing is executed twice.
func (e *Engine) ExecuteGuest(ctx context.Context, seq uint32, locality uint8, cmd []byte) ([]byte, error) {
	if locality > 3 {
		return ErrorResponse(tpm2.TPMRCLocality), nil
	}
	if rsp := refuse(cmd); rsp != nil {
		return rsp, nil
	}
	r := e.ask(ctx, request{guest: true, seq: seq, locality: locality, command: append([]byte(nil), cmd...)})
	return r.rsp, r.err
}

// Startup sends TPM2_Startup(CLEAR).
func (e *Engine) Startup(ctx context.Context) error {
	rsp, err := e.Execute(ctx, 0, shortCommand(ccStartup, tpm2.TPMSUClear))
	if err != nil {
		return err
	}
	return e.startedUp(rsp)
}

// Reset is a power cycle of the TPM: orderly TPM2_Shutdown(CLEAR), power off and on,
// TPM2_Startup(CLEAR). PCRs and platform authorisation are as after any start.
func (e *Engine) Reset(ctx context.Context) error {
	return e.ask(ctx, request{reset: true}).err
}

// Shutdown ends the engine in order (TPM2_Shutdown, then the process). If ctx ends first the
// process is killed; what the TPM has written by then is safe all the same. It returns once the
// process is gone; its error says what was not orderly.
func (e *Engine) Shutdown(ctx context.Context) error {
	err := e.ask(ctx, request{shutdown: true}).err
	if err != nil && errors.Is(err, ErrDead) {
		<-e.done
		return err
	}
	if err != nil {
		e.Kill()
		return fmt.Errorf("vTPM engine on %s was killed: %w", e.dir, err)
	}
	<-e.done
	return nil
}

// Kill ends the engine at once and returns when the process is gone.
func (e *Engine) Kill() {
	e.stopOnce.Do(func() { close(e.stop) })
	// The worker may be inside a command: ending the process ends its read.
	e.proc.Kill()
	<-e.done
}

// Done is closed when the engine has ended and its process is gone.
func (e *Engine) Done() <-chan struct{} { return e.done }

// Err is the reason Done was closed, nil before; it wraps ErrDead.
func (e *Engine) Err() error {
	select {
	case <-e.done:
		return e.err
	default:
		return nil
	}
}

// Log is the end of what the engine has printed so far, as one line.
func (e *Engine) Log() string { return e.proc.log.String() }

// Pid is the process number of the engine, for reports.
func (e *Engine) Pid() int { return e.proc.PID() }
