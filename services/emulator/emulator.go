// Package emulator is the service that runs one guest, once: the native monitor or QEMU, the
// vTPM front end, and nothing else. It faces the guest and is the least trusted of Redoubt's
// processes: all it has are the descriptors the Builder handed over.
//
// A guest's reboot ends this process; the Builder starts a new one.
package emulator

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/answer"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/vhostuser"
	"redoubt.dev/redoubt/vtpm/channel"
	"redoubt.dev/redoubt/vtpm/frontend"
)

// A machine is a guest under one of the emulators.
type machine interface {
	frontend.Guest
	// Run runs the guest until it ends or ctx does.
	Run(ctx context.Context, tpm *frontend.Frontend, started func()) protocol.Exit
	PowerButton() error
	// ReadEventLog reads what the guest's firmware wrote there.
	ReadEventLog() ([]byte, error)
	// SetEventLog writes the event log into the guest's log area.
	SetEventLog(log []byte) error
	// Masked says which processors have interrupts switched off, while it is paused.
	Masked() ([]int, error)
	// Modules says what the guest's modules have done: JSON of isolate.Report.
	Modules() ([]byte, error)
	Close() error
}

// service is one emulator process.
type service struct {
	log    *slog.Logger
	peer   *rpc.Peer
	ctx    context.Context
	cancel context.CancelFunc // ends the guest

	mu      sync.Mutex
	machine machine
	holder  *holder
	status  *status            // nil without one
	tpm     *frontend.Frontend // nil without a TPM
	xenbus  *xenbus
	disks   []*vhostuser.Frontend
	nics    []*vhostuser.Frontend
	ended   chan struct{} // closed when the guest has ended and that was told
	exit    protocol.Exit // set before ended is closed

	work     sync.WaitGroup // Serve waits for it
	builders sync.Mutex     // taken for moments only
	resumed  chan struct{}  // closed when another Builder has come, then made anew
}

