package protocol

import (
	"time"
)

// Builder → BlkBack.
const (
	// MethodSnapshot begins a snapshot of all disks that can be written, at one moment, in place of the last one: when the
	// guest stands still, which its emulator says. Files: a FileSnapshot for each of Disks, FileStopped, FileBegun.
	MethodSnapshot = "snapshot" // Snapshot → Snapshotted
	// MethodDropSnapshot ends it.
	MethodDropSnapshot = "drop-snapshot" // nothing → nothing
)

// Snapshot asks for a snapshot.
type Snapshot struct {
	Disks     []int `json:"disks"`     // the disks' indexes, in the order of the files
	Scratch   int64 `json:"scratch"`   // memory for copies of each, in bytes
	Validated bool  `json:"validated"` // what the last snapshot showed was looked at: its map of changes may go
	Force     bool  `json:"force"`     // also while requests are in flight
	Files     Files `json:"files"`
}

// Snapshotted says whether there is one.
type Snapshotted struct {
	InFlight int           `json:"inFlight"` // requests that the guest has made and that are not answered; there is a snapshot only where it is 0 or Force was said
	Held     time.Duration `json:"held"`     // how long changes waited
}

// Builder → emulator.
const (
	// MethodHold holds the guest's processors and its clock, for somebody.
	MethodHold = "hold" // Hold → Held
	// MethodLetGo ends that; the guest goes on when nobody holds it any more.
	MethodLetGo = "let-go" // LetGo → WasHeld
)

// A Holder is who holds a guest still.
type Holder string

// Holders.
const (
	HolderGate       Holder = "gate"       // the emulator's own, while the vTPM is not ready
	HolderOperator   Holder = "operator"   // until the operator lets it go on
	HolderValidation Holder = "validation" // for a snapshot, or until its verdict
	HolderVerdict    Holder = "verdict"    // until what was found is released
	HolderModules    Holder = "modules"    // the emulator's own, for what a module was refused, until the operator lets it go on
)

// HoldLimit is how long an emulator and a BlkBack may take to hold the guest and to begin a snapshot: so long the guest may
// stand still for one that is sick.
const HoldLimit = 10 * time.Second

// Hold says for whom. Files: FileStopped and FileBegun, where it is held for a snapshot. Its emulator and BlkBack tell each
// other when, so that the guest does not stand still while either's word is on its way to the Builder and back.
type Hold struct {
	Who   Holder `json:"who"`
	Keep  bool   `json:"keep,omitempty"` // the guest stays held when the snapshot is begun
	Files Files  `json:"files,omitempty"`
}

// Held says of a guest that was held for a snapshot what it had in progress.
type Held struct {
	Begun  bool          `json:"begun,omitempty"`  // BlkBack said so, within [HoldLimit]
	Masked []int         `json:"masked,omitempty"` // processors with interrupts switched off
	Status uint32        `json:"status,omitempty"` // the word at Start.Status: not 0, a write is in progress
	Paused bool          `json:"paused,omitempty"` // somebody else holds it, too: a later moment is no other
	Took   time.Duration `json:"took,omitempty"`   // after so long it was let go
}

// LetGo says for whom.
type LetGo struct {
	Who Holder `json:"who"`
}

// WasHeld says how long it was.
type WasHeld struct {
	Took time.Duration `json:"took"`
}

// Toolstack → Builder. Descriptor of each answer that is Answered: a memfd with it.
const (
	MethodPause          = "pause"           // Control → nothing: the guest's processors stand still
	MethodResume         = "resume"          // Control → nothing
	MethodQuarantine     = "quarantine"      // Control → nothing: it is in force
	MethodReleaseGuest   = "release-guest"   // Control → nothing: nothing is in force any more
	MethodValidate       = "validate"        // Validate → Answered: JSON of verdict.Report
	MethodValidation     = "validation"      // Control → Answered: JSON of verdict.Status
	MethodCreateBaseline = "create-baseline" // CreateBaseline → Answered: JSON of verdict.Drafted
	MethodBaseline       = "baseline"        // Baseline → Answered: the file
	MethodSignBaseline   = "sign-baseline"   // SignBaseline → Signed
	MethodAcceptBaseline = "accept-baseline" // AcceptBaseline → Answered: JSON of verdict.Drafted
)

// Control names a guest, and why.
type Control struct {
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Reason string `json:"reason,omitempty"`
	Caller Caller `json:"caller"`
}

// Validate asks for a validation now. Files: FileSeen, where the guest's files are also held to what it shows of them.
type Validate struct {
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Full   bool   `json:"full,omitempty"`
	Force  bool   `json:"force,omitempty"`
	Seen   *Seen  `json:"seen,omitempty"`
	Files  Files  `json:"files,omitempty"`
	Caller Caller `json:"caller"`
}

