package backend

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/channel"
	"redoubt.dev/redoubt/vtpm/gate"
)

// A TPM is a guest's vTPM, as the manager gives it.
type TPM interface {
	// Execute runs one command of the guest. The last number again has the last response again.
	// Its error means that the TPM is dead.
	Execute(ctx context.Context, seq uint32, locality uint8, command []byte) ([]byte, error)
	// Done is closed when the TPM is dead; Err then says why.
	Done() <-chan struct{}
	Err() error
}

// What a back end reports of a guest's start.
const (
	ReportReady = "vtpm-ready" // the gate opened
	ReportIMA   = "ima"        // the guest extended PCR 10 for the first time: its boot_aggregate
)

// Options of one guest's back end.
type Options struct {
	Domain   tree.Domain
	Channel  *channel.Conn // the back end closes it
	Deadline time.Duration // longest wait from attaching to ready, 0: none
	// NoGate serves the guest at once and answers TPM_RC_FAILURE while there is no vTPM, as
	// a TPM that is not initialised does. For comparison only.
	NoGate bool
	// Poll, when positive, makes the wake come only at multiples of it after the front end
	// connected, as a guest that polls would see it. For comparison only.
	Poll time.Duration
	// Report tells of the moments above; it must not block.
	Report func(kind string)
	// Fresh says that neither the front end's state nor the instance number is written before Attach
	// returns, so that the hub's watch tells of both and nothing has to be looked for.
	Fresh bool
	// Again says that another back end had the guest before: it may have taken a command with it.
	Again bool
	NoIMA bool // ReportIMA was told
	// Opened is called when the gate has opened, before the guest is told; nil: nobody asks.
	Opened func()
}

// Backend serves one guest until it fails or is closed.
type Backend struct {
	hub *Hub
	opt Options

	inbox chan gate.Event
	up    chan engine
	ctx   context.Context
	stop  context.CancelFunc
	done  chan struct{}
	err   error // set before done is closed

	open    bool           // it was before: the guest had another back end
	decided chan struct{}  // closed when the gate has opened or failed
	looks   sync.WaitGroup // the hub's first look at the store
}

type engine struct {
	number int
	tpm    TPM
	log    []byte
}

// Attach begins to serve a guest.
func (h *Hub) Attach(ctx context.Context, opt Options) (*Backend, error) {
	b := h.backend(ctx, opt)
	if err := h.attach(b); err != nil {
		b.stop()
		opt.Channel.Close()
		return nil, err
	}
	go b.run(b.guard)
	return b, nil
}

// Resume goes on serving a guest whose gate another back end opened before it was killed; log is
// what that one told or was about to.
func (h *Hub) Resume(ctx context.Context, opt Options, tpm TPM, log []byte) (*Backend, error) {
	opt.Again = true
	b := h.backend(ctx, opt)
	b.open = true
	close(b.decided)
	if err := h.attach(b); err != nil {
		b.stop()
		opt.Channel.Close()
		return nil, err
	}
	go b.run(func() error { return b.serve(tpm, log) })
	return b, nil
}

func (h *Hub) backend(ctx context.Context, opt Options) *Backend {
	ctx, stop := context.WithCancel(ctx)
	return &Backend{
		hub: h, opt: opt, ctx: ctx, stop: stop,
		inbox: make(chan gate.Event), up: make(chan engine), done: make(chan struct{}), decided: make(chan struct{}),
	}
}

// EngineUp tells that the manager holds the engine's own INIT reply for the instance number,
// everything that comes before the guest's first command is measured, and log is its event
// log. It is the one fact that no write to the store can stand for.
func (b *Backend) EngineUp(number int, tpm TPM, log []byte) {
	select {
	case b.up <- engine{number, tpm, log}:
	case <-b.decided:
	}
}

// Fail tells that the guest's vTPM cannot be had.
func (b *Backend) Fail(reason string) { b.post(gate.Event{Kind: gate.Failed, Reason: reason}) }

// Close ends the back end and waits for it.
func (b *Backend) Close() {
	b.stop()
	<-b.done
}

