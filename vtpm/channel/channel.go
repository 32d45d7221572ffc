// Package channel is the TPM data channel: how an emulator (the vTPM front end) reaches the
// vTPM back end of its guest, one frame per SOCK_SEQPACKET message.
//
// The front end sends Command frames, one at a time; the back end answers each with one Reply
// or one Failed. The back end does not read the first command before the gate opens, so a
// command sent early simply waits: that wait is the whole of the guest's sleep (step 7 of
// the adaptive start). When the gate opens the back end sends one Open frame, unasked, before
// any reply; a front end that cannot wait inside the exit (QEMU) resumes its guest on it.
// Failed is final: the guest's vTPM will not answer again and the guest must be failed closed.
//
// A back end may be killed and replaced at any moment, with the channel as it is. Commands have
// numbers and a reply has its command's; the new back end says Again, upon which the command that has
// no reply is sent once more. So each may come twice: a back end answers a number it has answered
// with the same reply, a front end drops a reply to what it does not wait for. A second Open
// changes nothing.
//
// The emulator faces the guest and is not trusted: the back end checks every frame again.
package channel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"redoubt.dev/redoubt/ipc"
)

// MaxCommand is the largest TPM command or response in bytes (TCG PC Client PTP 1.05 §6.5.3:
// a CRB of one page; libtpms' own limit is the same).
const MaxCommand = 4096

// MaxLog is the largest event log in bytes that an Open frame carries.
const MaxLog = 32 << 10

// Kind is the type of a frame, its first byte.
type Kind byte

const (
	Command Kind = 1 // front → back: locality, then the command
	Reply   Kind = 2 // back → front: the response
	Open    Kind = 3 // back → front: the gate is open (VTPMReady); the event log
	Failed  Kind = 4 // back → front: the reason, as text
	Again   Kind = 5 // back → front: a new back end asks for the command that has no reply
)

func (k Kind) String() string {
	switch k {
	case Command:
		return "command"
	case Reply:
		return "reply"
	case Open:
		return "open"
	case Failed:
		return "failed"
	case Again:
		return "again"
	}
	return fmt.Sprintf("kind %d", byte(k))
}

// header is the length of a frame's header: kind, locality, number (little-endian).
const header = 6

// minCommand is a TPM header: tag, size, code (TPM 2.0 Part 1 §18).
const minCommand = 10

// ErrFrame says that the peer broke the protocol.
var ErrFrame = errors.New("tpm channel: bad frame")

// A Frame is one message.
type Frame struct {
	Kind     Kind
	Locality uint8  // of a Command
	Seq      uint32 // of a Command, from 1 on, each one more than the last; of its Reply
	Data     []byte // command, response, event log, or reason
}

// Parse checks one message. Data aliases msg.
func Parse(msg []byte) (Frame, error) {
	if len(msg) < header {
		return Frame{}, fmt.Errorf("%w: %d bytes, header is %d", ErrFrame, len(msg), header)
	}
	f := Frame{Kind: Kind(msg[0]), Locality: msg[1], Seq: binary.LittleEndian.Uint32(msg[2:]), Data: msg[header:]}
	switch f.Kind {
	case Command, Reply:
		if len(f.Data) < minCommand || len(f.Data) > MaxCommand {
			return Frame{}, fmt.Errorf("%w: %v of %d bytes at offset %d", ErrFrame, f.Kind, len(f.Data), header)
		}
	case Open:
		if len(f.Data) > MaxLog {
			return Frame{}, fmt.Errorf("%w: event log of %d bytes at offset %d", ErrFrame, len(f.Data), header)
		}
	case Failed:
		if len(f.Data) > MaxCommand {
			return Frame{}, fmt.Errorf("%w: reason of %d bytes at offset %d", ErrFrame, len(f.Data), header)
		}
	case Again:
		if len(f.Data) != 0 {
			return Frame{}, fmt.Errorf("%w: %v of %d bytes at offset %d", ErrFrame, f.Kind, len(f.Data), header)
		}
	default:
		return Frame{}, fmt.Errorf("%w: %v at offset 0", ErrFrame, f.Kind)
	}
	if f.Kind != Command && f.Locality != 0 {
		return Frame{}, fmt.Errorf("%w: %v with locality %d at offset 1", ErrFrame, f.Kind, f.Locality)
	}
	if numbered := f.Kind == Command || f.Kind == Reply; numbered != (f.Seq != 0) {
		return Frame{}, fmt.Errorf("%w: %v with number %d at offset 2", ErrFrame, f.Kind, f.Seq)
	}
	return f, nil
}

// Append adds the frame's encoding to b.
func (f Frame) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(append(b, byte(f.Kind), f.Locality), f.Seq)
	return append(b, f.Data...)
}

// Conn carries frames. Concurrent sends are safe; one goroutine receives.
type Conn struct {
	c   *ipc.Conn
	buf [header + MaxLog + 1]byte
}

// New takes over an ipc connection.
func New(c *ipc.Conn) *Conn { return &Conn{c: c} }

// FromFile takes over an inherited descriptor.
func FromFile(f *os.File) (*Conn, error) {
	c, err := ipc.FromFile(f)
	if err != nil {
		return nil, err
	}
	return New(c), nil
}

// Send sends one frame.
func (c *Conn) Send(f Frame) error {
	return c.c.Send(f.Append(make([]byte, 0, header+len(f.Data))))
}

// Receive waits for one frame; io.EOF when the peer is gone. Data is valid until the next
// Receive. Descriptors that come along are closed: none belong here.
func (c *Conn) Receive() (Frame, error) {
	n, files, err := c.c.ReceiveInto(c.buf[:])
	if err != nil {
		return Frame{}, err
	}
	for _, f := range files {
		f.Close()
	}
	return Parse(c.buf[:n])
}

// Close ends the channel and unblocks Receive. The peer sees the end, too, where somebody keeps a
// copy of this end for the case that this process is killed.
func (c *Conn) Close() error {
	_ = c.c.Shutdown() // closed already, or the peer is gone
	return c.c.Close()
}
