package vtpm

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"sync"
	"time"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/store/server"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/vtpm/backend"
	"redoubt.dev/redoubt/vtpm/channel"
	"redoubt.dev/redoubt/vtpm/journal"
	"redoubt.dev/redoubt/vtpm/manager"
)

// guest is the vTPM's side of one running guest. Its device outlives the guest's emulator
// processes: a reboot brings a new back end, not a new device.
type guest struct {
	s    *service
	uuid string

	ctx    context.Context // ends when the guest is down
	cancel context.CancelFunc

	journal *journal.Journal
	work    sync.WaitGroup // what may touch the journal

	mu     sync.Mutex
	back   *backend.Backend
	domain tree.Domain     // that back serves
	device *manager.Device // nil until it is ready for the first time
	number int
	log    []byte // event log of this boot, for evidence
	// measured carries the events of this boot from measure to the manager.
	measured chan measurement
	ready    chan error // yields once when this boot's device is ready or lost
}

type measurement struct {
	log      []byte
	events   []eventlog.Event
	guestLog bool
}

func (s *service) attach(r *rpc.Request) error {
	var in protocol.Attach
	if err := r.Decode(&in); err != nil {
		return err
	}
	files, err := in.Files.Take(r)
	if err != nil {
		return err
	}
	defer closeFiles(files)
	if len(files[protocol.FileTPM]) != 1 || len(files[protocol.FileJournal]) != 1 {
		return rpc.Errorf(rpc.Invalid, "vTPM: attach needs one channel and one journal")
	}
	g, err := s.join(in.UUID, func() (*journal.Journal, error) { return journal.Map(files[protocol.FileJournal][0]) })
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.back != nil && g.domain == in.Domain:
		return nil // said again by a Builder that does not know whether it was heard
	case g.back != nil:
		return rpc.Errorf(rpc.Exists, "vTPM of %s: attached already", in.UUID)
	}
	return g.serve(in, files[protocol.FileTPM], s.hub.Attach)
}

func closeFiles(files map[string][]*os.File) {
	for _, list := range files {
		for _, f := range list {
			f.Close() // what was taken over is closed already, or a copy
		}
	}
}

// join finds the guest, or makes it.
func (s *service) join(uuid string, open func() (*journal.Journal, error)) (*guest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.guests[uuid]; g != nil {
		return g, nil
	}
	j, err := open()
	if err != nil {
		return nil, err
	}
	g := &guest{s: s, uuid: uuid, journal: j}
	g.ctx, g.cancel = context.WithCancel(s.ctx)
	s.guests[uuid] = g
	return g, nil
}

// serve has a back end serve the emulator at the other end of files. g.mu is held.
func (g *guest) serve(in protocol.Attach, files []*os.File, attach func(context.Context, backend.Options) (*backend.Backend, error)) error {
	ch, err := channel.FromFile(files[0])
	if err != nil {
		return err
	}
	g.measured, g.ready = make(chan measurement, 1), make(chan error, 1)
	g.back, err = attach(g.ctx, backend.Options{
		Domain: in.Domain, Channel: ch, Deadline: in.Deadline, NoGate: in.NoGate, Poll: in.Poll, Fresh: in.Fresh,
		Opened: func() { g.journal.Now(journal.Open) }, NoIMA: g.journal.Is(journal.IMA),
		Report: func(kind string) {
			if kind == backend.ReportIMA {
				g.journal.Now(journal.IMA)
			}
			g.s.event(protocol.Event{UUID: in.UUID, Kind: kind})
		},
	})
	if err != nil {
		return fmt.Errorf("vTPM back end: %w", err)
	}
	g.domain = in.Domain
	back := g.back
	g.s.wg.Go(func() {
		<-back.Done()
		if err := back.Err(); err != nil {
			g.s.failed(in.UUID, err)
		}
	})
	return nil
}

func (s *service) failed(uuid string, err error) {
	if nerr := s.peer.Notify(protocol.NoticeFailed, protocol.Failed{UUID: uuid, Reason: err.Error()}); nerr != nil {
		s.log.Warn("failure not told", "guest", uuid, "failure", err, "err", nerr)
	}
}

