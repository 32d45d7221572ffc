package manager

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/journal"
	"redoubt.dev/redoubt/vtpm/keys"
)

// A Device is a running vTPM. Its methods may be called concurrently.
type Device struct {
	m    *Manager
	rec  *record
	eng  *engine.Engine
	note *journal.Journal

	// turn holds one token: who has it may use the engine. A guest's command takes it once, a
	// host's sequence for all its commands.
	turn chan struct{}

	// Set by provision under turn.
	platformAuth []byte // in this process's memory only, another one after each start
	log          []byte

	failure atomic.Pointer[error] // why the device ended, where that is not the engine's doing

	cancel       context.CancelFunc // ends the background work
	manufactured chan struct{}      // closed when the background work ended; mErr is set before
	mErr         error

	closeOnce sync.Once
	closeErr  error
}

// startDevice does the work of Start. The engine starts while the measurements are taken.
//
// A new guest's record is written after it is ready, beside the guest's own start, because a disk
// that syncs holds up the engine's writes too. No command, the guest's or the host's, runs before
// the record is durable: what the TPM then keeps can be read again after a crash.
func (m *Manager) startDevice(ctx context.Context, rec *record, fresh bool, boot Boot) (_ *Device, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the measuring if the engine fails first
	dir := m.guestDir(rec.Guest)
	if fresh {
		if err := m.makeGuestDir(rec.Guest); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil { // this call made it, nothing can depend on it
				err = errors.Join(err, m.discard(rec.Guest))
			}
		}()
	}
	type measured struct {
		events []eventlog.Event
		err    error
	}
	results := make(chan measured, 1)
	go func() { // ends with events, which ctx ends
		e, err := boot.Events(ctx)
		results <- measured{e, err}
	}()
	d := m.device(rec, boot.Journal)
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	d.note.Begin(rec.Instance, nonce)
	if !fresh {
		d.note.Now(journal.Durable)
	}
	if d.eng, err = engine.Start(ctx, engine.Config{
		Dir: filepath.Join(dir, tpmDir), Key: rec.key, Existing: !fresh, Starter: m.starter,
		Journal: d.note, Keep: boot.Keep,
	}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.eng.Kill()
		}
	}()
	if err := d.eng.Startup(ctx); err != nil {
		return nil, err
	}
	if err := d.provision(ctx, func() ([]eventlog.Event, error) {
		select {
		case r := <-results:
			return r.events, r.err
		case <-d.eng.Done():
			return nil, d.eng.Err()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}); err != nil {
		return nil, err
	}
	return d, nil
}

// device is a Device without an engine yet; note may be nil.
func (m *Manager) device(rec *record, note *journal.Journal) *Device {
	if note == nil {
		note = journal.Volatile()
	}
	return &Device{m: m, rec: rec, note: note, turn: make(chan struct{}, 1), manufactured: make(chan struct{})}
}

// saveNew writes the record of a new guest; if it cannot, the vTPM ends and is gone. The engine
// does not sync its state: here that is done once, so that a record never lacks its TPM.
func (d *Device) saveNew() error {
	err := syncFile(filepath.Join(d.m.guestDir(d.rec.Guest), tpmDir, engine.StateFile))
	if err == nil {
		err = d.m.save(d.rec)
	}
	if err == nil {
		// Left behind it does no harm: the record counts.
		_ = os.Remove(filepath.Join(d.m.guestDir(d.rec.Guest), newMarker))
		return nil
	}
	err = fmt.Errorf("vTPM of guest %s: save its record: %w", d.rec.Guest, err)
	d.failure.Store(&err)
	d.eng.Kill()
	d.m.forget(d.rec.Guest)
	return errors.Join(err, d.m.discard(d.rec.Guest))
}

// syncFile makes a file that another process wrote durable, with its name.
func syncFile(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	err = errors.Join(f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return keys.SyncDir(file)
}

// save writes a record durably, with the directories it is in.
func (m *Manager) save(rec *record) error {
	b, err := rec.encode(m.root)
	if err != nil {
		return err
	}
	file := filepath.Join(m.guestDir(rec.Guest), recordFile)
	if err := keys.WriteFile(file, b); err != nil {
		return err
	}
	return keys.SyncDir(m.guestDir(rec.Guest))
}

// provision makes a TPM that has just started ready for its guest: platform authorisation,
// identity check, measurements.
func (d *Device) provision(ctx context.Context, events func() ([]eventlog.Event, error)) error {
	tpm := raw{ctx: ctx, eng: d.eng}
	auth := make([]byte, 32)
	_, _ = rand.Read(auth) // never fails (crypto/rand)
	if _, err := (tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: auth},
	}).Execute(tpm); err != nil {
		return fmt.Errorf("set the platform authorisation: %w", err)
	}
	d.platformAuth = auth
	d.note.SetAuth(auth)
	if d.rec.manufactured() {
		if err := d.checkIdentity(tpm); err != nil {
			return err
		}
	}
	banks, err := allocatedBanks(tpm)
	if err != nil {
		return err
	}
	list, err := events()
	if err != nil {
		return fmt.Errorf("measurements: %w", err)
	}
	list, log, err := logFor(list, banks)
	if err != nil {
		return fmt.Errorf("measurements: %w", err)
	}
	if err := extend(tpm, list); err != nil {
		return err
	}
	d.log = log
	return nil
}

