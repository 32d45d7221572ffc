// Package verdict is what is said of a validation: how its snapshots came to be, what was found, and what followed.
package verdict

import (
	"time"

	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/validation/baseline"
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
	Files     int                `json:"files"`    // names that were looked at, or looked at before and did not change
	Read      int                `json:"read"`     // files whose contents were read
	Bytes     int64              `json:"bytes"`    // of them
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
