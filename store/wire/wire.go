// Package wire is XenStore's wire format: a header of four little-endian 32-bit words (type,
// request id, transaction id, length) and at most 4096 bytes of payload
// (xen/include/public/io/xs_wire.h).
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Type of a message.
type Type uint32

const (
	Directory  Type = 1
	Read       Type = 2
	GetPerms   Type = 3
	Watch      Type = 4
	Unwatch    Type = 5
	Write      Type = 11
	Mkdir      Type = 12
	Remove     Type = 13
	SetPerms   Type = 14
	WatchEvent Type = 15
	Error      Type = 16
)

const (
	// HeaderSize is the length of a header in bytes.
	HeaderSize = 16
	// MaxPayload is XENSTORE_PAYLOAD_MAX.
	MaxPayload = 4096
	// MaxAbsPath is XENSTORE_ABS_PATH_MAX, MaxRelPath XENSTORE_REL_PATH_MAX.
	MaxAbsPath = 3072
	MaxRelPath = 2048
)

// ErrMessage says that the peer broke the format; the connection cannot be used further.
var ErrMessage = errors.New("store: bad message")

// A Message is one request, reply or event.
type Message struct {
	Type    Type
	Request uint32 // echoed in the reply
	Tx      uint32 // transaction, 0 for none
	Payload []byte
}

// ReadMessage reads one message. It returns io.EOF only between messages.
func ReadMessage(r io.Reader) (Message, error) {
	var h [HeaderSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: header cut off", ErrMessage)
		}
		return Message{}, err
	}
	m := Message{
		Type:    Type(binary.LittleEndian.Uint32(h[0:])),
		Request: binary.LittleEndian.Uint32(h[4:]),
		Tx:      binary.LittleEndian.Uint32(h[8:]),
	}
	n := binary.LittleEndian.Uint32(h[12:])
	if n > MaxPayload {
		return Message{}, fmt.Errorf("%w: length %d at offset 12, the most is %d", ErrMessage, n, MaxPayload)
	}
	m.Payload = make([]byte, n)
	if _, err := io.ReadFull(r, m.Payload); err != nil {
		return Message{}, fmt.Errorf("%w: payload of %d bytes cut off", ErrMessage, n)
	}
	return m, nil
}

// Append adds the encoding of m, whose payload must fit, to b.
func (m Message) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(m.Type))
	b = binary.LittleEndian.AppendUint32(b, m.Request)
	b = binary.LittleEndian.AppendUint32(b, m.Tx)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Payload)))
	return append(b, m.Payload...)
}

// Split cuts a payload into n NUL-terminated strings; the last may go without its NUL when
// rest is true (WRITE's value is raw).
func Split(payload []byte, n int, rest bool) ([]string, error) {
	var out []string
	off := 0
	for len(out) < n {
		if rest && len(out) == n-1 {
			return append(out, string(payload[off:])), nil
		}
		end := off
		for end < len(payload) && payload[end] != 0 {
			end++
		}
		if end == len(payload) {
			return nil, fmt.Errorf("%w: string %d at offset %d has no end", ErrMessage, len(out), off)
		}
		out = append(out, string(payload[off:end]))
		off = end + 1
	}
	if off != len(payload) {
		return nil, fmt.Errorf("%w: %d bytes too many at offset %d", ErrMessage, len(payload)-off, off)
	}
	return out, nil
}

// Join makes a payload of NUL-terminated strings.
func Join(s ...string) []byte {
	var b []byte
	for _, x := range s {
		b = append(append(b, x...), 0)
	}
	return b
}
