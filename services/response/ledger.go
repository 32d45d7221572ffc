// Package response is the ledger of what is in force against guests that are not what they should be.
//
// It outlives the Builder and the host: a change is on the disk before it is in force, so a guest that was
// quarantined, or whose attestation was revoked, is so after whatever ends meanwhile. A damaged file is refused, never
// replaced. Who may change what is the caller's to say, and so is carrying it out: the ledger only remembers.
package response

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/renameio/v2"
	"github.com/google/uuid"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/spec"
)

// LedgerFile is the ledger's name in the state directory.
const LedgerFile = "responses.json"

// Limits.
const (
	MaxGuests = 1024 // that something is in force against
	MaxReason = 512  // bytes
	MaxBy     = 128  // bytes

	maxFile = 2 << 20 // bytes: more than as many guests need
)

// A Record is what is in force against a guest.
type Record struct {
	Name           string    `json:"name"`   // the guest's
	Tenant         string    `json:"tenant"` // whose it is
	Quarantined    bool      `json:"quarantined,omitempty"`
	Paused         bool      `json:"paused,omitempty"`
	Revoked        bool      `json:"revoked,omitempty"`
	DevicesDropped bool      `json:"devicesDropped,omitempty"`
	Restricted     bool      `json:"restricted,omitempty"` // its tenant's guests are not started
	Reason         string    `json:"reason,omitempty"`     // one line, up to MaxReason bytes
	Since          time.Time `json:"since"`                // when it last changed, in UTC
	By             string    `json:"by"`                   // one line, up to MaxBy bytes, such as "operator 0" or "validation v3"
}

// InForce reports whether anything is.
func (r Record) InForce() bool {
	return r.Quarantined || r.Paused || r.Revoked || r.DevicesDropped || r.Restricted
}

// check refuses what cannot be meant.
func (r Record) check() error {
	switch {
	case !spec.ValidName(r.Name):
		return fmt.Errorf("name %.80q is no guest's", r.Name)
	case !spec.ValidName(r.Tenant):
		return fmt.Errorf("tenant %.80q is none", r.Tenant)
	case !line(r.Reason, MaxReason):
		return fmt.Errorf("reason: use one line of up to %d bytes", MaxReason)
	case r.By == "" || !line(r.By, MaxBy):
		return fmt.Errorf("by: use one line of 1 to %d bytes", MaxBy)
	case r.Since.IsZero() || r.Since.Year() > 9999 || r.Since.Year() < 1:
		return errors.New("since: no time is given")
	}
	return nil
}

// line reports whether a text can be shown as one.
func line(s string, most int) bool {
	if len(s) > most || !utf8.ValidString(s) {
		return false
	}
	for _, c := range s {
		if !unicode.IsPrint(c) {
			return false
		}
	}
	return true
}

// A Guest is one with something in force against it.
type Guest struct {
	UUID string
	Record
}

// A Ledger is the file, and its contents. Its methods may be called concurrently.
type Ledger struct {
	path string

	mu     sync.Mutex
	guests map[string]Record // by UUID
}

// Open reads the ledger; where no file is, nothing is in force.
func Open(path string) (*Ledger, error) {
	l := &Ledger{path: path, guests: map[string]Record{}}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if l.guests, err = parse(b); err != nil {
		return nil, fmt.Errorf("%s: damaged: %w: restore it from a backup; without it nobody knows which guests are quarantined or revoked", path, err)
	}
	return l, nil
}

// Get is what is in force against a guest; false: nothing.
func (l *Ledger) Get(uuid string) (Record, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r, ok := l.guests[uuid]
	return r, ok
}

// All are the guests with something in force against them, by tenant and name.
func (l *Ledger) All() []Guest {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]Guest, 0, len(l.guests))
	for id, r := range l.guests {
		all = append(all, Guest{id, r})
	}
	slices.SortFunc(all, func(a, b Guest) int {
		return cmp.Or(cmp.Compare(a.Tenant, b.Tenant), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UUID, b.UUID))
	})
	return all
}

