package protocol

import (
	"time"

	"redoubt.dev/redoubt/store/tree"
)

// Builder → vTPM service.
const (
	MethodAttach  = "attach"  // Attach → nothing: the back end serves the channel
	MethodCreate  = "create"  // Create → Created: the device's process runs
	MethodMeasure = "measure" // Measure → nothing, when the vTPM is ready
	MethodRelease = "release" // Release → nothing: the guest is gone
	MethodRevoke  = "revoke"  // Revoke → nothing: it is in force from the next start on
	MethodInherit = "inherit" // Inherit → Inherited, by a manager that follows one that died
	// NoticeShutdown has the manager shut all engines down in order once its connection ends. Without it
	// the connection's end is the Builder's death, and the manager leaves the engines to the next one.
	NoticeShutdown = "shutdown" // nothing
)

// vTPM service → Builder: EventX notices, and
const (
	NoticeFailed = "failed" // Failed
	// MethodKeep has the Builder keep the manager's end of an engine, in place of what it kept for
	// that guest, so that the engine outlives the manager.
	MethodKeep = "keep" // Keep → nothing
)

// Revoke has a guest's vTPM opened no more, or again.
type Revoke struct {
	UUID    string `json:"uuid"`
	Revoked bool   `json:"revoked"`
}

// Keep names a guest's engine. Files: FileControl, FileData, FileLifeline, FileOutput.
type Keep struct {
	UUID  string `json:"uuid"`
	PID   int    `json:"pid"`
	Files Files  `json:"files"`
}

// Inherit makes a new manager go on with a guest's vTPM. Files: FileJournal; FileTPM where an emulator
// is attached, which the rest of Attach is about; those of Keep where there is an engine.
type Inherit struct {
	Attach
	PID int `json:"pid,omitempty"` // of the engine
}

// Inherited says what became of it: with Ready the vTPM is as it was. Without, its guest has not been
// let in yet, and is to have its vTPM created and measured as at any start; its emulator is
// attached. A guest that was let in and whose vTPM is lost is an error: it must be failed closed.
type Inherited struct {
	Ready bool `json:"ready"`
}

// Attach makes the back end serve a guest (step 2). It may be repeated. Files: FileTPM, FileJournal.
type Attach struct {
	UUID     string        `json:"uuid"`
	Domain   tree.Domain   `json:"domain"`
	Deadline time.Duration `json:"deadline"`
	NoGate   bool          `json:"noGate"`
	Poll     time.Duration `json:"poll"`
	Fresh    bool          `json:"fresh"` // the domain is new and its emulator does not run yet
	Files    Files         `json:"files"`
}

// Create makes the manager create the guest's device (step 3).
type Create struct {
	UUID  string        `json:"uuid"`
	Name  string        `json:"name"`
	Delay time.Duration `json:"delay"` // for tests: the engine is started that much later
}

// Created reports it.
type Created struct {
	Instance int `json:"instance"`
}

// Measure hands over the event log of what the Builder gave the guest; the manager extends
// every event of it before the vTPM is ready.
type Measure struct {
	UUID string `json:"uuid"`
	Log  []byte `json:"log"`
	// GuestLog is false where the guest's own firmware writes the log the guest sees.
	GuestLog bool `json:"guestLog"`
}

// Release says that a guest's emulator is gone. With Keep the engine waits for the next one
// (a reboot); else it is shut down in an orderly way.
type Release struct {
	UUID string `json:"uuid"`
	Keep bool   `json:"keep"`
}

// Failed says that a guest's vTPM is lost and why.
type Failed struct {
	UUID   string `json:"uuid"`
	Reason string `json:"reason"`
}