// create starts the device (step 3) and answers with its instance number as soon as that is
// settled; the device becomes ready in a goroutine of its own.
func (s *service) create(ctx context.Context, r *rpc.Request) (any, error) {
	var in protocol.Create
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	g, err := s.guest(in.UUID)
	if err != nil {
		return nil, err
	}
	numbered := make(chan int, 1)
	g.mu.Lock()
	back, ready, device, number := g.back, g.ready, g.device, g.number
	g.mu.Unlock()
	g.work.Go(func() {
		if err := g.bring(back, device, in, numbered); err != nil {
			ready <- err
			back.Fail(err.Error())
			return
		}
		ready <- nil
	})
	if device != nil { // a reboot: the number is known
		return protocol.Created{Instance: number}, nil
	}
	select {
	case n := <-numbered:
		return protocol.Created{Instance: n}, nil
	case err := <-ready:
		ready <- err // measure waits for it too
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// bring makes this boot's vTPM ready and opens the gate's last two facts.
func (g *guest) bring(back *backend.Backend, device *manager.Device, in protocol.Create, numbered chan<- int) error {
	if in.Delay > 0 {
		t := time.NewTimer(in.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-g.ctx.Done():
			return g.ctx.Err()
		}
	}
	g.mu.Lock()
	measured := g.measured
	g.mu.Unlock()
	var m measurement
	events := func(ctx context.Context) ([]eventlog.Event, error) {
		select {
		case m = <-measured:
			return m.events, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-g.ctx.Done():
			return nil, g.ctx.Err()
		}
	}
	var err error
	if device == nil {
		device, err = g.s.manager.Boot(g.ctx, g.uuid, manager.Boot{
			Events: events, Journal: g.journal, Keep: g.keep,
			Assigned: func(n int) {
				g.mu.Lock()
				g.number = n
				g.mu.Unlock()
				numbered <- n
			},
		})
		if err == nil {
			g.s.wg.Go(func() { g.watchManufacture(device) })
		}
	} else {
		err = device.Reset(g.ctx, events)
	}
	if err != nil {
		return err
	}
	if !m.guestLog {
		if err := device.LeavePlatform(g.ctx); err != nil {
			return err
		}
	}
	if !g.journal.SetLog(m.log) {
		return fmt.Errorf("event log of %d bytes", len(m.log))
	}
	if m.guestLog {
		g.journal.Now(journal.GuestLog)
	}
	g.mu.Lock()
	g.device, g.log = device, m.log
	g.mu.Unlock()
	g.journal.Now(journal.Ready)
	g.s.event(protocol.Event{UUID: g.uuid, Kind: protocol.EventVTPMStarted, Instance: device.Instance()})
	if err := g.up(back); err != nil {
		return err
	}
	g.s.wg.Go(func() {
		if err := device.SelfTest(g.ctx); err != nil && g.ctx.Err() == nil {
			g.s.log.Warn("self-test", "guest", g.uuid, "err", err)
		}
	})
	return nil
}

// up opens the gate's last two facts.
func (g *guest) up(back *backend.Backend) error {
	g.mu.Lock()
	number, device := g.number, g.device
	g.mu.Unlock()
	if err := g.s.store.Write(server.ReadyNode(number), "1"); err != nil {
		return err
	}
	back.EngineUp(number, device, g.guestLog())
	return nil
}

// guestLog is the event log that the guest gets.
func (g *guest) guestLog() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.journal.Is(journal.GuestLog) {
		return nil
	}
	return g.log
}

func (s *service) measure(ctx context.Context, r *rpc.Request) error {
	var in protocol.Measure
	if err := r.Decode(&in); err != nil {
		return err
	}
	g, err := s.guest(in.UUID)
	if err != nil {
		return err
	}
	events, err := eventlog.Parse(in.Log)
	if err != nil {
		return rpc.Errorf(rpc.Invalid, "measurements: %v", err)
	}
	g.mu.Lock()
	measured, ready := g.measured, g.ready
	g.mu.Unlock()
	select {
	case measured <- measurement{in.Log, events, in.GuestLog}:
	default:
		return rpc.Errorf(rpc.Exists, "vTPM of %s: measured already", in.UUID)
	}
	select {
	case err := <-ready:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-g.ctx.Done():
		return rpc.Errorf(rpc.Unavailable, "the guest ended before its vTPM was ready")
	}
}

// release takes the back end away, and unless another emulator follows the device too.
func (s *service) release(r *rpc.Request) error {
	var in protocol.Release
	if err := r.Decode(&in); err != nil {
		return err
	}
	s.mu.Lock()
	g := s.guests[in.UUID]
	if g != nil && !in.Keep {
		delete(s.guests, in.UUID)
	}
	s.mu.Unlock()
	if g == nil {
		return nil
	}
	if in.Keep {
		g.leave()
		return nil
	}
	g.detach()
	g.work.Wait() // a device may come of it
	g.mu.Lock()
	device := g.device
	g.mu.Unlock()
	if device == nil {
		return g.journal.Close()
	}
	ctx, stop := context.WithTimeout(context.Background(), shutdownTime)
	defer stop()
	if err := device.Close(ctx); err != nil {
		return fmt.Errorf("vTPM of %s: %w", in.UUID, err)
	}
	return g.journal.Close()
}

// leave ends the back end and removes the ready node: what it said is true no more. Nor is the
// vTPM ready for whatever emulator comes next.
func (g *guest) leave() {
	g.journal.NoMore(journal.Ready | journal.Open)
	g.mu.Lock()
	back, number := g.back, g.number
	g.back = nil
	g.mu.Unlock()
	if back != nil {
		back.Close()
	}
	if number != 0 {
		if err := g.s.store.Remove(server.ReadyNode(number)); err != nil && g.s.ctx.Err() == nil {
			g.s.log.Warn("ready node", "err", err)
		}
	}
}

// detach ends everything of a guest but its device.
func (g *guest) detach() {
	g.cancel()
	g.leave()
}

// watchManufacture tells when the vTPM's keys and certificate are there.
func (g *guest) watchManufacture(d *manager.Device) {
	id, err := d.Identity(g.ctx)
	if err != nil {
		if g.ctx.Err() == nil {
			g.s.log.Error("manufacture", "guest", g.uuid, "err", err)
			g.s.event(protocol.Event{UUID: g.uuid, Kind: protocol.EventVTPM, Text: "cannot be attested: " + err.Error()})
		}
		return
	}
	digest, err := ekDigest(id.EKCertificate)
	if err != nil {
		g.s.log.Error("manufacture", "guest", g.uuid, "err", err)
		return
	}
	g.s.event(protocol.Event{UUID: g.uuid, Kind: protocol.EventManufactured, Instance: d.Instance(), EKSHA256: digest})
}

// ekDigest is the SHA-256 of a certificate's public key.
func ekDigest(der []byte) (string, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:]), nil
}

// running finds the device of a guest that can be asked.
func (s *service) running(uuid string) (*guest, *manager.Device, error) {
	g, err := s.guest(uuid)
	if err != nil {
		return nil, nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.device == nil {
		return nil, nil, rpc.Errorf(rpc.Unavailable, "the vTPM is not ready yet: try again")
	}
	return g, g.device, nil
}