// Done is closed when the back end has ended; Err then says why, nil after Close.
func (b *Backend) Done() <-chan struct{} { return b.done }

// Err is valid once Done is closed.
func (b *Backend) Err() error { return b.err }

// post tells the gate; what comes after its decision changes nothing and is dropped.
func (b *Backend) post(e gate.Event) {
	select {
	case b.inbox <- e:
	case <-b.decided:
	}
}

// run owns the guest's gate and, later, its channel.
func (b *Backend) run(serve func() error) {
	defer close(b.done)
	defer b.looks.Wait()
	defer b.hub.detach(b)
	defer b.opt.Channel.Close()
	defer b.stop()
	err := serve()
	if b.ctx.Err() != nil {
		return
	}
	if err != nil {
		// The guest must not go on without its vTPM: its emulator fails it closed.
		_ = b.opt.Channel.Send(channel.Frame{Kind: channel.Failed, Data: cut(err.Error())})
	}
	b.err = err
}

// guard waits for the gate and then serves; without a gate it serves beside the waiting.
func (b *Backend) guard() error {
	var u ungated
	var early chan error
	if b.opt.NoGate {
		early = make(chan error, 1)
		go func() { early <- b.serve(&u, nil) }()
	}
	tpm, log, err := b.wait(&u)
	close(b.decided)
	if early != nil {
		if err != nil {
			b.opt.Channel.Close()
		}
		return errors.Join(err, <-early)
	}
	if err != nil {
		return err
	}
	return b.serve(tpm, log)
}

func cut(s string) []byte { return []byte(s[:min(len(s), channel.MaxCommand)]) }

// wait runs the gate until it opens.
func (b *Backend) wait(u *ungated) (TPM, []byte, error) {
	var g gate.Gate
	engines := map[int]engine{}
	number := 0
	var deadline <-chan time.Time
	if b.opt.Deadline > 0 {
		t := time.NewTimer(b.opt.Deadline)
		defer t.Stop()
		deadline = t.C
	}
	var connected time.Time
	for {
		var e gate.Event
		select {
		case <-b.ctx.Done():
			return nil, nil, b.ctx.Err()
		case e = <-b.inbox:
		case up := <-b.up:
			engines[up.number] = up
			e = gate.Event{Kind: gate.EngineUp, Number: up.number}
			u.set(up.tpm)
		case <-deadline:
			e = gate.Event{Kind: gate.Deadline}
		}
		if e.Kind == gate.Instance {
			number = e.Number
		}
		actions := g.Step(e)
		for i, a := range actions {
			switch a.Kind {
			case gate.WatchReady:
				if err := b.hub.watchReady(b, a.Number); err != nil {
					return nil, nil, err
				}
			case gate.SetState:
				if a.State == gate.Connected {
					connected = time.Now()
				}
				if i+1 < len(actions) && actions[i+1].Kind == gate.SetState {
					continue // nobody needs to see what is over at once
				}
				if err := b.hub.store.Write(server.BackPath(b.opt.Domain)+"/state", strconv.Itoa(int(a.State))); err != nil && a.State != gate.Closing {
					return nil, nil, fmt.Errorf("vTPM back end: %w", err)
				}
			case gate.Fail:
				return nil, nil, errors.New(a.Reason)
			case gate.Wake:
				if b.opt.Poll > 0 {
					waitPoll(b.ctx, connected, b.opt.Poll)
				}
				b.opt.Report(ReportReady)
				return engines[number].tpm, engines[number].log, nil
			}
		}
	}
}

