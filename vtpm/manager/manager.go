// Package manager makes, keeps and serves the vTPMs of a host's guests.
//
// Saved data is a directory:
//
//	root.key                 the root key (package keys)
//	manager.json             host, certificate authority for EK certificates
//	guests/UUID/guest.json   record: instance, state key, EK certificate, AK
//	guests/UUID/tpm/         the engine's state, encrypted with the state key
//	guests/UUID/new          the guest's first start has not written its record yet
//	guests/UUID.new          one that is being made; removed by the next manager
//	guests/UUID.removed      one that is being removed; the next manager goes on with that
//
// The manager loads what is there or, only where there is nothing at all, creates itself.
// Anything else, be it damaged, incomplete, altered or brought from another host, is refused with
// the file's name and the reason, and stays as it is: each record is bound by the root key to
// every field in it.
//
// A guest's vTPM is ready when the engine runs, holds a random platform authorisation that only
// this process knows, and has the guest's measurements in all its PCR banks. What else a new
// vTPM needs (EK, certificate, AK) is made afterwards in the background; no guest
// waits for it.
package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"syscall"

	"github.com/google/uuid"
	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/engine"
	"redoubt.dev/redoubt/vtpm/journal"
	"redoubt.dev/redoubt/vtpm/keys"
)

// Names in the state directory.
const (
	rootFile    = "root.key"
	managerFile = "manager.json"
	guestsDir   = "guests"
	recordFile  = "guest.json"
	tpmDir      = "tpm"
)

// Errors that callers tell apart; the errors returned wrap them.
var (
	ErrState   = errors.New("state is refused")        // damaged, incomplete or foreign saved data
	ErrRunning = errors.New("vTPM is running already") // Start or Remove of a running one
	ErrUnknown = errors.New("no vTPM of this guest")
	ErrClosed  = errors.New("vTPM manager is closed")
	ErrRevoked = errors.New("vTPM is revoked: it opens no more")
	// ErrFailure is TPM_RC_FAILURE: what the TPM has saved is whole, but it does no more.
	ErrFailure = errors.New("vTPM is in failure mode until its next start: is its disk full?")
)

// Options say where the saved data is.
type Options struct {
	Dir    string     // made if missing; belongs to this manager alone
	TPM    *keys.Host // the host's TPM; nil where there is none
	HostID string     // names the host in a new CA; "" takes a random one

	Starter programs.Starter // of the engines; nil: as children
}

// A Manager serves the vTPMs of one state directory. Its methods may be called concurrently.
type Manager struct {
	dir     string
	starter programs.Starter
	lock    *os.File
	root    *keys.Root
	ca      *authority

	mu           sync.Mutex // guards what follows
	records      map[string]*record
	broken       map[string]error   // guests whose record was refused
	running      map[string]*Device // nil while it starts or is removed
	nextInstance int
	closed       bool
	starting     sync.WaitGroup
}

// Open loads the manager from its directory, or creates it where there is nothing at all.
func Open(o Options) (*Manager, error) {
	m, err := open(o)
	if err != nil {
		return nil, fmt.Errorf("vTPM manager: %w", err)
	}
	return m, nil
}

func open(o Options) (_ *Manager, err error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	m := &Manager{
		dir: o.Dir, starter: o.Starter,
		records: make(map[string]*record), broken: make(map[string]error), running: make(map[string]*Device),
		nextInstance: 1,
	}
	if m.lock, err = lockDir(o.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.lock.Close()
		}
	}()
	entries, err := os.ReadDir(o.Dir)
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		if err := m.create(o); err != nil {
			return nil, err
		}
		return m, nil
	}
	if err := m.load(o); err != nil {
		return nil, err
	}
	return m, nil
}

// lockDir takes the directory for this process until the returned file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%w: the mode of %s is %04o, it must be 0700", ErrState, dir, st.Mode().Perm())
	}
	if err == nil {
		if lerr := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); lerr != nil {
			err = fmt.Errorf("%s is used by another vTPM manager (%w): end that one first", dir, lerr)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// create writes the saved data of a new manager; manager.json comes last and makes it whole.
func (m *Manager) create(o Options) (err error) {
	if o.HostID == "" {
		o.HostID = uuid.NewString()
	}
	if m.root, err = keys.Create(filepath.Join(m.dir, rootFile), o.TPM); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(m.dir, guestsDir), 0o700); err != nil {
		return err
	}
	if m.ca, err = newAuthority(o.HostID); err != nil {
		return err
	}
	b, err := m.ca.encode(m.root)
	if err != nil {
		return err
	}
	return keys.WriteFile(filepath.Join(m.dir, managerFile), b)
}

