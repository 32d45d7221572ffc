package ima

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // a bank of the TPM's
	"crypto/sha256"
	"fmt"
)

// A Bank is how a kernel extends one of the TPM's banks by an entry.
type Bank string

// The banks. Kernels from 5.8 on extend each bank by its own hash of an entry's data; those before extend all by the SHA-1,
// with zeros behind it.
const (
	SHA1         Bank = "sha1"
	SHA256       Bank = "sha256"
	SHA256Padded Bank = "sha256, by padded SHA-1"
)

// Zero is the register before the first entry.
func (b Bank) Zero() []byte {
	if b == SHA1 {
		return make([]byte, sha1.Size)
	}
	return make([]byte, sha256.Size)
}

// Extend is the register after an entry.
func (b Bank) Extend(register []byte, e *Entry) []byte {
	d := bytes.Repeat([]byte{0xff}, len(b.Zero())) // of a violation
	switch {
	case e.Violation():
	case b == SHA256:
		s := sha256.Sum256(e.hashed())
		d = s[:]
	default:
		s := sha1.Sum(e.hashed()) //nolint:gosec // the kernel's
		d = append(s[:], make([]byte, len(d)-sha1.Size)...)
	}
	all := append(bytes.Clone(register), d...)
	if b == SHA1 {
		s := sha1.Sum(all) //nolint:gosec // the TPM's
		return s[:]
	}
	s := sha256.Sum256(all)
	return s[:]
}

// A Prefix is how much of a list is vouched for: what PCR 10 was after so many entries.
type Prefix struct {
	Bank  Bank   `json:"bank"`
	Count int    `json:"count"`
	Value []byte `json:"value"`
}

// Match replays entries that follow known ones and finds where they give the quoted register. All entries up to there count,
// and none behind it: those were measured after the quote. from.Bank is tried, without one both of SHA-256. An entry whose
// data is not what its own digest says is named where nothing matches.
func Match(entries []Entry, from Prefix, quoted []byte) (Prefix, error) {
	banks := []Bank{from.Bank}
	if from.Bank == "" {
		banks = []Bank{SHA256, SHA256Padded}
	}
	for _, bank := range banks {
		at := Prefix{Bank: bank, Count: from.Count, Value: from.Value}
		if len(at.Value) == 0 {
			at.Value = bank.Zero()
		}
		if bytes.Equal(at.Value, quoted) {
			return at, nil
		}
		for i := range entries {
			at.Count++
			if entries[i].PCR != PCR {
				continue
			}
			at.Value = bank.Extend(at.Value, &entries[i])
			if bytes.Equal(at.Value, quoted) {
				return at, nil
			}
		}
	}
	for i := range entries {
		if !entries[i].Sound() {
			return Prefix{}, fmt.Errorf("entry %d%s: its data was changed: its SHA-1 is %x", from.Count+i+1, named(&entries[i]), entries[i].SHA1[:4])
		}
	}
	first, last := "", ""
	if len(entries) > 0 {
		first, last = named(&entries[0]), named(&entries[len(entries)-1])
	}
	return Prefix{}, fmt.Errorf("none of the prefixes of the list, entries %d%s to %d%s, gives PCR 10 as quoted, %x…: entries are missing or were changed with their digests",
		from.Count+1, first, from.Count+len(entries), last, quoted[:min(4, len(quoted))])
}

// named is an entry's name for an error.
func named(e *Entry) string {
	f, err := e.File()
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (%q)", clip(f.Path))
}

func clip(s string) string {
	const most = 120
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