func waitPoll(ctx context.Context, since time.Time, every time.Duration) {
	t := time.NewTimer(every - time.Since(since)%every)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// serve carries commands until the guest's emulator is gone (no error: the Builder knows), its
// TPM is dead, or either breaks the protocol.
func (b *Backend) serve(tpm TPM, log []byte) error {
	stop := context.AfterFunc(b.ctx, func() { b.opt.Channel.Close() })
	defer stop()
	served := make(chan struct{})
	var watcher sync.WaitGroup
	defer watcher.Wait()
	defer close(served)
	watcher.Go(func() { // a TPM that dies fails an idle guest too
		select {
		case <-tpm.Done():
			_ = b.opt.Channel.Send(channel.Frame{Kind: channel.Failed, Data: cut(fmt.Sprintf("vTPM: %v", tpm.Err()))})
			b.opt.Channel.Close()
		case <-served:
		}
	})
	if !b.open && b.opt.Opened != nil {
		b.opt.Opened()
	}
	if err := b.opt.Channel.Send(channel.Frame{Kind: channel.Open, Data: log}); err != nil {
		return nil
	}
	if b.opt.Again {
		if err := b.opt.Channel.Send(channel.Frame{Kind: channel.Again}); err != nil {
			return nil
		}
	}
	ima, started := b.opt.NoIMA, false
	for {
		f, err := b.opt.Channel.Receive()
		if err != nil {
			select {
			case <-tpm.Done():
				return fmt.Errorf("vTPM: %w", tpm.Err())
			default:
			}
			if errors.Is(err, channel.ErrFrame) || errors.Is(err, ipc.ErrTooLarge) {
				return fmt.Errorf("emulator: %w", err)
			}
			return nil
		}
		if f.Kind != channel.Command {
			return fmt.Errorf("emulator: %w: %v from a front end", channel.ErrFrame, f.Kind)
		}
		reply, err := b.execute(tpm, f)
		if err != nil {
			return err
		}
		if !started && isStartup(f.Data) {
			// The host has started the TPM to measure into it. To the guest this is its own
			// power-on, and some firmware takes the truth (TPM_RC_INITIALIZE) for a fault.
			started = true
			if bytes.Equal(reply, response(tpm2.TPMRCInitialize)) {
				reply = response(tpm2.TPMRCSuccess)
			}
		}
		if !ima && extends(f.Data, 10) {
			ima = true
			b.opt.Report(ReportIMA)
		}
		if err := b.opt.Channel.Send(channel.Frame{Kind: channel.Reply, Seq: f.Seq, Data: reply}); err != nil {
			return nil
		}
	}
}

func (b *Backend) execute(tpm TPM, f channel.Frame) ([]byte, error) {
	if f.Locality >= 4 {
		return response(tpm2.TPMRCLocality), nil
	}
	reply, err := tpm.Execute(b.ctx, f.Seq, f.Locality, f.Data)
	if err != nil {
		return nil, fmt.Errorf("vTPM: %w", err)
	}
	if len(reply) > channel.MaxCommand {
		return nil, fmt.Errorf("vTPM: response of %d bytes", len(reply))
	}
	return reply, nil
}

// extends reports whether cmd is TPM2_PCR_Extend of the PCR (TPM 2.0 Part 3 §22.2).
func extends(cmd []byte, pcr uint32) bool {
	return len(cmd) >= 14 && tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) == tpm2.TPMCCPCRExtend &&
		binary.BigEndian.Uint32(cmd[10:]) == pcr
}

// isStartup reports whether cmd is TPM2_Startup(TPM_SU_CLEAR) (Part 3 §9.3).
func isStartup(cmd []byte) bool {
	return len(cmd) == 12 && tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) == tpm2.TPMCCStartup &&
		binary.BigEndian.Uint16(cmd[10:]) == uint16(tpm2.TPMSUClear)
}

// response is a TPM's answer that says no more than rc (Part 1 §18.10).
func response(rc tpm2.TPMRC) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	b = binary.BigEndian.AppendUint32(b, 10)
	return binary.BigEndian.AppendUint32(b, uint32(rc))
}

// ungated is the TPM that a guest without a gate meets: none until one appears.
type ungated struct {
	mu  sync.Mutex
	tpm TPM
}

func (u *ungated) set(t TPM) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.tpm = t
}

func (u *ungated) Execute(ctx context.Context, seq uint32, locality uint8, command []byte) ([]byte, error) {
	u.mu.Lock()
	t := u.tpm
	u.mu.Unlock()
	if t == nil {
		return response(tpm2.TPMRCFailure), nil
	}
	return t.Execute(ctx, seq, locality, command)
}

func (u *ungated) Done() <-chan struct{} { return nil }
func (u *ungated) Err() error            { return nil }