// Serve runs one guest: it waits for the Builder's start call, and returns when the guest has
// ended. A control connection that ends, ends the guest.
func Serve(ctx context.Context, log *slog.Logger, control *ipc.Conn) error {
	s := &service{log: log, resumed: make(chan struct{}), ended: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(ctx)
	defer s.work.Wait()
	defer s.cancel()
	s.peer = rpc.New(control, s.handle)
	done := make(chan error, 1)
	// The connection outlives ctx by the guest's last word.
	go func() { done <- s.peer.Run(context.Background()) }()
	select {
	case err := <-done: // the Builder is gone
		s.cancel()
		s.mu.Lock()
		started := s.machine != nil
		s.mu.Unlock()
		if started {
			<-s.ended
		}
		return err
	case <-s.ended:
	case <-s.ctx.Done():
		s.mu.Lock()
		started := s.machine != nil
		s.mu.Unlock()
		if started {
			<-s.ended
		}
	}
	s.peer.Drain() // the answer to start may still be on its way
	return <-done
}

func (s *service) handle(ctx context.Context, r *rpc.Request) (any, error) {
	switch r.Method {
	case protocol.MethodStart:
		var in protocol.Start
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		files, err := in.Files.Take(r)
		if err != nil {
			return nil, err
		}
		return struct{}{}, s.start(in, files)
	case protocol.MethodStore:
		var in protocol.Store
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		files, err := in.Files.Take(r)
		if err != nil {
			return nil, err
		}
		return struct{}{}, s.renewStore(one(files, protocol.FileStore))
	case protocol.MethodPowerButton:
		s.mu.Lock()
		m := s.machine
		s.mu.Unlock()
		if m == nil {
			return nil, rpc.Errorf(rpc.Unavailable, "the guest has not been started")
		}
		return struct{}{}, m.PowerButton()
	case protocol.MethodDisk:
		var in protocol.Disk
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		files, err := in.Files.Take(r)
		if err != nil {
			return nil, err
		}
		return struct{}{}, s.reconnect("disk", func() []*vhostuser.Frontend { return s.disks }, in.Index, one(files, protocol.FileBlock))
	case protocol.MethodNIC:
		var in protocol.NIC
		if err := r.Decode(&in); err != nil {
			return nil, err
		}
		files, err := in.Files.Take(r)
		if err != nil {
			return nil, err
		}
		return struct{}{}, s.reconnect("NIC", func() []*vhostuser.Frontend { return s.nics }, in.Index, one(files, protocol.FileNetwork))
	case protocol.MethodReadLog:
		s.mu.Lock()
		m := s.machine
		s.mu.Unlock()
		if m == nil {
			return nil, rpc.Errorf(rpc.Unavailable, "the guest has not been started")
		}
		log, err := m.ReadEventLog()
		if err != nil {
			return nil, err
		}
		// The area is larger than its log. What cannot be read is the verifier's to refuse.
		if l, err := eventlog.ParseLog(log); err == nil {
			log = log[:l.Size]
		}
		return protocol.GuestLog{Log: log}, nil
	case protocol.MethodReport:
		defer ipc.CloseAll(r.Files)
		return rpc.Answer(r, func(in protocol.Report) (any, error) { return s.report(in, r) })
	case protocol.MethodHold:
		defer ipc.CloseAll(r.Files)
		return rpc.Answer(r, func(in protocol.Hold) (any, error) {
			files, err := in.Files.Take(r)
			if err != nil {
				return nil, err
			}
			return s.hold(ctx, in, files)
		})
	case protocol.MethodLetGo:
		return rpc.Answer(r, func(in protocol.LetGo) (any, error) { return s.letGo(in) })
	case protocol.NoticeVTPMLost:
		s.mu.Lock()
		tpm := s.tpm
		s.mu.Unlock()
		if tpm != nil {
			tpm.Lost()
		}
		return nil, nil
	case protocol.NoticeResumed:
		s.builders.Lock()
		close(s.resumed)
		s.resumed = make(chan struct{})
		s.builders.Unlock()
		// Whoever validated the guest is gone, and the next Builder does not know that it is held for that. Not here: what is
		// being held or let go now may wait for a back end, of which this Builder tells later on the same connection.
		s.work.Go(func() {
			if _, err := s.letGo(protocol.LetGo{Who: protocol.HolderValidation}); err != nil {
				s.log.Error("the guest is not let go", "err", err)
			}
		})
		return nil, nil
	case protocol.MethodEnd:
		s.cancel()
		return nil, nil
	}
	return nil, rpc.Errorf(rpc.Refused, "emulator: no call %q", r.Method)
}

// report answers protocol.MethodReport.
func (s *service) report(in protocol.Report, r *rpc.Request) (any, error) {
	files, err := in.Files.Take(r)
	if err != nil {
		return nil, err
	}
	into := one(files, protocol.FileAnswer)
	s.mu.Lock()
	m := s.machine
	s.mu.Unlock()
	switch {
	case into == nil:
		return nil, rpc.Errorf(rpc.Invalid, "emulator: a descriptor is missing")
	case m == nil:
		return nil, rpc.Errorf(rpc.Unavailable, "the guest has not been started")
	}
	b, err := m.Modules()
	if err != nil {
		return nil, err
	}
	return answer.Put(into, b, nil)
}

func (s *service) event(kind, text string) {
	err := s.peer.Notify(protocol.NoticeEvent, protocol.Event{Kind: kind, Text: text, Time: time.Now()})
	if err != nil {
		s.log.Warn("event", "kind", kind, "err", err)
	}
}

// one takes the only descriptor of a name, nil where there is none.
func one(files map[string][]*os.File, name string) *os.File {
	if len(files[name]) == 0 {
		return nil
	}
	return files[name][0]
}

// start makes the machine and runs it in a goroutine that Serve waits for. It returns when the
// guest's first instruction is about to run.
func (s *service) start(in protocol.Start, files map[string][]*os.File) error {
	running := make(chan struct{})
	if err := s.launch(in, files, running); err != nil {
		return err
	}
	select {
	case <-running:
		return nil
	case <-s.ended:
		select {
		case <-running:
			return nil
		default:
			return rpc.Errorf(rpc.Unavailable, "%s", s.exit.Reason)
		}
	}
}

func (s *service) launch(in protocol.Start, files map[string][]*os.File, running chan<- struct{}) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.machine != nil {
		return rpc.Errorf(rpc.Exists, "the guest was started already")
	}
	if one(files, protocol.FileStore) == nil || one(files, protocol.FileMemory) == nil || one(files, protocol.FileConsole) == nil ||
		one(files, protocol.FileChannel) == nil {
		return rpc.Errorf(rpc.Invalid, "emulator: a descriptor is missing")
	}
	xs, err := newXenbus(one(files, protocol.FileStore), in.Domain, s.log)
	if err != nil {
		return err
	}
	g := &guest{service: s, in: in, files: files, xenbus: xs}
	if err := g.connectDevices(); err != nil {
		xs.close()
		return err
	}
	s.disks, s.nics = g.disks, g.nics
	word, err := newStatus(in, one(files, protocol.FileMemory))
	if err != nil {
		xs.close()
		return err
	}
	create := newQEMU
	if in.Emulator == spec.Native {
		create = newNative
	}
	m, err := create(g)
	if err != nil {
		xs.close()
		word.close()
		return err
	}
	h := &holder{guest: m}
	if f := one(files, protocol.FileTPM); f != nil {
		conn, err := channel.FromFile(f)
		if err != nil {
			xs.close()
			word.close()
			return errors.Join(err, m.Close())
		}
		g.frontend = frontend.New(conn, frontend.Options{
			Guest: gateHolder{h, s}, PauseAfter: g.pauseAfter(), OnOpen: g.onOpen(m),
			OnWait: func() {
				now := time.Now()
				g.waitedFrom.Store(&now)
				s.event(protocol.EventGateWait, "")
			},
		})
	}
	s.machine, s.holder, s.status, s.xenbus, s.tpm = m, h, word, xs, g.frontend
	go func() {
		defer close(s.ended)
		exit := m.Run(s.ctx, g.frontend, func() {
			s.event(protocol.EventKernelStarted, "")
			close(running)
		})
		if g.frontend != nil {
			g.frontend.Close()
			exit = g.explain(exit)
		}
		xs.close()
		if err := m.Close(); err != nil {
			s.log.Warn("close", "err", err)
		}
		g.closeDevices()
		word.close()
		s.exit = exit
		if err := s.tell(exit); err != nil {
			s.log.Warn("outcome not told", "outcome", exit.Outcome, "reason", exit.Reason, "err", err)
		}
	}()
	return nil
}

