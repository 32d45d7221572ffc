package eventlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Bounds of what Parse reads. Logs of real firmware stay below 200 KiB.
const (
	MaxLog        = 16 << 20 // bytes of a log
	MaxAlgorithms = 16       // banks a crypto-agile log may declare
	maxDigest     = 128      // bytes of a digest whose algorithm is unknown here
	pcrs          = 24       // of a PC Client TPM (PTP 1.05)
)

// A Format is one of the two layouts of a log.
type Format string

// The formats.
const (
	SHA1Format  Format = "SHA-1"        // TCG_PCR_EVENT records, PFP 1.05 §10.2.1
	AgileFormat Format = "crypto-agile" // TCG_PCR_EVENT2 records, PFP 1.05 §10.2.2
)

// signature opens the data of the first event of a crypto-agile log (PFP 1.05 §10.4.5.1).
var signature = []byte("Spec ID Event03\x00")

// A Bank is a digest algorithm that a log declares.
type Bank struct {
	Algorithm tpm2.TPMAlgID
	Size      int // bytes of a digest
}

// A Log is a log as read.
type Log struct {
	Format  Format
	Banks   []Bank  // as declared, in the log's order; SHA-1 alone in a SHA-1 log
	Events  []Event // without the Spec ID event of a crypto-agile log, which Encode writes anew
	Offsets []int   // of Events, in bytes from the start of the log
	Size    int     // bytes read: up to the padding, the end or the damage
}

// A DamageError says where a log cannot be read or replayed further.
type DamageError struct {
	Offset int // bytes from the start of the log; -1 where events were given, not a log
	Event  int // counted from 1; 0 is the header
	Text   string
}

func (e *DamageError) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("event log: event %d: %s", e.Event, e.Text)
	}
	if e.Event == 0 {
		return fmt.Sprintf("event log: offset %#x: header: %s", e.Offset, e.Text)
	}
	return fmt.Sprintf("event log: offset %#x: event %d: %s", e.Offset, e.Event, e.Text)
}

// Parse returns the events of a log of either format. Events alias b. On a damaged log it
// returns the events before the damage and a *DamageError.
func Parse(b []byte) ([]Event, error) {
	l, err := ParseLog(b)
	return l.Events, err
}

// ParseLog reads a log of either format, which it detects. The log may stand in a larger area:
// it ends where only zero bytes follow. The events alias b. ParseLog never returns nil: on a
// damaged log the Log holds what stands before the damage, and the error is a *DamageError.
func ParseLog(b []byte) (*Log, error) {
	l := &Log{Format: SHA1Format, Banks: []Bank{{tpm2.TPMAlgSHA1, 20}}}
	if len(b) > MaxLog {
		return l, &DamageError{0, 0, fmt.Sprintf("%d bytes: the most is %d", len(b), MaxLog)}
	}
	end := len(bytes.TrimRight(b, "\x00")) // an event that ends in zeros ends behind it
	if end == 0 {
		return l, &DamageError{0, 0, "no log: no event before the end"}
	}
	r := &reader{b: b}
	first, err := r.sha1Event()
	if err != nil {
		return l, err
	}
	next := r.sha1Event
	if first.Type == TypeNoAction && bytes.HasPrefix(first.Data, signature) {
		banks, err := specID(first.Data, r.off-len(first.Data))
		if err != nil {
			return l, err
		}
		l.Format, l.Banks = AgileFormat, banks
		next = func() (Event, error) { return r.agileEvent(banks) }
	} else {
		if err := checkPCR(first, 0, 1); err != nil {
			return l, err
		}
		l.Events, l.Offsets = append(l.Events, first), append(l.Offsets, 0)
	}
	l.Size = r.off
	for r.off < end {
		start := r.off
		r.event = len(l.Events) + 1
		e, err := next()
		if err == nil {
			err = checkPCR(e, start, r.event)
		}
		if err != nil {
			return l, err
		}
		l.Events, l.Offsets, l.Size = append(l.Events, e), append(l.Offsets, start), r.off
	}
	return l, nil
}

// checkPCR refuses an index no TPM has. Events that extend nothing may name any.
func checkPCR(e Event, off, n int) error {
	if e.PCR >= pcrs && e.Type != TypeNoAction {
		return &DamageError{off, n, fmt.Sprintf("PCR %d: a TPM has 0 to %d", e.PCR, pcrs-1)}
	}
	return nil
}

// A reader walks a log; every step checks the bytes that remain first.
type reader struct {
	b     []byte
	off   int
	event int // for errors
}

