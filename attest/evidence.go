// Package attest checks the evidence of what a guest booted.
//
// Evidence is a quote by the guest's TPM, the registers and event logs behind it, the
// attestation key (AK) that signed it, and the certificate of the endorsement key (EK) that
// says whose TPM it is. [Verify] takes it through fixed steps, each resting on the one before,
// and stops at the first that fails; the [Report] says which step, and which register or event
// differs. A [Policy] says what is good.
//
// Everything in evidence is hostile until its step has passed.
package attest

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/attest/ima"
)

// Bounds of evidence.
const (
	PCRCount        = 24       // registers of a PC Client TPM (PTP 1.05)
	MaxEvidence     = 32 << 20 // bytes of evidence as JSON
	MaxLog          = 2 << 20  // bytes of one event log
	maxStructure    = 1 << 10  // bytes of a quote, a signature, a public area: a few hundred in practice
	maxCertificate  = 8 << 10  // bytes of a certificate
	maxIntermediate = 8        // certificates between the EK's and a root
	maxNonce        = 64       // bytes: TPM2B_DATA holds a digest
)

// Hex is bytes that JSON shows in hexadecimal, where base64 would hide what a person compares.
type Hex []byte

// MarshalText writes lower-case hexadecimal.
func (h Hex) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

// UnmarshalText reads hexadecimal of either case.
func (h *Hex) UnmarshalText(b []byte) error {
	v, err := hex.AppendDecode(nil, b)
	if err == nil {
		*h = v
	}
	return err
}

// Evidence is all that a verifier is given. In JSON, binary fields are base64 but for PCRs.
type Evidence struct {
	Guest string `json:"guest,omitempty"` // the guest's name, as the host says; proves nothing

	Quote     []byte `json:"quote"`     // TPMS_ATTEST (TPM 2.0 Part 2 §10.12.12) over all PCRs of the SHA-256 bank
	Signature []byte `json:"signature"` // TPMT_SIGNATURE (Part 2 §11.3.4)
	PCRs      []Hex  `json:"pcrs"`      // the SHA-256 bank, PCR 0 to 23, as at the time of the quote

	// EventLog is what the host measured. GuestLog is the log that the guest's own firmware and
	// boot loader wrote, where it has them: its events follow the host's.
	EventLog []byte `json:"event_log"`
	GuestLog []byte `json:"guest_log,omitempty"`

	AK            []byte   `json:"ak"`             // TPM2B_PUBLIC or TPMT_PUBLIC (Part 2 §12.2.4)
	EKCertificate []byte   `json:"ek_certificate"` // DER (TCG EK Credential Profile)
	EKChain       [][]byte `json:"ek_chain"`       // DER: issuers of the former; a hint, trusted for nothing

	IMA *ima.List `json:"ima,omitempty"` // nil: it was not asked for
}

// DecodeEvidence reads evidence as JSON, of at most MaxEvidence bytes. It checks the form
// alone: what the evidence is worth says [Verify].
func DecodeEvidence(r io.Reader) (*Evidence, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxEvidence+1))
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if len(b) > MaxEvidence {
		return nil, fmt.Errorf("evidence: over %d bytes", MaxEvidence)
	}
	var e Evidence
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return nil, fmt.Errorf("evidence: offset %d: %w", d.InputOffset(), err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("evidence: offset %d: more behind its end", d.InputOffset())
	}
	return &e, nil
}

// events reads both logs: the host's events, then the guest's.
func (e *Evidence) events() (events []eventlog.Event, host int, err error) {
	for _, l := range []struct {
		what string
		log  []byte
	}{{"host's", e.EventLog}, {"guest's", e.GuestLog}} {
		if l.what == "guest's" && len(l.log) == 0 {
			continue
		}
		if len(l.log) > MaxLog {
			return nil, 0, fmt.Errorf("the %s log has %d bytes: the most is %d", l.what, len(l.log), MaxLog)
		}
		more, err := eventlog.Parse(l.log)
		if err != nil {
			return nil, 0, fmt.Errorf("the %s log: %w", l.what, err)
		}
		events = append(events, more...)
		if l.what == "host's" {
			host = len(events)
		}
	}
	return events, host, nil
}
