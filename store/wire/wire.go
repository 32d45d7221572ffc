// Package wire is XenStore's wire format: a header of four little-endian 32-bit words (type,
// request id, transaction id, length) and at most 4096 bytes of payload
// (xen/include/public/io/xs_wire.h).
package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Type of a message.
type Type uint32

// The types of XenStore (xs_wire.h, enum xsd_sockmsg_type). A reply has its request's type, or
// Error.
const (
	Control            Type = 0
	Directory          Type = 1
	Read               Type = 2
	GetPerms           Type = 3
	Watch              Type = 4
	Unwatch            Type = 5
	TransactionStart   Type = 6
	TransactionEnd     Type = 7
	Introduce          Type = 8
	Release            Type = 9
	GetDomainPath      Type = 10
	Write              Type = 11
	Mkdir              Type = 12
	Remove             Type = 13
	SetPerms           Type = 14
	WatchEvent         Type = 15
	Error              Type = 16
	IsDomainIntroduced Type = 17
	Resume             Type = 18
	SetTarget          Type = 19
	ResetWatches       Type = 21
	DirectoryPart      Type = 22
)

var names = map[Type]string{
	Control: "CONTROL", Directory: "DIRECTORY", Read: "READ", GetPerms: "GET_PERMS", Watch: "WATCH",
	Unwatch: "UNWATCH", TransactionStart: "TRANSACTION_START", TransactionEnd: "TRANSACTION_END",
	Introduce: "INTRODUCE", Release: "RELEASE", GetDomainPath: "GET_DOMAIN_PATH", Write: "WRITE",
	Mkdir: "MKDIR", Remove: "RM", SetPerms: "SET_PERMS", WatchEvent: "WATCH_EVENT", Error: "ERROR",
	IsDomainIntroduced: "IS_DOMAIN_INTRODUCED", Resume: "RESUME", SetTarget: "SET_TARGET",
	ResetWatches: "RESET_WATCHES", DirectoryPart: "DIRECTORY_PART",
}

// String is the type's name in XenStore's protocol document.
func (t Type) String() string {
	if s, ok := names[t]; ok {
		return s
	}
	return fmt.Sprintf("type %d", uint32(t))
}

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
	out := make([]string, 0, n)
	off := 0
	for len(out) < n {
		if rest && len(out) == n-1 {
			return append(out, string(payload[off:])), nil
		}
		end := bytes.IndexByte(payload[off:], 0)
		if end < 0 {
			return nil, fmt.Errorf("%w: string %d at offset %d has no end", ErrMessage, len(out), off)
		}
		out = append(out, string(payload[off:off+end]))
		off += end + 1
	}
	if off != len(payload) {
		return nil, fmt.Errorf("%w: %d bytes too many at offset %d", ErrMessage, len(payload)-off, off)
	}
	return out, nil
}

// SplitAll cuts a payload into all its NUL-terminated strings; at least least of them.
func SplitAll(payload []byte, least int) ([]string, error) {
	n := bytes.Count(payload, []byte{0})
	if n < least {
		return nil, fmt.Errorf("%w: %d strings at offset 0, at least %d belong there", ErrMessage, n, least)
	}
	return Split(payload, n, false)
}

// Join makes a payload of NUL-terminated strings.
func Join(s ...string) []byte {
	var b []byte
	for _, x := range s {
		b = append(append(b, x...), 0)
	}
	return b
}