func (m *Manager) load(o Options) (err error) {
	for _, f := range []string{managerFile, rootFile, guestsDir} {
		if _, err := os.Lstat(filepath.Join(m.dir, f)); err != nil {
			return fmt.Errorf("%w: %s is not empty but has no %s (%w): restore it from a copy; nothing is replaced", ErrState, m.dir, f, err)
		}
	}
	if m.root, err = keys.Open(filepath.Join(m.dir, rootFile), o.TPM); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	file := filepath.Join(m.dir, managerFile)
	b, err := keys.ReadFile(file, maxSaved)
	if err == nil {
		m.ca, err = parseAuthority(b, m.root)
	}
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrState, file, err)
	}
	if o.HostID != "" && o.HostID != m.ca.host {
		return fmt.Errorf("%w: %s is of host %q, this is %q", ErrState, file, m.ca.host, o.HostID)
	}
	return m.loadRecords()
}

// loadRecords reads all guests. One that is refused does not keep the others from running.
func (m *Manager) loadRecords() error {
	entries, err := os.ReadDir(filepath.Join(m.dir, guestsDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		guest := e.Name()
		if of, ok := leftover(guest); ok { // its guest's own directory came before it
			if err := os.RemoveAll(m.guestDir(guest)); err != nil && m.records[of] == nil {
				m.broken[of] = fmt.Errorf("%w: left of one that was not finished: %w", ErrState, err)
			}
			continue
		}
		if checkGuest(guest) != nil {
			continue // never looked up by a guest's name
		}
		if m.unfinished(guest) {
			if err := m.discard(guest); err != nil {
				m.broken[guest] = fmt.Errorf("%w: left of one that was not finished: %w", ErrState, err)
			}
			continue
		}
		r, err := m.loadRecord(guest)
		if err != nil {
			m.broken[guest] = err
			continue
		}
		m.records[guest] = r
		m.nextInstance = max(m.nextInstance, r.Instance+1)
	}
	return nil
}

func (m *Manager) loadRecord(guest string) (*record, error) {
	file := filepath.Join(m.guestDir(guest), recordFile)
	b, err := keys.ReadFile(file, maxSaved)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	r, err := parseRecord(b, guest, m.root)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrState, file, err)
	}
	return r, nil
}

func (m *Manager) guestDir(guest string) string { return filepath.Join(m.dir, guestsDir, guest) }

// checkGuest demands a UUID in its canonical form, which is also a safe file name.
func checkGuest(guest string) error {
	u, err := uuid.Parse(guest)
	if err != nil || u.String() != guest {
		return fmt.Errorf("guest %q: not a UUID in lower case", guest)
	}
	return nil
}

// Sealed says whether the root key rests in the host's TPM.
func (m *Manager) Sealed() bool { return m.root.Sealed() }

// HostID is the host's name in the CA certificate.
func (m *Manager) HostID() string { return m.ca.host }

// CACertificate is the host's CA certificate (DER): the root that verifiers are given.
func (m *Manager) CACertificate() []byte { return append([]byte(nil), m.ca.der...) }

// Measurements yields the events of a guest's measured boot; it is called once per start, at once,
// and may take its time: the engine starts meanwhile. It must return when its context ends. Its
// events must have SHA-256 digests; a bank of the TPM that they have none for is capped (eventlog.Cap).
type Measurements func(context.Context) ([]eventlog.Event, error)

// Fixed is Measurements that are known already.
func Fixed(events []eventlog.Event) Measurements {
	return func(context.Context) ([]eventlog.Event, error) { return events, nil }
}

// Start makes or reopens the vTPM of a guest and returns when it is ready. ctx bounds the start
// only. If it fails nothing runs, and a vTPM that was made by this call is gone again.
func (m *Manager) Start(ctx context.Context, guest string, events Measurements) (*Device, error) {
	return m.Boot(ctx, guest, Boot{Events: events})
}

// A Boot is what a vTPM is started with.
type Boot struct {
	Events Measurements
	// Assigned, if not nil, is called with the vTPM's instance number as soon as that is settled,
	// before the engine starts.
	Assigned func(instance int)
	// Journal and Keep are what another manager needs to adopt the device; both may be nil.
	Journal *journal.Journal
	Keep    func(engine.Kept) error
}

// Boot is Start with all its wishes.
func (m *Manager) Boot(ctx context.Context, guest string, b Boot) (*Device, error) {
	d, err := m.start(ctx, guest, b)
	if err != nil {
		return nil, fmt.Errorf("vTPM of guest %s: %w", guest, err)
	}
	return d, nil
}

func (m *Manager) start(ctx context.Context, guest string, b Boot) (*Device, error) {
	r, fresh, err := m.reserve(guest)
	if err != nil {
		return nil, err
	}
	defer m.starting.Done()
	if b.Assigned != nil {
		b.Assigned(r.Instance)
	}
	d, err := m.startDevice(ctx, r, fresh, b)
	return m.started(guest, r, fresh, d, err)
}

