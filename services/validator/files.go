package validator

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/verdict"
)

// What lies in a guest's directory. Each file is replaced whole; a damaged one is an error, never taken for none.
const (
	fileBaseline = "baseline" // signed
	fileDraft    = "draft"
	filePin      = "pin.json"  // what the next baseline must not be behind
	fileLast     = "last.json" // the last verdict
)

func (m *Manager) dir(uuid string) string { return filepath.Join(m.Dir, uuid) }

// has reports whether a guest has such a file.
func (m *Manager) has(uuid, name string) bool {
	_, err := os.Stat(filepath.Join(m.dir(uuid), name))
	return err == nil
}

func (m *Manager) write(uuid, name string, b []byte) error {
	if err := os.MkdirAll(m.dir(uuid), 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(m.dir(uuid), name), b, 0o600)
}

// read reads a file of a guest's; nil for one that is not there.
func (m *Manager) read(uuid, name string, most int64) ([]byte, error) {
	path := filepath.Join(m.dir(uuid), name)
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil && st.Size() > most {
		err = fmt.Errorf("%s: %d bytes: the most is %d", path, st.Size(), most)
	}
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

// A pin is what a guest's baselines are held to beside their signature.
type pin struct {
	Signer  string `json:"signer"`  // whose signature the last one has
	Version uint64 `json:"version"` // of the last one: an older one is refused
}

func (m *Manager) pin(uuid string) (p pin, err error) {
	b, err := m.read(uuid, filePin, 64<<10)
	if err == nil && b != nil {
		if err = json.Unmarshal(b, &p); err != nil {
			err = fmt.Errorf("%s: damaged: %w: restore it from a backup", filepath.Join(m.dir(uuid), filePin), err)
		}
	}
	return p, err
}

// signers are the keys that a guest's baseline may be signed with: those of its spec, and where that has none the first that
// signed one.
func signers(v spec.Validation, p pin) (all []ed25519.PublicKey, err error) {
	names := v.Signers
	if len(names) == 0 && p.Signer != "" {
		names = []string{p.Signer}
	}
	for _, s := range names {
		k, err := baseline.ParsePublicKey([]byte(s))
		if err != nil {
			return nil, err
		}
		all = append(all, k)
	}
	return all, nil
}

// An accepted baseline is one that counts.
type accepted struct {
	*baseline.Baseline
	text   asked.Text // sealed
	sum    string     // SHA-256
	signer string
}

// baseline is a guest's baseline that counts; nil for none. The caller closes its text.
func (m *Manager) baseline(uuid string, v spec.Validation) (*accepted, error) {
	b, err := m.read(uuid, fileBaseline, baseline.MaxFile)
	if err != nil || b == nil {
		return nil, err
	}
	p, err := m.pin(uuid)
	if err != nil {
		return nil, err
	}
	keys, err := signers(v, p)
	if err != nil {
		return nil, err
	}
	base, err := baseline.Verify(b, keys, uuid, p.Version)
	if err != nil {
		return nil, fmt.Errorf("%w: sign another one (`redoubt baseline create`)", err)
	}
	a := &accepted{Baseline: base, sum: fmt.Sprintf("%x", sha256.Sum256(b)), signer: p.Signer}
	a.text.Size = len(b)
	if a.text.File, err = memfd.New("baseline", int64(len(b))); err != nil {
		return nil, err
	}
	if _, err := a.text.File.WriteAt(b, 0); err != nil {
		a.text.Close()
		return nil, err
	}
	return a, nil
}

// sign makes the draft, with the signature that is given, the guest's baseline.
func (m *Manager) sign(uuid string, v spec.Validation, signature []byte, signer string) (version uint64, err error) {
	draft, err := m.read(uuid, fileDraft, baseline.MaxFile)
	if err != nil {
		return 0, err
	}
	if draft == nil {
		return 0, errNoDraft
	}
	p, err := m.pin(uuid)
	if err != nil {
		return 0, err
	}
	keys, err := signers(v, p)
	if err != nil {
		return 0, err
	}
	key, err := baseline.ParsePublicKey([]byte(signer))
	if err != nil {
		return 0, rpc.Errorf(rpc.Invalid, "%v", err)
	}
	if len(keys) == 0 {
		keys = []ed25519.PublicKey{key}
	}
	mine := false
	for _, k := range keys {
		mine = mine || k.Equal(key)
	}
	if !mine {
		return 0, rpc.Errorf(rpc.Refused, "%s may not sign this guest's baseline: its spec's validation.signers says who may, and where that says nothing who signed the first", signer)
	}
	signed := append(draft, signature...)
	b, err := baseline.Verify(signed, []ed25519.PublicKey{key}, uuid, p.Version+1)
	if err == nil {
		err = b.Check()
	}
	if err != nil {
		return 0, rpc.Errorf(rpc.Refused, "%v", err)
	}
	// The baseline first: killed between the two, the pin is behind by one, and the next signature puts that right.
	if err := m.write(uuid, fileBaseline, signed); err != nil {
		return 0, err
	}
	text, err := json.Marshal(pin{baseline.FormatPublicKey(key), b.Version})
	if err != nil {
		return 0, err
	}
	if err := m.write(uuid, filePin, text); err != nil {
		return 0, err
	}
	return b.Version, os.Remove(filepath.Join(m.dir(uuid), fileDraft))
}

var errNoDraft = rpc.Errorf(rpc.NotFound, "there is no draft: `redoubt baseline create` makes one")

// last is the last verdict; nil for none.
func (m *Manager) last(uuid string) (*verdict.Report, error) {
	b, err := m.read(uuid, fileLast, 64<<20)
	if err != nil || b == nil {
		return nil, err
	}
	var r verdict.Report
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(m.dir(uuid), fileLast), err)
	}
	return &r, nil
}

// versions are those of the baseline and of the draft, 0 for none.
func (m *Manager) draftVersion(uuid string) (uint64, error) {
	b, err := m.read(uuid, fileDraft, baseline.MaxFile)
	if err != nil || b == nil {
		return 0, err
	}
	d, err := baseline.Open(b)
	if err != nil {
		return 0, err
	}
	return d.Version, nil
}
