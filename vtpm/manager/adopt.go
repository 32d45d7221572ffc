package manager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/journal"
)

// ErrNotReady says that a vTPM's manager was killed before it was ready, or while it was reset: it
// has no state of a boot that could be gone on with, and is started as any other.
var ErrNotReady = errors.New("it was not ready")

// An Orphan is the running vTPM of a manager that was killed.
type Orphan struct {
	Journal       *journal.Journal
	Control, Data *os.File // as of engine.Kept; taken over
	// Process gives the engine's process, whose output goes to the writer.
	Process func(io.Writer) (programs.Running, error)
}

// Adopt goes on with the vTPM of a guest, which notices nothing: what was under way, the guest's
// or the host's, is brought to its end or undone. After an error the engine's process has ended,
// and the guest's vTPM may be started. ctx bounds the adoption only.
func (m *Manager) Adopt(ctx context.Context, guest string, o Orphan) (*Device, error) {
	d, err := m.adopt(ctx, guest, o)
	if err != nil {
		return nil, fmt.Errorf("vTPM of guest %s: adopt: %w", guest, err)
	}
	return d, nil
}

func (m *Manager) adopt(ctx context.Context, guest string, o Orphan) (*Device, error) {
	r, err := m.reserveOrphan(guest, o)
	if err != nil {
		return nil, errors.Join(err, o.End())
	}
	defer m.starting.Done()
	d := m.device(r, o.Journal)
	d.platformAuth = o.Journal.Auth()
	d.eng, err = engine.Adopt(ctx, engine.Config{
		Dir: filepath.Join(m.guestDir(guest), tpmDir), Key: r.key, Existing: true, Journal: o.Journal,
	}, o.Control, o.Data, o.Process)
	if err == nil {
		if err = d.goOn(ctx); err != nil {
			d.eng.Kill()
		}
	}
	return m.started(guest, r, false, d, err)
}

// reserveOrphan is reserve for a guest that must be known, and its vTPM ready.
func (m *Manager) reserveOrphan(guest string, o Orphan) (*record, error) {
	m.mu.Lock()
	known := m.records[guest] != nil
	m.mu.Unlock()
	if !known || !o.Journal.Is(journal.Ready|journal.Durable) {
		return nil, ErrNotReady
	}
	r, _, err := m.reserve(guest)
	if err != nil {
		return nil, err
	}
	if r.Instance != o.Journal.Instance() {
		m.starting.Done()
		_, err := m.started(guest, r, false, nil, fmt.Errorf("%w: of instance %d, the guest's is %d", journal.ErrJournal, o.Journal.Instance(), r.Instance))
		return nil, err
	}
	return r, nil
}

// End ends an orphan that nobody adopts.
func (o Orphan) End() error {
	o.Control.Close()
	o.Data.Close()
	p, err := o.Process(io.Discard)
	if err != nil {
		return err
	}
	p.Kill()
	_ = p.Wait() // killed
	return nil
}

// goOn finds the rest of what the last manager knew, and ends the host's sequence it was killed in.
func (d *Device) goOn(ctx context.Context) error {
	if err := d.finish(ctx); err != nil {
		return err
	}
	var banks []tpm2.TPMAlgID
	if err := d.sequence(ctx, func(tpm transport.TPM) (err error) {
		if d.rec.manufactured() {
			if err := d.checkIdentity(tpm); err != nil {
				return err
			}
		}
		banks, err = allocatedBanks(tpm)
		return err
	}); err != nil {
		return err
	}
	list, err := eventlog.Parse(d.note.Log())
	if err != nil {
		return fmt.Errorf("measurements: %w", err)
	}
	if _, d.log, err = logFor(list, banks); err != nil {
		return fmt.Errorf("measurements: %w", err)
	}
	return nil
}
