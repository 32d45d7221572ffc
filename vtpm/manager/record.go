package manager

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"redoubt.dev/redoubt/vtpm/keys"
)

const (
	managerVersion = 1
	recordVersion  = 1
	maxSaved       = 64 << 10 // bytes of manager.json or guest.json
)

// A record is the saved data of a guest. The wrapped key is bound to all other fields, so that
// none of them can be altered or swapped.
type record struct {
	Version  int    `json:"version"`
	Guest    string `json:"guest"`
	Instance int    `json:"instance"`
	// Set by manufacture, all at once.
	EKCertificate []byte `json:"ek_certificate,omitempty"` // DER
	EKName        []byte `json:"ek_name,omitempty"`        // Part 1 §16
	AK            []byte `json:"ak,omitempty"`             // TPMT_PUBLIC
	AKName        []byte `json:"ak_name,omitempty"`
	// Revoked says that the key is given to no engine any more. It is bound to the key as all other fields are.
	Revoked    bool   `json:"revoked,omitempty"`
	WrappedKey []byte `json:"wrapped_key,omitempty"`

	mu  sync.Mutex // guards the fields that change
	key [keys.Size]byte
}

// identity is the EK's certificate and the AK's name, nil before manufacture.
func (r *record) identity() (ekCert, akName []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.EKCertificate, r.AKName
}

// manufactured says whether the record has its identity.
func (r *record) manufactured() bool {
	ek, _ := r.identity()
	return ek != nil
}

// revoked says whether the vTPM was revoked.
func (r *record) revoked() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.Revoked
}

// setIdentity records the outcome of manufacture.
func (r *record) setIdentity(ekCert, ekName, ak, akName []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.EKCertificate, r.EKName, r.AK, r.AKName = ekCert, ekName, ak, akName
}

// context is what the key is bound to: all fields but itself, in their encoded form.
func (r *record) context() ([]byte, error) {
	wrapped := r.WrappedKey
	r.WrappedKey = nil
	b, err := json.Marshal(r)
	r.WrappedKey = wrapped
	return append([]byte("guest record "), b...), err
}

// encode wraps the key and gives the file's contents.
func (r *record) encode(root *keys.Root) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.context()
	if err != nil {
		return nil, err
	}
	r.WrappedKey = root.Wrap(r.key[:], c)
	return encodeJSON(r)
}

// parseRecord reads a guest's record and opens its key.
func parseRecord(b []byte, guest string, root *keys.Root) (*record, error) {
	r := new(record)
	if err := decodeJSON(b, r); err != nil {
		return nil, err
	}
	switch {
	case r.Version != recordVersion:
		return nil, fmt.Errorf("version %d, this program reads %d", r.Version, recordVersion)
	case r.Guest != guest:
		return nil, fmt.Errorf("it is of guest %q", r.Guest)
	case r.Instance < 1:
		return nil, fmt.Errorf("instance %d", r.Instance)
	}
	c, err := r.context()
	if err != nil {
		return nil, err
	}
	key, err := root.Unwrap(r.WrappedKey, c)
	if err != nil {
		return nil, err
	}
	if len(key) != keys.Size {
		return nil, fmt.Errorf("key of %d bytes, must be %d", len(key), keys.Size)
	}
	copy(r.key[:], key)
	has := 0
	for _, f := range [][]byte{r.EKCertificate, r.EKName, r.AK, r.AKName} {
		if len(f) > 0 {
			has++
		}
	}
	if has != 0 && has != 4 {
		return nil, fmt.Errorf("%d of 4 fields of the identity", has)
	}
	return r, nil
}

func encodeJSON(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	return append(b, '\n'), err
}

// decodeJSON reads one value and nothing else; errors name the offset.
func decodeJSON(b []byte, v any) error {
	if len(b) > maxSaved {
		return fmt.Errorf("%d bytes, at most %d are read", len(b), maxSaved)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return fmt.Errorf("offset %d: %w", syntax.Offset, err)
		}
		return fmt.Errorf("offset %d: %w", d.InputOffset(), err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("offset %d: more than one value", d.InputOffset())
	}
	return nil
}