// logFor is what is extended and what is logged of a list in a TPM with the banks. The log has the
// digests there are: a bank without any is not in it.
func logFor(list []eventlog.Event, banks []tpm2.TPMAlgID) (extended []eventlog.Event, log []byte, err error) {
	extended, logged, err := forBanks(list, banks)
	if err != nil {
		return nil, nil, err
	}
	log, err = eventlog.Encode(logged)
	return extended, log, err
}

// allocatedBanks lists the banks in which the TPM has registers.
func allocatedBanks(tpm transport.TPM) ([]tpm2.TPMAlgID, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(tpm)
	if err != nil {
		return nil, fmt.Errorf("list PCR banks: %w", err)
	}
	sel, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, fmt.Errorf("list PCR banks: %w", err)
	}
	var banks []tpm2.TPMAlgID
	for _, s := range sel.PCRSelections {
		for _, b := range s.PCRSelect {
			if b != 0 {
				banks = append(banks, s.Hash)
				break
			}
		}
	}
	if len(banks) == 0 {
		return nil, errors.New("the TPM has no PCR bank")
	}
	return banks, nil
}

// forBanks keeps of each event's digests those of the banks. In a bank that the event was not hashed
// for its place is taken by eventlog.Cap, which is extended and not logged: a bank that is not
// extended would let the guest say in it what it likes. SHA-256 is what quotes are made of and may not lack.
func forBanks(list []eventlog.Event, banks []tpm2.TPMAlgID) (extended, logged []eventlog.Event, err error) {
	extended, logged = slices.Clone(list), slices.Clone(list)
	for i, e := range list {
		extended[i].Digests, logged[i].Digests = nil, nil
		for _, b := range banks {
			sum := e.Digest(b)
			if sum != nil {
				logged[i].Digests = append(logged[i].Digests, eventlog.Digest{Algorithm: b, Sum: sum})
			} else if sum = eventlog.Cap(b); sum == nil || b == tpm2.TPMAlgSHA256 {
				return nil, nil, fmt.Errorf("event %d (PCR %d) has no %s digest, the TPM has such a bank", i+1, e.PCR, eventlog.AlgorithmName(b))
			}
			extended[i].Digests = append(extended[i].Digests, eventlog.Digest{Algorithm: b, Sum: sum})
		}
	}
	return extended, logged, nil
}

// take waits for the turn.
func (d *Device) take(ctx context.Context) error {
	select {
	case <-d.turn:
		return nil
	case <-d.eng.Done():
		return d.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *Device) give() { d.turn <- struct{}{} }

// Execute runs one command of the guest and returns the response. What a guest may not do is
// answered as a TPM would; an error means that the vTPM is finished, or ctx ended first.
//
// seq is the sender's number of the command. The last number again has the last response again,
// also from a manager that adopted the device: the guest's front end need not know what became of
// a command whose manager was killed.
func (d *Device) Execute(ctx context.Context, seq uint32, locality uint8, cmd []byte) ([]byte, error) {
	if err := d.take(ctx); err != nil {
		return nil, err
	}
	defer d.give()
	return d.eng.ExecuteGuest(ctx, seq, locality, cmd)
}

// Reset is the guest's reboot: a power cycle of the TPM, then ready again with the
// measurements of the new boot. If it fails the device must be closed: the guest must not use it.
func (d *Device) Reset(ctx context.Context, events Measurements) error {
	if err := d.take(ctx); err != nil {
		return err
	}
	defer d.give()
	d.note.Restart()
	err := d.eng.Reset(ctx)
	if err == nil {
		err = d.provision(ctx, func() ([]eventlog.Event, error) { return events(ctx) })
	}
	if err != nil { // half ready is not ready
		err = fmt.Errorf("reset the vTPM of guest %s: %w", d.rec.Guest, err)
		d.failure.Store(&err)
		d.eng.Kill()
	}
	return err
}

// Guest is the UUID of the guest.
func (d *Device) Guest() string { return d.rec.Guest }

// Instance is the vTPM's number on this host.
func (d *Device) Instance() int { return d.rec.Instance }

// Pid is the process number of the engine, for reports.
func (d *Device) Pid() int { return d.eng.Pid() }

// EventLog is the log of the measurements that were extended, crypto-agile, one digest per bank.
func (d *Device) EventLog(ctx context.Context) ([]byte, error) {
	if err := d.take(ctx); err != nil {
		return nil, err
	}
	defer d.give()
	return append([]byte(nil), d.log...), nil
}

// Done is closed when the engine has ended, in order or not; Err then says why.
func (d *Device) Done() <-chan struct{} { return d.eng.Done() }

// Err is the reason Done was closed, nil before.
func (d *Device) Err() error {
	if err := d.failure.Load(); err != nil {
		return *err
	}
	return d.eng.Err()
}

// Close ends the vTPM in order (TPM2_Shutdown); if ctx ends first it is killed. Closing it again
// returns the first outcome.
func (d *Device) Close(ctx context.Context) error {
	d.closeOnce.Do(func() {
		d.cancel()
		<-d.manufactured
		d.closeErr = d.eng.Shutdown(ctx)
		d.m.release(d)
	})
	return d.closeErr
}