// started ends what reserve began: with a device that runs, or with err.
func (m *Manager) started(guest string, r *record, fresh bool, d *Device, err error) (*Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		delete(m.running, guest)
		return nil, err
	}
	if fresh {
		m.records[guest] = r
	}
	m.running[guest] = d
	bg, stop := context.WithCancel(context.Background())
	d.cancel = stop
	go d.background(bg, fresh) // ended by Close
	return d, nil
}

// reserve claims a guest for a start and returns its record, a new one if it has none.
func (m *Manager) reserve(guest string) (r *record, fresh bool, err error) {
	if err := checkGuest(guest); err != nil {
		return nil, false, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, false, ErrClosed
	}
	if _, ok := m.running[guest]; ok {
		return nil, false, ErrRunning
	}
	if err := m.broken[guest]; err != nil {
		return nil, false, err
	}
	r, ok := m.records[guest]
	if !ok {
		if _, err := os.Lstat(m.guestDir(guest)); !errors.Is(err, os.ErrNotExist) {
			return nil, false, fmt.Errorf("%w: %s is there but is not in the inventory: it is not replaced", ErrState, m.guestDir(guest))
		}
		r = &record{Version: recordVersion, Guest: guest, Instance: m.nextInstance, key: keys.New()}
		m.nextInstance++
	}
	if r.revoked() {
		return nil, false, ErrRevoked
	}
	m.running[guest] = nil
	m.starting.Add(1)
	return r, !ok, nil
}

// Revoke has a guest's vTPM opened no more, from its next start on, or takes that back; it survives this manager. What runs is
// the caller's to end.
func (m *Manager) Revoke(guest string, revoked bool) error {
	if err := checkGuest(guest); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.records[guest]
	if r == nil {
		return fmt.Errorf("guest %s: %w", guest, ErrUnknown)
	}
	r.mu.Lock()
	was := r.Revoked
	r.Revoked = revoked
	r.mu.Unlock()
	if was == revoked {
		return nil
	}
	if err := m.save(r); err != nil {
		return fmt.Errorf("vTPM of guest %s: %w", guest, err)
	}
	return nil
}

// release forgets a device that was closed.
func (m *Manager) release(d *Device) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running[d.rec.Guest] == d {
		delete(m.running, d.rec.Guest)
	}
}

// forget drops a guest whose record could not be written.
func (m *Manager) forget(guest string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.records, guest)
}

// Remove destroys the vTPM of a guest that does not run, with everything sealed to it.
func (m *Manager) Remove(guest string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := checkGuest(guest); err != nil {
		return err
	}
	if _, ok := m.running[guest]; ok {
		return fmt.Errorf("vTPM of guest %s: %w", guest, ErrRunning)
	}
	err := m.discard(guest)
	if _, serr := os.Lstat(m.guestDir(guest)); errors.Is(serr, os.ErrNotExist) {
		delete(m.records, guest)
		delete(m.broken, guest)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("guest %s: %w", guest, ErrUnknown)
	case err != nil:
		return fmt.Errorf("vTPM of guest %s: %w", guest, err)
	}
	return nil
}

// An Entry is a line of the inventory.
type Entry struct {
	Guest         string // UUID
	Instance      int    // number of the vTPM on this host, never used twice while it is known
	EKCertificate []byte // DER; nil until it is manufactured
	AKName        []byte // TPM2B_NAME's contents; nil until it is manufactured
	Running       bool
	Err           error // why the record is refused; the fields above but Guest are empty then
}

// Inventory lists all vTPMs, by guest.
func (m *Manager) Inventory() []Entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Entry
	for g, r := range m.records {
		ek, ak := r.identity()
		out = append(out, Entry{Guest: g, Instance: r.Instance, EKCertificate: ek, AKName: ak, Running: m.running[g] != nil})
	}
	for g, err := range m.broken {
		out = append(out, Entry{Guest: g, Err: err})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Guest < out[j].Guest })
	return out
}

// Close ends all vTPMs in order, side by side, and gives the directory free. If ctx ends first
// they are killed.
func (m *Manager) Close(ctx context.Context) error {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.starting.Wait() // no start begins any more
	m.mu.Lock()
	var devices []*Device
	for _, d := range m.running {
		if d != nil {
			devices = append(devices, d)
		}
	}
	m.mu.Unlock()
	errs := make([]error, len(devices)+1)
	var wg sync.WaitGroup
	for i, d := range devices {
		wg.Go(func() { errs[i] = d.Close(ctx) })
	}
	wg.Wait()
	errs[len(devices)] = m.lock.Close()
	return errors.Join(errs...)
}
