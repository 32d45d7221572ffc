// Package audit is the log of privileged acts: who asked, for what, and what came of it.
//
// The log is append-only and has one writer. Each record carries the hash of the one before it, so
// that an edit, a cut, an insertion or a change of order anywhere before the last record is
// found by [Verify] from the log alone. A log that was cut at its end, or written anew as a whole
// by somebody who may write the files, can only be found with a [Head] that was kept
// elsewhere: [Writer.Append] returns it for each record, and the caller keeps it (in another
// process's memory, on another machine, in a TPM's NV index). The head file beside the log finds
// cuts by accident and by somebody who does not know of it, no more.
//
// The time of a record is the caller's, not proven: the order is what the chain proves.
package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
	"unicode/utf8"
)

// MaxLine is the longest line of a log in bytes, its newline included. Longer ones are not
// written, and when read are damage.
const MaxLine = 64 << 10

// An Outcome is what came of an act.
type Outcome string

// The outcomes. Asked is none yet: a record made before the act, which another follows.
const (
	Asked   Outcome = "asked"
	Done    Outcome = "done"
	Refused Outcome = "refused"
	Failed  Outcome = "failed"
)

// An Actor is who asked.
type Actor struct {
	Service string `json:"service"`          // of ours, or the client's kind
	UID     uint32 `json:"uid"`              // on the host
	PID     int    `json:"pid"`              // on the host
	Tenant  string `json:"tenant,omitempty"` // for whom
}

// An Entry is what the caller says.
type Entry struct {
	Time    time.Time         `json:"time"`
	Actor   Actor             `json:"actor"`
	Act     string            `json:"act"`
	Object  string            `json:"object"`
	Outcome Outcome           `json:"outcome"`
	Detail  map[string]string `json:"detail,omitempty"`
}

// A Record is one line of the log.
type Record struct {
	Seq uint64 `json:"seq"` // from 1, without gaps
	Entry
	Prev Hash `json:"prev"` // of the record before; zero for the first
	Hash Hash `json:"hash"`
}

// A Hash is a SHA-256 digest, in hexadecimal in the log.
type Hash [sha256.Size]byte

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText implements encoding.TextMarshaler.
func (h Hash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hash) UnmarshalText(b []byte) error {
	if len(b) != 2*len(h) {
		return errors.New("a hash has 64 digits")
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// A Head names a record and with it all before it.
type Head struct {
	Seq  uint64 `json:"seq"`
	Hash Hash   `json:"hash"`
}

// domain separates these hashes from all others made with SHA-256.
const domain = "redoubt audit record v1\x00"

// sum is the record's hash: over every field but the hash itself, each with its length or of
// fixed size, so that no two records have one encoding.
func (r *Record) sum() Hash {
	b := []byte(domain)
	text := func(s string) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	b = append(b, r.Prev[:]...)
	b = binary.BigEndian.AppendUint64(b, r.Seq)
	text(r.Time.Format(time.RFC3339Nano))
	text(r.Actor.Service)
	b = binary.BigEndian.AppendUint32(b, r.Actor.UID)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Actor.PID))
	text(r.Actor.Tenant)
	text(r.Act)
	text(r.Object)
	text(string(r.Outcome))
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.Detail)))
	for _, k := range slices.Sorted(maps.Keys(r.Detail)) {
		text(k)
		text(r.Detail[k])
	}
	return sha256.Sum256(b)
}

// check refuses what would not be read back as it was written.
func (e *Entry) check() error {
	if e.Act == "" {
		return errors.New("no act")
	}
	switch e.Outcome {
	case Asked, Done, Refused, Failed:
	default:
		return fmt.Errorf("outcome %q: must be %s, %s, %s or %s", e.Outcome, Asked, Done, Refused, Failed)
	}
	texts := []string{e.Actor.Service, e.Actor.Tenant, e.Act, e.Object}
	for k, v := range e.Detail {
		texts = append(texts, k, v)
	}
	for _, s := range texts {
		if !utf8.ValidString(s) {
			return fmt.Errorf("%q is not UTF-8", s)
		}
	}
	if y := e.Time.Year(); y < 1 || y > 9999 {
		return fmt.Errorf("year %d", y)
	}
	return nil
}

// encode is the record's line with its newline: one text for each record.
func (r *Record) encode() ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if len(b)+1 > MaxLine {
		return nil, fmt.Errorf("%d bytes: a record has at most %d", len(b)+1, MaxLine)
	}
	return append(b, '\n'), nil
}

// parse reads a line without its newline. Only the very text that encode makes is taken: a line
// that says the same in other bytes was not written by a Writer.
func parse(line []byte) (*Record, error) {
	var r Record
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return nil, err
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	again, err := r.encode()
	if err != nil {
		return nil, err
	}
	if n := firstDifference(line, again[:len(again)-1]); n >= 0 {
		return nil, fmt.Errorf("not as it was written, from byte %d", n)
	}
	if r.sum() != r.Hash {
		return nil, errHash
	}
	return &r, nil
}

var errHash = errors.New("its hash is not that of its content")

// firstDifference is the offset of the first byte that differs, or -1.
func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	return -1
}