// tell tells the Builder the outcome, and the next one if it dies before it knows.
func (s *service) tell(exit protocol.Exit) error {
	for {
		s.builders.Lock()
		resumed := s.resumed
		s.builders.Unlock()
		ctx, cancel := context.WithCancel(context.Background())
		go func() { // ends with ctx
			select {
			case <-resumed:
				cancel()
			case <-ctx.Done():
			}
		}()
		_, err := s.peer.Call(ctx, protocol.MethodOutcome, exit, nil)
		cancel()
		if !errors.Is(err, context.Canceled) {
			return err
		}
	}
}

// A guest is what its machine is made of.
type guest struct {
	service    *service
	in         protocol.Start
	files      map[string][]*os.File
	xenbus     *xenbus
	frontend   *frontend.Frontend // nil without a TPM
	waitedFrom atomic.Pointer[time.Time]
	early      []byte // an event log that came before the machine was made
	disks      []*vhostuser.Frontend
	nics       []*vhostuser.Frontend
	memory     *os.File // of the native monitor's guest, for the devices' back ends
}

// pauseAfter: QEMU's TPM device cannot hold a processor inside an access, so its guest is
// paused as soon as a command comes early.
func (g *guest) pauseAfter() time.Duration {
	if g.in.Emulator == spec.Native {
		return g.in.PauseAfter
	}
	return 0
}

// onOpen puts the event log where the guest will look for it and tells how long it waited.
func (g *guest) onOpen(m machine) func([]byte) error {
	return func(log []byte) error {
		if len(log) > 0 {
			if err := m.SetEventLog(log); err != nil {
				return err
			}
		}
		if from := g.waitedFrom.Load(); from != nil {
			g.service.event(protocol.EventGateWaited, time.Since(*from).Round(time.Millisecond).String())
		}
		return nil
	}
}

// explain prefers the vTPM's failure to what it made of the guest.
func (g *guest) explain(exit protocol.Exit) protocol.Exit {
	var failed *frontend.FailedError
	if errors.As(g.frontend.Err(), &failed) && exit.Outcome != protocol.Stopped {
		return protocol.Exit{Outcome: protocol.Crashed, Reason: failed.Error()}
	}
	return exit
}
