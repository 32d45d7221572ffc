package journal

import (
	"encoding/binary"
	"fmt"
)

// State is how far a command has come.
type State uint32

const (
	Idle      State = iota
	Executing       // it was sent, or was about to be
	Answered        // its response is here
	Split           // a part of its response was taken from the socket: nobody can go on from that
)

// A Slot is one party's last command.
type Slot struct{ mem []byte }

// Offsets in a slot.
const (
	slotState    = 0
	slotSeq      = 4
	slotLocality = 8
	slotCommand  = 12 // lengths, then the bytes
	slotResponse = 16
	slotBytes    = 20
	slotSize     = slotBytes + 2*MaxMessage
)

func (s Slot) u32(at int) uint32       { return binary.LittleEndian.Uint32(s.mem[at:]) }
func (s Slot) setU32(at int, v uint32) { binary.LittleEndian.PutUint32(s.mem[at:], v) }

func (s Slot) check(at int) error {
	if v := s.u32(slotState); v > uint32(Split) {
		return fmt.Errorf("%w: state %d at offset %d", ErrJournal, v, at+slotState)
	}
	if v := s.u32(slotLocality); v > 3 {
		return fmt.Errorf("%w: locality %d at offset %d", ErrJournal, v, at+slotLocality)
	}
	for _, o := range [...]int{slotCommand, slotResponse} {
		if v := s.u32(o); v > MaxMessage {
			return fmt.Errorf("%w: message of %d bytes at offset %d", ErrJournal, v, at+o)
		}
	}
	return nil
}

func (s Slot) under() bool { return s.State() == Executing || s.State() == Split }

// State of the command.
func (s Slot) State() State { return State(s.u32(slotState)) }

// Seq is its sender's number for it; 0 before the first.
func (s Slot) Seq() uint32 { return s.u32(slotSeq) }

// Locality that it is at.
func (s Slot) Locality() uint8 { return uint8(s.u32(slotLocality)) }

// Command is a copy of its bytes.
func (s Slot) Command() []byte {
	return append([]byte(nil), s.mem[slotBytes:][:s.u32(slotCommand)]...)
}

// Response is a copy of its response's bytes.
func (s Slot) Response() []byte {
	return append([]byte(nil), s.mem[slotBytes+MaxMessage:][:s.u32(slotResponse)]...)
}

// Execute is told before a command of at most MaxMessage bytes is sent.
func (s Slot) Execute(seq uint32, locality uint8, command []byte) {
	s.setU32(slotState, uint32(Idle))
	s.setU32(slotSeq, seq)
	s.setU32(slotLocality, uint32(locality))
	s.setU32(slotCommand, uint32(copy(s.mem[slotBytes:][:MaxMessage], command)))
	s.setU32(slotResponse, 0)
	s.setU32(slotState, uint32(Executing))
}

// Answer is told before a response of at most MaxMessage bytes is taken from the socket.
func (s Slot) Answer(response []byte) {
	s.setU32(slotResponse, uint32(copy(s.mem[slotBytes+MaxMessage:][:MaxMessage], response)))
	s.setU32(slotState, uint32(Answered))
}

// Splits is told before a part of a response is taken.
func (s Slot) Splits() { s.setU32(slotState, uint32(Split)) }

// An Exchange is a command of the host and its response.
type Exchange struct{ Command, Response []byte }

// exchangeHead is what comes before an exchange: the command's number and both lengths.
const exchangeHead = 8

// BeginTurn begins a sequence of the host's.
func (j *Journal) BeginTurn() {
	j.setU32(atTurn+4, j.Host.Seq())
	j.setU32(atTurn, 0)
}

// Noted is told of the host's last command, and keeps it if it counts; false if there is no room.
func (j *Journal) Noted(counts bool, x Exchange) bool {
	if counts {
		n := j.u32(atTurn)
		need := exchangeHead + len(x.Command) + len(x.Response)
		if need > maxTurn-int(n) {
			return false
		}
		b := j.mem[atTurn+8+int(n):][:need]
		binary.LittleEndian.PutUint32(b, j.Host.Seq())
		binary.LittleEndian.PutUint16(b[4:], uint16(len(x.Command)))
		binary.LittleEndian.PutUint16(b[6:], uint16(len(x.Response)))
		copy(b[exchangeHead:], x.Command)
		copy(b[exchangeHead+len(x.Command):], x.Response)
		j.setU32(atTurn, n+uint32(need))
	}
	j.setU32(atTurn+4, j.Host.Seq())
	return true
}

// Turn are the exchanges of the host's sequence that was under way or was the last one, with the
// last command if that was answered and not noted.
func (j *Journal) Turn() ([]Exchange, error) {
	var out []Exchange
	b, last := j.bytes(atTurn, 8), j.u32(atTurn+4)
	for at := 0; at < len(b); {
		if len(b)-at < exchangeHead {
			return nil, fmt.Errorf("%w: sequence ends at offset %d", ErrJournal, at)
		}
		e := b[at:]
		c, r := int(binary.LittleEndian.Uint16(e[4:])), int(binary.LittleEndian.Uint16(e[6:]))
		if c > MaxMessage || r > MaxMessage || exchangeHead+c+r > len(e) {
			return nil, fmt.Errorf("%w: exchange of %d and %d bytes at offset %d of the sequence", ErrJournal, c, r, at)
		}
		out = append(out, Exchange{e[exchangeHead:][:c], e[exchangeHead+c:][:r]})
		if seq := binary.LittleEndian.Uint32(e); seq == j.Host.Seq() {
			last = seq // it was kept, and that it was noted was not yet
		}
		at += exchangeHead + c + r
	}
	if j.Host.State() == Answered && j.Host.Seq() != last {
		out = append(out, Exchange{j.Host.Command(), j.Host.Response()})
	}
	return out, nil
}
