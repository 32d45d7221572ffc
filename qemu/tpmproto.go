package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The control protocol of an emulated TPM, as QEMU's tpm-emulator back end speaks it: swtpm's
// tpm_ioctl.h. A request is a big-endian u32 command and a body whose length the command
// gives; a reply starts with a u32 result (GET_CAPABILITY: with the capabilities). QEMU sends
// the next request only after the reply.

// A controlCommand is the first word of a request.
type controlCommand uint32

const (
	cmdGetCapability       controlCommand = 0x01
	cmdInit                controlCommand = 0x02
	cmdShutdown            controlCommand = 0x03
	cmdGetEstablished      controlCommand = 0x04
	cmdSetLocality         controlCommand = 0x05
	cmdCancel              controlCommand = 0x09
	cmdStoreVolatile       controlCommand = 0x0a
	cmdResetEstablished    controlCommand = 0x0b
	cmdGetStateBlob        controlCommand = 0x0c
	cmdStop                controlCommand = 0x0e
	cmdSetDataFD           controlCommand = 0x10
	cmdSetBufferSize       controlCommand = 0x11
	tpmResultSuccess       uint32         = 0
	tpmResultBadLocality   uint32         = 0x3d // TPM_BAD_LOCALITY of TPM 1.2, what swtpm answers
	tpmResultFail          uint32         = 0x09 // TPM_FAIL
	tpmResultBadOrdinal    uint32         = 0x0a // TPM_BAD_ORDINAL
	controlHeader                         = 4
	controlMaxBody                        = 12
	bufferMin              uint32         = 128
	maxGuestLocality       uint8          = 3 // locality 4 is the platform's (PTP 1.05 §3.3)
	establishedReplyLength                = 8
)

// controlCapabilities: what QEMU requires of a TPM 2.0, and CANCEL. State blobs are not among
// them, so QEMU marks the guest as one that it cannot migrate: its TPM's state is the engine's.
const controlCapabilities = 1<<0 | // INIT
	1<<1 | // SHUTDOWN
	1<<2 | // GET_TPMESTABLISHED
	1<<3 | // SET_LOCALITY
	1<<5 | // CANCEL_TPM_CMD
	1<<7 | // RESET_TPMESTABLISHED
	1<<10 | // STOP
	1<<12 | // SET_DATAFD
	1<<13 // SET_BUFFERSIZE

// errControl says that QEMU broke the control protocol.
var errControl = errors.New("tpm control channel: bad request")

// bodyLength is the length of a command's body as QEMU sends it (it sends whole C unions).
func bodyLength(c controlCommand) (int, error) {
	switch c {
	case cmdGetCapability, cmdShutdown, cmdGetEstablished, cmdCancel, cmdStoreVolatile, cmdStop, cmdSetDataFD:
		return 0, nil
	case cmdInit, cmdSetLocality, cmdResetEstablished, cmdSetBufferSize:
		return 4, nil
	case cmdGetStateBlob:
		return controlMaxBody, nil
	}
	return 0, fmt.Errorf("%w: command %#x at offset 0", errControl, uint32(c))
}

// A controlRequest is one request: the command and the body, of the command's length.
type controlRequest struct {
	command controlCommand
	body    []byte
}

// parseControl takes the first request off buf and returns what follows it. A request that is
// not complete yet returns ok false; an unknown command is an error, for its end is unknown.
func parseControl(buf []byte) (req controlRequest, rest []byte, ok bool, err error) {
	if len(buf) < controlHeader {
		return controlRequest{}, buf, false, nil
	}
	c := controlCommand(binary.BigEndian.Uint32(buf))
	n, err := bodyLength(c)
	if err != nil {
		return controlRequest{}, buf, false, err
	}
	if len(buf) < controlHeader+n {
		return controlRequest{}, buf, false, nil
	}
	return controlRequest{c, buf[controlHeader : controlHeader+n]}, buf[controlHeader+n:], true, nil
}

// u32s is a reply of big-endian words.
func u32s(words ...uint32) []byte {
	var b []byte
	for _, w := range words {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return b
}

// TPM 2.0 Part 2 §6.9, §6.6.3: the answers this adapter gives in a TPM's place.
const (
	tagNoSessions = 0x8001
	rcFailure     = 0x101
	rcCommandSize = 0x142
	tpmHeader     = 10
)

// tpmError is a TPM response that carries only a response code.
func tpmError(code uint32) []byte {
	b := binary.BigEndian.AppendUint16(nil, tagNoSessions)
	b = binary.BigEndian.AppendUint32(b, tpmHeader)
	return binary.BigEndian.AppendUint32(b, code)
}

// checkCommand: a command is a header whose size field is the number of bytes sent. QEMU sends
// as many as the guest's header says, cut at the buffer size, so the guest decides both.
func checkCommand(cmd []byte) bool {
	return len(cmd) >= tpmHeader && uint64(binary.BigEndian.Uint32(cmd[2:])) == uint64(len(cmd))
}
