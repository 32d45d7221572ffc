// Package verdict is what is said of a validation: how its snapshots came to be, what was found, and what followed.
package verdict

import (
	"slices"
	"time"

	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/crossview"
)

// Drafted says what a draft is.
type Drafted struct {
	Version  uint64   `json:"version"`
	Entries  int      `json:"entries"`
	Bytes    int      `json:"bytes"`
	SHA256   string   `json:"sha256"`             // of the draft, hexadecimal
	Problems []string `json:"problems,omitempty"` // files that could not be read, which are not in it
}

// Safety says how a snapshot came to be.
type Safety struct {
	Safe     bool          `json:"safe"`
	Why      string        `json:"why"`      // why it was safe, or what was not
	Tries    int           `json:"tries"`    // moments that were looked at, this one included
	Held     time.Duration `json:"heldNs"`   // how long the processors stood still
	HeldIO   time.Duration `json:"heldIONs"` // how long changes of the disks waited
	TakenAt  time.Time     `json:"takenAt"`
	Snapshot int           `json:"snapshot"` // 1, or 2 for the one that confirms
}

// Causes of a validation.
const (
	Asked  = "asked"
	BySpec = "by the spec" // so long after the last, or after so much
)

// Compared is what an inspector finds on a snapshot.
type Compared struct {
	baseline.Comparison
	Hidden *crossview.Result `json:"hidden,omitempty"` // what a listing does not show, if there was one
}

// All are all findings, in the order of Finding.Compare.
func (c Compared) All() []baseline.Finding {
	if c.Hidden == nil {
		return c.Findings
	}
	all := append(slices.Clone(c.Findings), c.Hidden.Findings...)
	slices.SortStableFunc(all, baseline.Finding.Compare)
	return slices.CompactFunc(all, func(a, b baseline.Finding) bool { return a.Compare(b) == 0 })
}

// Seen says what came of a listing that was made inside the guest; the names that are hidden are among the findings.
type Seen struct {
	Begun    time.Time `json:"begun"` // by the guest's clock
	Volume   string    `json:"volume"`
	Listed   int       `json:"listed"`             // names that the guest shows
	Names    int       `json:"names"`              // on the disk, that were looked for
	Unjudged int       `json:"unjudged,omitempty"` // that are not shown and have changed since the listing was begun
	Some     []string  `json:"some,omitempty"`     // of them
}

// Report is a verdict, or why there is none.
type Report struct {
	Guest     string             `json:"guest"`
	Cause     string             `json:"cause"`    // what it was begun for: Asked, BySpec
	Baseline  uint64             `json:"baseline"` // the version
	Started   time.Time          `json:"started"`
	Took      time.Duration      `json:"tookNs"`
	Full      bool               `json:"full"`
	Why       string             `json:"why,omitempty"` // it was full, where that was not asked
	Snapshots []Safety           `json:"snapshots"`
	Files     int                `json:"files"` // names that were looked at, or looked at before and did not change
	Read      int                `json:"read"`  // files whose contents were read
	Bytes     int64              `json:"bytes"` // of them
	Seen      *Seen              `json:"seen,omitempty"`
	Findings  []baseline.Finding `json:"findings"` // that act: a second snapshot confirmed them, or the guest was held
	Withdrawn []baseline.Finding `json:"withdrawn,omitempty"`
	Omitted   int                `json:"omitted,omitempty"` // findings that are too many
	Responses []spec.Response    `json:"responses,omitempty"`
	Error     string             `json:"error,omitempty"` // there is no verdict
}

// Status is what is known of a guest's validation.
type Status struct {
	Guest      string          `json:"guest"`
	Baseline   uint64          `json:"baseline"` // the version in force; 0: none
	Draft      uint64          `json:"draft"`    // the version of the draft; 0: none
	Signer     string          `json:"signer,omitempty"`
	Validation spec.Validation `json:"validation"`
	Last       *Report         `json:"last,omitempty"`
	InForce    []spec.Response `json:"inForce,omitempty"`
	Reason     string          `json:"reason,omitempty"` // of what is in force
	Since      *time.Time      `json:"since,omitempty"`
}
