package engine

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/google/go-tpm/tpm2"
)

// MaxMessage is the largest command or response in bytes: libtpms' own limit, and one page of
// a CRB (TCG PC Client PTP 1.05 §6.5.3).
const MaxMessage = 4096

// headerSize is the length of a TPM header: tag, size, code (TPM 2.0 Part 1 §18).
const headerSize = 10

// Command codes the package sends or looks for (TPM 2.0 Part 2 §6.5.2).
const (
	ccStartup  = uint32(tpm2.TPMCCStartup)
	ccShutdown = uint32(tpm2.TPMCCShutdown)
)

// rcBadTag is TPM_RC_BAD_TAG (Part 2 §6.6.3), which package tpm2 does not name.
const rcBadTag tpm2.TPMRC = 0x01e

// refuse checks a command's header and returns the response a TPM gives to a malformed one, or
// nil. The check is not only manners: swtpm takes bytes that begin with 00 00 00 08 for a
// prefix of its own that carries a locality, so a guest that may send any bytes may choose
// its locality.
func refuse(cmd []byte) []byte {
	switch {
	case len(cmd) < headerSize || len(cmd) > MaxMessage,
		int64(binary.BigEndian.Uint32(cmd[2:])) != int64(len(cmd)):
		return ErrorResponse(tpm2.TPMRCCommandSize)
	}
	switch tpm2.TPMST(binary.BigEndian.Uint16(cmd)) {
	case tpm2.TPMSTNoSessions, tpm2.TPMSTSessions:
		return nil
	}
	return ErrorResponse(rcBadTag)
}

// ErrorResponse is the response of a TPM that refuses a command with rc (Part 1 §18.10). For
// TPM_RC_BAD_TAG the tag is the one of TPM 1.2, as the specification asks.
func ErrorResponse(rc tpm2.TPMRC) []byte {
	tag := uint16(tpm2.TPMSTNoSessions)
	if rc == rcBadTag {
		tag = uint16(tpm2.TPMSTRspCommand)
	}
	b := binary.BigEndian.AppendUint16(nil, tag)
	b = binary.BigEndian.AppendUint32(b, headerSize)
	return binary.BigEndian.AppendUint32(b, uint32(rc))
}

// CommandCode is the code of a command, 0 where it is too short to have one.
func CommandCode(cmd []byte) tpm2.TPMCC {
	if len(cmd) < headerSize {
		return 0
	}
	return tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:]))
}

// ResponseCode is the code of a response that Execute returned.
func ResponseCode(rsp []byte) tpm2.TPMRC {
	if len(rsp) < headerSize {
		return tpm2.TPMRCFailure
	}
	return tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:]))
}

// readResponse reads one response: its header first, then what the header's size leaves. The
// channel is a stream and may split it anywhere.
func readResponse(r io.Reader) ([]byte, error) {
	var h [headerSize]byte
	if n, err := io.ReadFull(r, h[:]); err != nil {
		return nil, fmt.Errorf("response ends at offset %d of its header: %w", n, noEOF(err))
	}
	tag := binary.BigEndian.Uint16(h[:])
	switch tpm2.TPMST(tag) {
	case tpm2.TPMSTNoSessions, tpm2.TPMSTSessions, tpm2.TPMSTRspCommand:
	default:
		return nil, fmt.Errorf("response with tag %#04x at offset 0", tag)
	}
	size := binary.BigEndian.Uint32(h[2:])
	if size < headerSize || size > MaxMessage {
		return nil, fmt.Errorf("response of %d bytes at offset 2, may have %d to %d", size, headerSize, MaxMessage)
	}
	b := make([]byte, size)
	copy(b, h[:])
	if n, err := io.ReadFull(r, b[headerSize:]); err != nil {
		return nil, fmt.Errorf("response of %d bytes ends at offset %d: %w", size, headerSize+n, noEOF(err))
	}
	return b, nil
}

// shortCommand is a command without sessions whose only parameter is a 16-bit TPM_SU.
func shortCommand(cc uint32, su tpm2.TPMSU) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	b = binary.BigEndian.AppendUint32(b, headerSize+2)
	b = binary.BigEndian.AppendUint32(b, cc)
	return binary.BigEndian.AppendUint16(b, uint16(su))
}