// Change has f change what is in force against a guest: it gets the record, or a zero one. The change is on the disk
// when Change returns nil. Otherwise it is not in force here, and where the error is of the disk, the next Open may find
// either. A record with nothing in force is forgotten. f must not call the ledger; it sets Since and By itself. What
// cannot be meant is an error of kind rpc.Invalid, one guest more than MaxGuests rpc.Unavailable.
func (l *Ledger) Change(uuid string, f func(*Record)) error {
	if err := checkUUID(uuid); err != nil {
		return rpc.Errorf(rpc.Invalid, "%v", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	was, had := l.guests[uuid]
	r := was
	f(&r)
	switch {
	case !r.InForce():
		return l.remove(uuid)
	case !had && len(l.guests) >= MaxGuests:
		return rpc.Errorf(rpc.Unavailable, "responses are in force against %d guests already: release or remove some", MaxGuests)
	}
	r.Since = r.Since.UTC().Round(0) // as it is read back
	if err := r.check(); err != nil {
		return rpc.Errorf(rpc.Invalid, "guest %s: %v", uuid, err)
	}
	next := maps.Clone(l.guests)
	next[uuid] = r
	return l.write(next)
}

// Remove forgets a guest that is deleted. One that is not there is no error.
func (l *Ledger) Remove(uuid string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.remove(uuid)
}

// remove does it; l.mu is held.
func (l *Ledger) remove(uuid string) error {
	if _, ok := l.guests[uuid]; !ok {
		return nil
	}
	next := maps.Clone(l.guests)
	delete(next, uuid)
	return l.write(next)
}

// write makes next the contents, on the disk first. l.mu is held.
func (l *Ledger) write(next map[string]Record) error {
	b, err := encode(next)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(l.path, b, 0o600); err != nil {
		return err
	}
	// Else the host's crash could bring the last file back, and let a guest out of its quarantine.
	dir, err := os.Open(filepath.Dir(l.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return err
	}
	l.guests = next
	return nil
}

// The file.

const ledgerVersion = 1

type ledgerFile struct {
	Version int               `json:"version"`
	Guests  map[string]Record `json:"guests"`
}

func encode(guests map[string]Record) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // six bytes for one would be more than maxFile
	e.SetIndent("", "  ")
	err := e.Encode(ledgerFile{ledgerVersion, guests})
	return b.Bytes(), err
}

// parse takes only what encode gives: names that are there twice, or unknown, or spelt otherwise would mean something else to
// the next reader.
func parse(b []byte) (map[string]Record, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("more than %d bytes", maxFile)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var f ledgerFile
	if err := d.Decode(&f); err != nil {
		return nil, fmt.Errorf("at byte %d: %w", d.InputOffset(), err)
	}
	switch {
	case f.Version != ledgerVersion:
		return nil, fmt.Errorf("version %d, this program knows %d", f.Version, ledgerVersion)
	case f.Guests == nil:
		return nil, errors.New("no guests")
	case len(f.Guests) > MaxGuests:
		return nil, fmt.Errorf("%d guests, at most %d", len(f.Guests), MaxGuests)
	}
	for id, r := range f.Guests {
		if err := checkUUID(id); err != nil {
			return nil, err
		}
		if err := r.check(); err != nil {
			return nil, fmt.Errorf("guest %s: %w", id, err)
		}
		if !r.InForce() {
			return nil, fmt.Errorf("guest %s: nothing is in force against it", id)
		}
	}
	again, err := encode(f.Guests)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, fmt.Errorf("at byte %d: it was not written by this program", differ(again, b))
	}
	return f.Guests, nil
}

// differ is where two texts first do.
func differ(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// checkUUID takes the one form that guests' UUIDs have here.
func checkUUID(s string) error {
	if u, err := uuid.Parse(s); err != nil || u.String() != s {
		return fmt.Errorf("%.60q is no guest's UUID", s)
	}
	return nil
}