func (r *reader) fail(off int, format string, args ...any) error {
	return &DamageError{off, r.event, fmt.Sprintf(format, args...)}
}

func (r *reader) bytes(n uint32, what string) ([]byte, error) {
	left := len(r.b) - r.off
	if uint64(n) > uint64(left) {
		return nil, r.fail(r.off, "%s takes %d bytes, %d are left", what, n, left)
	}
	s := r.b[r.off : r.off+int(n) : r.off+int(n)]
	r.off += int(n)
	return s, nil
}

func (r *reader) uint32(what string) (uint32, error) {
	s, err := r.bytes(4, what)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(s), nil
}

func (r *reader) head() (e Event, err error) {
	if e.PCR, err = r.uint32("PCR index"); err != nil {
		return e, err
	}
	e.Type, err = r.uint32("event type")
	return e, err
}

func (r *reader) data(e *Event) error {
	n, err := r.uint32("size of data")
	if err != nil {
		return err
	}
	e.Data, err = r.bytes(n, "data")
	return err
}

// sha1Event reads a TCG_PCR_EVENT.
func (r *reader) sha1Event() (Event, error) {
	e, err := r.head()
	if err != nil {
		return e, err
	}
	sum, err := r.bytes(20, "SHA-1 digest")
	if err != nil {
		return e, err
	}
	e.Digests = []Digest{{tpm2.TPMAlgSHA1, sum}}
	return e, r.data(&e)
}

// agileEvent reads a TCG_PCR_EVENT2.
func (r *reader) agileEvent(banks []Bank) (Event, error) {
	e, err := r.head()
	if err != nil {
		return e, err
	}
	at := r.off
	n, err := r.uint32("count of digests")
	if err != nil {
		return e, err
	}
	if n > uint32(len(banks)) {
		return e, r.fail(at, "%d digests, the header declares %d algorithms", n, len(banks))
	}
	e.Digests = make([]Digest, 0, n)
	for range n {
		at := r.off
		id, err := r.bytes(2, "digest algorithm")
		if err != nil {
			return e, err
		}
		d := Digest{Algorithm: tpm2.TPMAlgID(binary.LittleEndian.Uint16(id))}
		size := sizeIn(banks, d.Algorithm)
		if size == 0 {
			return e, r.fail(at, "digest algorithm %#04x is not in the header", uint16(d.Algorithm))
		}
		if e.Digest(d.Algorithm) != nil {
			return e, r.fail(at, "two digests of algorithm %#04x", uint16(d.Algorithm))
		}
		if d.Sum, err = r.bytes(uint32(size), "digest"); err != nil {
			return e, err
		}
		e.Digests = append(e.Digests, d)
	}
	return e, r.data(&e)
}

func sizeIn(banks []Bank, id tpm2.TPMAlgID) int {
	for _, b := range banks {
		if b.Algorithm == id {
			return b.Size
		}
	}
	return 0
}

// specID reads the data of a Spec ID event, which stands at offset base of the log.
func specID(data []byte, base int) ([]Bank, error) {
	r := &reader{b: data}
	shift := func(err error) error {
		var d *DamageError
		if errors.As(err, &d) {
			d.Offset += base
		}
		return err
	}
	// Signature, platform class, spec version (minor, major, errata), size of UINTN.
	if _, err := r.bytes(16+4+4, "Spec ID structure"); err != nil {
		return nil, shift(err)
	}
	n, err := r.uint32("number of algorithms")
	if err != nil {
		return nil, shift(err)
	}
	if n == 0 || n > MaxAlgorithms {
		return nil, shift(r.fail(r.off-4, "%d algorithms: use 1 to %d", n, MaxAlgorithms))
	}
	banks := make([]Bank, 0, n)
	for range n {
		v, err := r.uint32("algorithm")
		if err != nil {
			return nil, shift(err)
		}
		b := Bank{tpm2.TPMAlgID(v & 0xffff), int(v >> 16)}
		h, known := hashes[b.Algorithm]
		switch {
		case sizeIn(banks, b.Algorithm) != 0:
			return nil, shift(r.fail(r.off-4, "algorithm %#04x is declared twice", uint16(b.Algorithm)))
		case known && b.Size != h.size, b.Size == 0 || b.Size > maxDigest:
			return nil, shift(r.fail(r.off-2, "digests of algorithm %#04x cannot have %d bytes", uint16(b.Algorithm), b.Size))
		}
		banks = append(banks, b)
	}
	size, err := r.bytes(1, "size of vendor data")
	if err == nil {
		_, err = r.bytes(uint32(size[0]), "vendor data")
	}
	return banks, shift(err)
}
