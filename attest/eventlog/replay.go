package eventlog

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"fmt"
	"hash"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// A hasher is what replaying a bank needs.
type hasher struct {
	name string // as tpm2-tools writes it
	size int
	new  func() hash.Hash // nil: known, but not computed here
}

var hashes = map[tpm2.TPMAlgID]hasher{
	tpm2.TPMAlgSHA1:    {"sha1", 20, sha1.New},
	tpm2.TPMAlgSHA256:  {"sha256", 32, sha256.New},
	tpm2.TPMAlgSHA384:  {"sha384", 48, sha512.New384},
	tpm2.TPMAlgSHA512:  {"sha512", 64, sha512.New},
	algSM3:             {"sm3_256", 32, nil},
	tpm2.TPMAlgSHA3256: {"sha3_256", 32, func() hash.Hash { return sha3.New256() }},
	tpm2.TPMAlgSHA3384: {"sha3_384", 48, func() hash.Hash { return sha3.New384() }},
	tpm2.TPMAlgSHA3512: {"sha3_512", 64, func() hash.Hash { return sha3.New512() }},
}

// algSM3 is TPM_ALG_SM3_256 (TCG Algorithm Registry 1.34 table 3).
const algSM3 tpm2.TPMAlgID = 0x0012

// AlgorithmName is the name of a digest algorithm as tpm2-tools writes it, such as sha256;
// its number in hexadecimal where it has none here.
func AlgorithmName(id tpm2.TPMAlgID) string {
	if h, ok := hashes[id]; ok {
		return h.name
	}
	return fmt.Sprintf("%#04x", uint16(id))
}

// PCRs are register values: by bank, then by index.
type PCRs map[tpm2.TPMAlgID]map[uint32][]byte

// Value is a register after the log; registers that the log leaves alone are zero. It is nil
// for a bank that Replay cannot compute.
func (p PCRs) Value(bank tpm2.TPMAlgID, pcr uint32) []byte {
	if v, ok := p[bank][pcr]; ok {
		return v
	}
	if h := hashes[bank]; h.new != nil {
		return make([]byte, h.size)
	}
	return nil
}

// Indexes are the registers of a bank that the log sets, in order.
func (p PCRs) Indexes(bank tpm2.TPMAlgID) []uint32 {
	var out []uint32
	for i := range p[bank] {
		out = append(out, i)
	}
	slices.Sort(out)
	return out
}

// BankIDs are the banks in order.
func (p PCRs) BankIDs() []tpm2.TPMAlgID {
	var out []tpm2.TPMAlgID
	for id := range p {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// startupLocality opens the data of the event that says from which locality TPM2_Startup came,
// which is the value PCR 0 starts with (PFP 1.05 §10.4.5.3; TPM 2.0 Part 3 §9.3).
var startupLocality = []byte("StartupLocality\x00")

// Replay extends the events' digests as a TPM does (TPM 2.0 Part 1 §17.2) and returns the
// registers that the events set, in every bank whose algorithm is known here; errors are
// *[DamageError], without offset. EV_NO_ACTION
// events extend nothing; one of them may give PCR 0 its start value. An event without a digest
// of some bank leaves that bank alone.
//
// Registers start from zero, which for 17 to 22 holds after a dynamic launch only.
func Replay(events []Event) (PCRs, error) {
	p := PCRs{}
	for n, e := range events {
		if e.Type == TypeNoAction {
			if err := p.start(e); err != nil {
				return p, &DamageError{-1, n + 1, err.Error()}
			}
			continue
		}
		if e.PCR >= pcrs {
			return p, &DamageError{-1, n + 1, fmt.Sprintf("PCR %d: a TPM has 0 to %d", e.PCR, pcrs-1)}
		}
		for _, d := range e.Digests {
			h := hashes[d.Algorithm]
			if h.new == nil {
				continue
			}
			if len(d.Sum) != h.size {
				return p, &DamageError{-1, n + 1, fmt.Sprintf("%s digest has %d bytes, not %d", h.name, len(d.Sum), h.size)}
			}
			sum := h.new()
			sum.Write(p.Value(d.Algorithm, e.PCR))
			sum.Write(d.Sum)
			p.set(d.Algorithm, e.PCR, sum.Sum(nil))
		}
	}
	return p, nil
}

// start applies a StartupLocality event; other events of its type say nothing about registers.
func (p PCRs) start(e Event) error {
	if !bytes.HasPrefix(e.Data, startupLocality) || e.PCR != 0 {
		return nil
	}
	if len(e.Data) != len(startupLocality)+1 {
		return fmt.Errorf("StartupLocality with %d bytes of data, not %d", len(e.Data), len(startupLocality)+1)
	}
	locality := e.Data[len(startupLocality)]
	if locality != 0 && locality != 3 && locality != 4 {
		return fmt.Errorf("StartupLocality %d: use 0, 3 or 4", locality)
	}
	for id, h := range hashes {
		if _, ok := p[id][0]; ok {
			return fmt.Errorf("StartupLocality after PCR 0 was set")
		}
		if h.new != nil && e.Digest(id) != nil {
			v := make([]byte, h.size)
			v[h.size-1] = locality
			p.set(id, 0, v)
		}
	}
	return nil
}

func (p PCRs) set(bank tpm2.TPMAlgID, pcr uint32, v []byte) {
	if p[bank] == nil {
		p[bank] = map[uint32][]byte{}
	}
	p[bank][pcr] = v
}
