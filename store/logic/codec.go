package logic

import (
	"encoding/binary"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// ErrAnswer says that what came from a worker is no answer to its request.
var ErrAnswer = errors.New("store: bad answer of a worker")

const (
	// requestHeader is a sequence number, the domain and the type, all little-endian.
	requestHeader = 8 + 4 + 4
	// MaxMessage bounds messages to and from a worker.
	MaxMessage = 16 << 10
)

// AppendRequest adds the message that asks a worker. The answer carries seq again.
func AppendRequest(b []byte, seq uint64, r Request) []byte {
	b = binary.LittleEndian.AppendUint64(b, seq)
	b = binary.LittleEndian.AppendUint32(b, uint32(r.Domain))
	b = binary.LittleEndian.AppendUint32(b, uint32(r.Type))
	return append(b, r.Payload...)
}

// ParseRequest is its inverse; the payload is a part of b.
func ParseRequest(b []byte) (seq uint64, r Request, err error) {
	if len(b) < requestHeader || len(b) > requestHeader+wire.MaxPayload {
		return 0, r, fmt.Errorf("%w: request of %d bytes", wire.ErrMessage, len(b))
	}
	return binary.LittleEndian.Uint64(b), Request{
		Domain:  tree.Domain(binary.LittleEndian.Uint32(b[8:])),
		Type:    wire.Type(binary.LittleEndian.Uint32(b[12:])),
		Payload: b[requestHeader:],
	}, nil
}

const (
	flagRelative = 1 << iota
	flagCommit
)

// AppendAnswer adds the message that answers a request: the sequence number, flags, three
// numbers, then strings, each after its length in 16 bits, permissions and words after their
// count.
func AppendAnswer(b []byte, seq uint64, a Action) []byte {
	b = binary.LittleEndian.AppendUint64(b, seq)
	var flags byte
	if a.Relative {
		flags |= flagRelative
	}
	if a.Commit {
		flags |= flagCommit
	}
	b = append(b, flags)
	for _, n := range []uint32{uint32(a.Domain), uint32(a.Target), a.Offset} {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	b = str(b, string(a.Errno))
	b = str(b, a.Path)
	b = str(b, a.Token)
	b = str(b, string(a.Value))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(a.Perms)))
	for _, p := range a.Perms {
		b = append(binary.LittleEndian.AppendUint32(b, uint32(p.Domain)), byte(p.Access))
	}
	b = binary.LittleEndian.AppendUint16(b, uint16(len(a.Words)))
	for _, w := range a.Words {
		b = str(b, w)
	}
	return b
}

func str(b []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint16(b, uint16(len(s))), s...)
}

// ParseAnswer is its inverse. Whatever it accepts it can make again, byte for byte.
func ParseAnswer(b []byte) (seq uint64, a Action, err error) {
	r := reader{b: b}
	seq = r.u64()
	flags := r.u8()
	a.Relative, a.Commit = flags&flagRelative != 0, flags&flagCommit != 0
	if flags&^(flagRelative|flagCommit) != 0 {
		r.fail("flags")
	}
	a.Domain, a.Target, a.Offset = tree.Domain(r.u32()), tree.Domain(r.u32()), r.u32()
	a.Errno = tree.Errno(r.bytes())
	a.Path = string(r.bytes())
	a.Token = string(r.bytes())
	if v := r.bytes(); len(v) > 0 {
		a.Value = append([]byte(nil), v...)
	}
	for n := r.u16(); n > 0 && r.err == nil; n-- {
		p := tree.Perm{Domain: tree.Domain(r.u32()), Access: tree.Access(r.u8())}
		if p.Access&^tree.Both != 0 {
			r.fail("access")
		}
		a.Perms = append(a.Perms, p)
	}
	for n := r.u16(); n > 0 && r.err == nil; n-- {
		a.Words = append(a.Words, string(r.bytes()))
	}
	if r.err == nil && r.off != len(b) {
		r.fail("bytes too many")
	}
	return seq, a, r.err
}

// reader reads until its first error.
type reader struct {
	b   []byte
	off int
	err error
}

func (r *reader) fail(what string) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s at offset %d of %d", ErrAnswer, what, r.off, len(r.b))
	}
}

var zeros [8]byte

func (r *reader) take(n int) []byte {
	if r.err != nil || len(r.b)-r.off < n {
		r.fail("cut off")
		return zeros[:min(n, 8)]
	}
	r.off += n
	return r.b[r.off-n : r.off]
}

func (r *reader) u8() byte    { return r.take(1)[0] }
func (r *reader) u16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

func (r *reader) bytes() []byte {
	n := int(r.u16())
	if r.err != nil {
		return nil
	}
	b := r.take(n)
	if r.err != nil {
		return nil
	}
	return b
}
