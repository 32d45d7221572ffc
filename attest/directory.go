package attest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-tpm/tpm2"
)

// Files of a directory that WriteDir makes.
const (
	FileQuote     = "quote.msg"
	FileSignature = "quote.sig"
	FilePCRs      = "quote.pcrs"
	FileAK        = "ak.pub"
	FileLog       = "eventlog.bin"
	FileGuestLog  = "guest-eventlog.bin" // where there is one
	FileEK        = "ek.pem"
	FileChain     = "ek-chain.pem" // where there is one
	FileEvidence  = "evidence.json"
	FileReadme    = "README.txt"
)

// WriteDir writes evidence as files that tpm2-tools read (tpm2_checkquote, tpm2_eventlog), and
// whole as JSON, with a README.txt that gives the commands. The directory is made where it is
// missing; files of the same names are replaced. The evidence need not be good, but its quote,
// key and registers must be of the form that those files have.
func (e *Evidence) WriteDir(dir string) error {
	files, err := e.files()
	if err != nil {
		return fmt.Errorf("evidence: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("evidence: %w", err)
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.name), f.content, 0o644); err != nil {
			return fmt.Errorf("evidence: %w", err)
		}
	}
	return nil
}

type file struct {
	name    string
	content []byte
}

func (e *Evidence) files() ([]file, error) {
	ak, err := parseAK(e.AK)
	if err != nil {
		return nil, fmt.Errorf("AK: %w", err)
	}
	quote, err := unmarshal[tpm2.TPMSAttest](e.Quote)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	pcrs, err := serialized(e.PCRs)
	if err != nil {
		return nil, err
	}
	all, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return nil, err
	}
	files := []file{
		{FileQuote, e.Quote},
		{FileSignature, e.Signature},
		{FilePCRs, pcrs},
		{FileAK, tpm2.Marshal(tpm2.New2B(*ak.public))},
		{FileLog, e.EventLog},
		{FileEK, certificates(e.EKCertificate)},
		{FileEvidence, append(all, '\n')},
	}
	if len(e.GuestLog) > 0 {
		files = append(files, file{FileGuestLog, e.GuestLog})
	}
	if len(e.EKChain) > 0 {
		files = append(files, file{FileChain, certificates(e.EKChain...)})
	}
	return append(files, file{FileReadme, readme(e, quote.ExtraData.Buffer)}), nil
}

func certificates(der ...[]byte) []byte {
	var out []byte
	for _, c := range der {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	return out
}

// serialized is the register file of tpm2_quote and tpm2_checkquote in their default format: C
// structures of tpm2-tss as they lie in memory, little-endian. A TPML_PCR_SELECTION (count, 16
// selections of 8 bytes, the last one padding), the number of lists, then TPML_DIGESTs (count,
// eight digests of two bytes of size and 64 of room).
func serialized(pcrs []Hex) ([]byte, error) {
	const (
		banks  = 16
		digest = 64
		list   = 8
	)
	if len(pcrs) != PCRCount {
		return nil, fmt.Errorf("%d registers: a quote covers %d", len(pcrs), PCRCount)
	}
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 1)
	b = le.AppendUint16(b, uint16(tpm2.TPMAlgSHA256))
	b = append(b, 3, 0xff, 0xff, 0xff, 0, 0)
	b = append(b, make([]byte, (banks-1)*8)...)
	b = le.AppendUint32(b, PCRCount/list)
	for i, v := range pcrs {
		if i%list == 0 {
			b = le.AppendUint32(b, list)
		}
		if len(v) != len(Hash{}) {
			return nil, fmt.Errorf("PCR %d: %d bytes, not %d", i, len(v), len(Hash{}))
		}
		b = le.AppendUint16(b, uint16(len(v)))
		b = append(b, v...)
		b = append(b, make([]byte, digest-len(v))...)
	}
	return b, nil
}

func readme(e *Evidence, nonce []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `Evidence of what a guest booted, as files of tpm2-tools (5.4 or later).

The quote: is it signed by the attestation key, over these registers and this nonce?

    tpm2_checkquote -u %s -m %s -s %s -f %s -q %x -g sha256

Use the nonce that you asked for; the one above is the one the quote holds.

The event log: which measurements give those registers? Compare its "pcrs" with the registers
that tpm2_checkquote prints (sha256). PCR 10 and others that the guest extends while it runs
are in no log of the boot.

    tpm2_eventlog %s
`, FileAK, FileQuote, FileSignature, FilePCRs, nonce, FileLog)
	if len(e.GuestLog) > 0 {
		fmt.Fprintf(&b, `
The guest booted firmware: the log above is the host's (PCR 13), the rest stands in the log that
the firmware wrote.

    tpm2_eventlog %s
`, FileGuestLog)
	}
	chain := ""
	if len(e.EKChain) > 0 {
		chain = " -untrusted " + FileChain
	}
	fmt.Fprintf(&b, `
The TPM: was its endorsement key certified by a CA that you trust (ROOT.pem)?

    openssl verify -CAfile ROOT.pem%s %s

These files cannot show that the attestation key lies in that TPM: that takes a credential which
the running TPM opens, as "redoubt attest" does. %s holds everything as JSON.
`, chain, FileEK, FileEvidence)
	return b.Bytes()
}
