package protocol

import (
	"encoding/json"
	"fmt"
)

// Inspect asks what a running guest's memory says of its kernel.
type Inspect struct {
	UUID     string   `json:"uuid"`
	Name     string   `json:"name"`
	Question Question `json:"question"`
	Caller   Caller   `json:"caller"`
}

// Question is package inspect's, which the Builder does not read: what is asked of one inspector.
type Question struct {
	What   []string        `json:"what"`
	After  int             `json:"after,omitempty"`
	Layout json.RawMessage `json:"layout,omitempty"` // of the guest's kernel, as an earlier inspector of the guest said
}

// Modules asks what the modules of a running guest have done.
type Modules struct {
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Caller Caller `json:"caller"`
}

// Answered says how long an answer is, in bytes, that lies in memory of its own: JSON of package inspect's Answer or package
// isolate's Report, and behind it what JSON would make longer.
type Answered struct {
	Size int `json:"size"`          // of all
	Raw  int `json:"raw,omitempty"` // of what is no JSON: an IMA list
}

// Check refuses lengths that no answer has.
func (a Answered) Check() error {
	if a.Raw < 0 || a.Raw > a.Size || a.Size > MaxAnswer {
		return fmt.Errorf("an answer of %d bytes, %d of them raw: the most is %d", a.Size, a.Raw, MaxAnswer)
	}
	return nil
}

// MaxAnswer bounds such an answer, in bytes.
const MaxAnswer = 32 << 20

// MethodRead is the Builder's only call to an inspector, which leaves once it has answered. Files: FileMemory and FileKernel,
// to read, and FileAnswer.
const MethodRead = "read" // Read → ReadOut

// Read is what an inspector is asked.
type Read struct {
	Machine  string   `json:"machine"` // how the guest's memory is laid out, of package memory
	Size     uint64   `json:"size"`    // of it, in bytes
	Question Question `json:"question"`
	Files    Files    `json:"files"`
}

// ReadOut says how long the answer is, and what the kernel's layout is, where it was not known.
type ReadOut struct {
	Answered
	Layout json.RawMessage `json:"layout,omitempty"`
}
