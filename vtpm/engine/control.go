package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// The control channel of swtpm (its tpm_ioctl.h): a request is a big-endian command number and
// a body; the reply begins with a big-endian TPM_RESULT and has a body only where that is zero.
type ctlCommand uint32

const (
	ctlGetCapability ctlCommand = 0x01
	ctlInit          ctlCommand = 0x02
	ctlShutdown      ctlCommand = 0x03
	ctlSetLocality   ctlCommand = 0x05
	ctlStop          ctlCommand = 0x0e
	ctlSetDataFD     ctlCommand = 0x10
)

func (c ctlCommand) String() string {
	switch c {
	case ctlGetCapability:
		return "GET_CAPABILITY"
	case ctlInit:
		return "INIT"
	case ctlShutdown:
		return "SHUTDOWN"
	case ctlSetLocality:
		return "SET_LOCALITY"
	case ctlStop:
		return "STOP"
	case ctlSetDataFD:
		return "SET_DATAFD"
	}
	return fmt.Sprintf("control command %#x", uint32(c))
}

// Capability bits of CMD_GET_CAPABILITY that the engine needs.
const (
	capInit        = 1 << 0
	capShutdown    = 1 << 1
	capSetLocality = 1 << 4
	capStop        = 1 << 10
	capSetDataFD   = 1 << 12

	capNeeded = capInit | capShutdown | capSetLocality | capStop | capSetDataFD
)

// A resultError is a TPM_RESULT other than zero that the control channel answered with.
type resultError struct {
	command ctlCommand
	result  uint32
}

func (e *resultError) Error() string {
	return fmt.Sprintf("%v answered TPM_RESULT %#x", e.command, e.result)
}

// readReply reads one control reply with a body of n bytes after the result. swtpm may split
// a reply anywhere; a reply that fails ends after its result.
func readReply(r io.Reader, c ctlCommand, n int) ([]byte, error) {
	b := make([]byte, 4+n)
	if got, err := io.ReadFull(r, b[:4]); err != nil {
		return nil, fmt.Errorf("%v: reply ends at offset %d: %w", c, got, noEOF(err))
	}
	if result := binary.BigEndian.Uint32(b); result != 0 {
		return nil, &resultError{c, result}
	}
	if got, err := io.ReadFull(r, b[4:]); err != nil {
		return nil, fmt.Errorf("%v: reply ends at offset %d: %w", c, 4+got, noEOF(err))
	}
	return b[4:], nil
}

// noEOF keeps an early end from looking like an orderly one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// control is the client of a control channel. It is not safe for concurrent use.
type control struct {
	conn *net.UnixConn
}

// do sends one request, with descriptors, and returns the reply's body of n bytes.
func (c *control) do(limit time.Time, cmd ctlCommand, body []byte, n int, fds ...int) ([]byte, error) {
	msg := binary.BigEndian.AppendUint32(nil, uint32(cmd))
	msg = append(msg, body...)
	if err := c.conn.SetDeadline(limit); err != nil {
		return nil, fmt.Errorf("%v: %w", cmd, err)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	if _, _, err := c.conn.WriteMsgUnix(msg, rights, nil); err != nil {
		return nil, fmt.Errorf("%v: %w", cmd, err)
	}
	return readReply(c.conn, cmd, n)
}

// settle brings the channel to where no reply is under way, after SET_LOCALITY was or was not sent.
// What the engine has not read yet was sent, and has one reply. Else there may be one: what is
// asked then is told from it, because the capabilities are never zero and that result was.
func (c *control) settle(limit time.Time) error {
	if err := c.conn.SetDeadline(limit); err != nil {
		return err
	}
	sent, err := unread(c.conn)
	if err != nil {
		return err
	}
	if sent {
		_, err := readReply(c.conn, ctlSetLocality, 0)
		return err
	}
	caps, err := c.capability(limit)
	if err != nil || caps != 0 {
		return err
	}
	// That was the old reply and the new one's result: the capabilities come.
	var b [4]byte
	if n, err := io.ReadFull(c.conn, b[:]); err != nil {
		return fmt.Errorf("%v: reply ends at offset %d: %w", ctlGetCapability, 4+n, noEOF(err))
	}
	if binary.BigEndian.Uint32(b[:]) == 0 {
		return fmt.Errorf("%v: out of step", ctlGetCapability)
	}
	return nil
}

// capability asks which control commands the engine knows.
func (c *control) capability(limit time.Time) (uint32, error) {
	b, err := c.do(limit, ctlGetCapability, nil, 4)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b), nil
}