// Seen says of a listing that was made inside a guest when and of what.
type Seen struct {
	Size   int       `json:"size"`             // bytes of FileSeen
	Begun  time.Time `json:"begun"`            // by the guest's clock
	Taken  time.Time `json:"taken,omitzero"`   // the snapshot that it is held to
	Volume string    `json:"volume,omitempty"` // such as disk0p1; the only ext file system there is
}

// MaxSeen bounds a listing, in bytes.
const MaxSeen = 32 << 20

// CreateBaseline asks for a draft of what the guest's disks hold now.
type CreateBaseline struct {
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Rules  []byte `json:"rules,omitempty"` // YAML, at most MaxRules bytes; none: those of the baseline there is, or the defaults
	Force  bool   `json:"force,omitempty"`
	Caller Caller `json:"caller"`
}

// MaxRules bounds the rules that a message has, in bytes.
const MaxRules = 32 << 10

// Baseline asks for the baseline, or for the draft of the next.
type Baseline struct {
	UUID   string `json:"uuid"`
	Name   string `json:"name"`
	Draft  bool   `json:"draft,omitempty"`
	Caller Caller `json:"caller"`
}

// SignBaseline puts a signature to the draft.
type SignBaseline struct {
	UUID      string `json:"uuid"`
	Name      string `json:"name"`
	Signature []byte `json:"signature"` // the line that follows the draft
	Signer    string `json:"signer"`    // the public key that it is of, see baseline.ParsePublicKey
	Caller    Caller `json:"caller"`
}

// Signed says which baseline is in force.
type Signed struct {
	Version uint64 `json:"version"`
}

// AcceptBaseline asks for a draft in which files are as they are now; without paths all that deviate.
type AcceptBaseline struct {
	UUID   string   `json:"uuid"`
	Name   string   `json:"name"`
	Paths  []string `json:"paths,omitempty"`
	Caller Caller   `json:"caller"`
}

// Builder → inspector, in place of MethodRead: first each disk, then what is asked of them all, after which it leaves.
const (
	MethodViewDisk = "view-disk" // ViewDisk → nothing
	MethodScan     = "scan"      // Scan → Scanned
)

// ViewDisk gives an inspector a disk, to read. Files: FileDisk, FileBase of an overlay, and FileSnapshot and FileChanges of one
// that the guest may write meanwhile.
type ViewDisk struct {
	Index   int   `json:"index"`
	Scratch int64 `json:"scratch,omitempty"` // of the snapshot, in bytes
	Files   Files `json:"files"`
}

// Scan asks for the disks' files. With a baseline, for what deviates from it: the answer is JSON of verdict.Compared. With
// Draft, for the text of the next baseline: from the rules, or from the baseline with all or some files as they are now.
// Files: FileIndex, of the last scan and for this one's, which are FileIndex and FileNewIndex; FileLast, the last comparison;
// FileBaseline; FileRules; FileSeen, which with Seen has the disks held to it, too; FileAnswer. All but FileNewIndex and FileAnswer may be missing.
type Scan struct {
	Guest    string    `json:"guest"` // UUID
	Draft    bool      `json:"draft,omitempty"`
	Created  time.Time `json:"created,omitzero"`
	Accept   []string  `json:"accept,omitempty"`  // names to draft as they are now; none: all
	Changed  bool      `json:"changed,omitempty"` // the disks' maps of changes are since the scan of FileIndex
	Index    int       `json:"index,omitempty"`   // bytes of FileIndex
	Last     int       `json:"last,omitempty"`    // bytes of FileLast
	Baseline int       `json:"baseline,omitempty"`
	Rules    int       `json:"rules,omitempty"`
	Seen     *Seen     `json:"seen,omitempty"`
	Files    Files     `json:"files"`
}

// MaxIndex bounds what an inspector may leave to the next one, in bytes.
const MaxIndex = 1 << 30

// Scanned says what came of it.
type Scanned struct {
	Index    int      `json:"index"`  // bytes of FileNewIndex; 0: there is no index for another scan
	Answer   int      `json:"answer"` // bytes of FileAnswer
	Full     bool     `json:"full"`
	Why      string   `json:"why,omitempty"`
	Names    int      `json:"names"`
	Read     int      `json:"read"`
	Bytes    int64    `json:"bytes"`
	Entries  int      `json:"entries,omitempty"`  // of a draft
	Version  uint64   `json:"version,omitempty"`  // of a draft
	Problems []string `json:"problems,omitempty"` // of a draft
}
