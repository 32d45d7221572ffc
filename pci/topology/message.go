package topology

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// maxMessage bounds a request or a topology in bytes: one of all slots has less than half of it.
const maxMessage = 8 << 10

// decode reads one JSON value of fields that are known.
func decode(b []byte, v any) error {
	if len(b) > maxMessage {
		return fmt.Errorf("pci: a message of %d bytes: the most is %d", len(b), maxMessage)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("pci: message at byte %d: %w", d.InputOffset(), err)
	}
	return nil
}

// UnmarshalJSON reads a request and checks it.
func (r *Request) UnmarshalJSON(b []byte) error {
	type plain Request
	var p plain
	if err := decode(b, &p); err != nil {
		return err
	}
	if err := Request(p).Check(); err != nil {
		return err
	}
	*r = Request(p)
	return nil
}

// UnmarshalJSON reads a topology and checks it.
func (t *Topology) UnmarshalJSON(b []byte) error {
	type plain Topology
	var p plain
	if err := decode(b, &p); err != nil {
		return err
	}
	if err := Topology(p).Check(); err != nil {
		return err
	}
	*t = Topology(p)
	return nil
}
