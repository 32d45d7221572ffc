// Package eventlog reads, writes and replays TCG event logs: the lists of measurements whose
// digests, extended one after another, give a TPM's PCR values.
//
// Formats: the SHA-1 log of the TCG PC Client Specific Implementation Specification for BIOS
// and the crypto-agile log of the TCG PC Client Platform Firmware Profile 1.05 §10.
package eventlog

import "github.com/google/go-tpm/tpm2"

// Event types used here (TCG PFP 1.05 §10.4.1, table 27).
const (
	TypeSeparator     uint32 = 0x00000004 // EV_SEPARATOR
	TypeSCRTMVersion  uint32 = 0x00000008 // EV_S_CRTM_VERSION
	TypePlatformFlags uint32 = 0x0000000a // EV_PLATFORM_CONFIG_FLAGS
	TypeIPL           uint32 = 0x0000000d // EV_IPL
	TypeNoAction      uint32 = 0x00000003 // EV_NO_ACTION
)

// A Digest is one hash of an event, of the bank that it extends.
type Digest struct {
	Algorithm tpm2.TPMAlgID
	Sum       []byte
}

// An Event is one entry of a log.
type Event struct {
	PCR     uint32 // 0–23
	Type    uint32
	Digests []Digest
	Data    []byte // what the type says: text, a structure, or nothing
}
