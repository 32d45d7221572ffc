package attest

import (
	"fmt"
	"io"
	"strings"
	"unicode"
)

// A Status is how a step ended.
type Status string

// The statuses.
const (
	Passed     Status = "passed"
	Failed     Status = "failed"
	Skipped    Status = "skipped" // not asked for
	NotReached Status = "not-reached"
)

// Names of the steps, in their order.
const (
	StepEK         = "EK chain"
	StepActivation = "credential activation"
	StepAK         = "AK"
	StepSignature  = "signature"
	StepNonce      = "nonce"
	StepPCRs       = "PCR digest"
	StepLog        = "log replay"
	StepIMA        = "IMA list"
	StepPolicy     = "policy"
)

// A Step is one check and its end. Reason is one line: what was found, or why it failed.
type Step struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Reason string `json:"reason,omitempty"`
}

// A Difference is a register that is not as it should be.
type Difference struct {
	PCR   uint32 `json:"pcr"`
	Event int    `json:"event,omitempty"` // counted from 1 over all logs; 0: the register as a whole
	Got   string `json:"got"`             // a value in hexadecimal, or the text measured
	Want  string `json:"want"`            // the same; several are joined by " or "
}

// A Report is what [Verify] found.
type Report struct {
	OK          bool         `json:"ok"` // no step failed, and none was left out
	Guest       string       `json:"guest,omitempty"`
	EK          Hex          `json:"ek,omitempty"` // SHA-256 of the EK's SubjectPublicKeyInfo: whose TPM it is
	Steps       []Step       `json:"steps"`
	Differences []Difference `json:"differences,omitempty"`
	IMA         *KnownIMA    `json:"ima,omitempty"` // what is vouched for of the IMA list
}

// Failed is the step that failed, or nil.
func (r *Report) Failed() *Step {
	for i := range r.Steps {
		if r.Steps[i].Status == Failed {
			return &r.Steps[i]
		}
	}
	return nil
}

// WriteText writes the report for a person, a line a step.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	for _, s := range r.Steps {
		fmt.Fprintf(&b, "%-11s  %-21s  %s\n", s.Status, s.Name, s.Reason)
	}
	if f := r.Failed(); f != nil {
		fmt.Fprintf(&b, "not trusted: %s: %s\n", f.Name, f.Reason)
	} else if r.OK && r.judged() {
		b.WriteString("trusted\n")
	} else if r.OK {
		b.WriteString("sound, not judged: give a policy\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// judged reports whether a policy passed.
func (r *Report) judged() bool {
	for _, s := range r.Steps {
		if s.Name == StepPolicy {
			return s.Status == Passed
		}
	}
	return false
}

// registerNames say what a register holds, for reports.
var registerNames = map[uint32]string{
	0: "monitor version", 1: "machine configuration", 4: "kernel", 8: "kernel command line",
	9: "initrd", 10: "IMA", 13: "firmware guest",
}

func registerName(pcr uint32, firmware bool) string {
	if name := registerNames[pcr]; name != "" && (!firmware || pcr > 9) {
		return fmt.Sprintf("PCR %d (%s)", pcr, name)
	}
	return fmt.Sprintf("PCR %d", pcr)
}

// short is the start of a digest, enough to compare by eye.
func short(sum []byte) string {
	if len(sum) <= 4 {
		return fmt.Sprintf("%x", sum)
	}
	return fmt.Sprintf("%x…", sum[:4])
}

// brief joins the first few findings into one line.
func brief(findings []string) error {
	const shown = 4
	if n := len(findings) - shown; n > 0 {
		findings = append(findings[:shown:shown], fmt.Sprintf("and %d more", n))
	}
	return fmt.Errorf("%s", strings.Join(findings, "; "))
}

// oneLine keeps what others wrote, such as a name in a certificate, from writing lines or
// terminal commands of its own.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
