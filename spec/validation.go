package spec

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Validation says when a guest's disks are held to its baseline while it runs, and what follows when they deviate. A guest
// without this section is validated when somebody asks (redoubt validate), and nothing but a record follows.
type Validation struct {
	Signers []string `yaml:"signers,omitempty" json:"signers,omitempty" jsonschema:"maxItems=16,description=Ed25519 public keys\\, as ed25519:BASE64\\, of which one must have signed the guest's baseline"`
	Every   Duration `yaml:"every,omitempty" json:"every,omitempty" jsonschema:"description=validate this often; 1s or more"`
	Written Size     `yaml:"written,omitempty" json:"written,omitempty" jsonschema:"description=validate after the guest has written so much; 1MiB or more"`
	Exits   uint64   `yaml:"exits,omitempty" json:"exits,omitempty" jsonschema:"description=validate after so many exits of the guest's processors (native monitor only); 1000 or more"`
	Tries   int      `yaml:"tries,omitempty" json:"tries,omitempty" jsonschema:"minimum=1,maximum=10000,default=100,description=how many moments that are not safe are let pass before it is given up"`
	Force   bool     `yaml:"force,omitempty" json:"force,omitempty" jsonschema:"description=then take the next moment though it is not safe"`
	Status  uint64   `yaml:"status,omitempty" json:"status,omitempty" jsonschema:"minimum=4,description=guest-physical address of a 32-bit word in which the guest says that a write is in progress: not zero; a moment is safe only where it is zero"`
	Hold    bool     `yaml:"hold,omitempty" json:"hold,omitempty" jsonschema:"description=hold the guest until the verdict"`
	Scratch Size     `yaml:"scratch,omitempty" json:"scratch,omitempty" jsonschema:"default=64MiB,description=memory for what the guest overwrites during a validation\\, for each disk; 1MiB to 4GiB"`
	Respond Respond  `yaml:"respond,omitempty" json:"respond,omitzero" jsonschema:"description=what follows a finding of each severity that a second snapshot confirms"`
}

// Respond is what follows a confirmed finding, by its severity.
type Respond struct {
	Info     []Response `yaml:"info,omitempty" json:"info,omitempty" jsonschema:"uniqueItems=true"`
	Warning  []Response `yaml:"warning,omitempty" json:"warning,omitempty" jsonschema:"uniqueItems=true"`
	Critical []Response `yaml:"critical,omitempty" json:"critical,omitempty" jsonschema:"uniqueItems=true"`
}

// Response is what is done to a guest.
type Response string

// Responses. All are recorded, whatever else they do.
const (
	Log         Response = "log"
	Quarantine  Response = "quarantine"   // its NICs reach nothing but the remediation addresses
	DropDevices Response = "drop-devices" // its NICs reach nothing at all, its disks answer nothing but errors
	Restrict    Response = "restrict"     // no guest of its tenant's is started until somebody releases it
	Pause       Response = "pause"        // its processors stop until somebody releases it
	Stop        Response = "stop"         // it is ended
	Revoke      Response = "revoke"       // it is ended, and its vTPM opens no more
)

// Responses are all there are, from the least to the most.
var Responses = []Response{Log, Quarantine, DropDevices, Restrict, Pause, Stop, Revoke}

// Bounds of a validation.
const (
	MaxSigners     = 16
	MinEvery       = time.Second
	MinExits       = 1000
	MaxTries       = 10000
	DefaultTries   = 100
	MinScratch     = 1 << 20
	MaxScratch     = 4 << 30
	DefaultScratch = 64 << 20
	MaxStatus      = 1<<46 - 4 // what a processor can address; its guest's memory says more at its start
)

// keyPrefix begins a public key in one line.
const keyPrefix = "ed25519:"

// checkSigner refuses what is no public key in one line. Who needs the key reads it by baseline.ParsePublicKey.
func checkSigner(s string) error {
	text, ok := strings.CutPrefix(s, keyPrefix)
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(b) != ed25519.PublicKeySize {
		return fmt.Errorf("%q: use %sBASE64, as `redoubt baseline key` prints it", s, keyPrefix)
	}
	return nil
}

// Validated is the guest's validation with all defaults, also of a guest that has no such section.
func (g *Guest) Validated() Validation {
	v := Validation{}
	if g.Validation != nil {
		v = *g.Validation
	}
	if v.Tries == 0 {
		v.Tries = DefaultTries
	}
	if v.Scratch == 0 {
		v.Scratch = DefaultScratch
	}
	for _, r := range []*[]Response{&v.Respond.Info, &v.Respond.Warning, &v.Respond.Critical} {
		if len(*r) == 0 {
			*r = []Response{Log}
		}
	}
	return v
}

// complete checks; the defaults are Validated's, so that a spec is kept as it was written.
func (v *Validation) complete(g *Guest, bad func(field, format string, args ...any) error) error {
	if v == nil {
		return nil
	}
	switch {
	case len(g.Disks) == 0:
		return bad("validation", "the guest has no disks: give it one, or leave validation out")
	case len(v.Signers) > MaxSigners:
		return bad("validation.signers", "%d: the most is %d", len(v.Signers), MaxSigners)
	case v.Every != 0 && time.Duration(v.Every) < MinEvery:
		return bad("validation.every", "%v: use %v or more", time.Duration(v.Every), MinEvery)
	case v.Written != 0 && v.Written < 1<<20:
		return bad("validation.written", "%v: use 1MiB or more", v.Written)
	case v.Exits != 0 && v.Exits < MinExits:
		return bad("validation.exits", "%d: use %d or more", v.Exits, MinExits)
	case v.Exits != 0 && g.Emulator == QEMU:
		return bad("validation.exits", "qemu does not tell of exits: use every or written, or emulator native")
	case v.Tries < 0 || v.Tries > MaxTries:
		return bad("validation.tries", "%d: use 1 to %d", v.Tries, MaxTries)
	case v.Scratch != 0 && (v.Scratch < MinScratch || v.Scratch > MaxScratch || v.Scratch%4096 != 0):
		return bad("validation.scratch", "%v: use 1MiB to 4GiB, in blocks of 4KiB", v.Scratch)
	}
	if v.Status%4 != 0 || v.Status > MaxStatus {
		return bad("validation.status", "%#x: use the address of a word of 4 bytes, which divides by 4, below %#x", v.Status, uint64(MaxStatus))
	}
	for i, s := range v.Signers {
		if err := checkSigner(s); err != nil {
			return bad(fmt.Sprintf("validation.signers[%d]", i), "%v", err)
		}
	}
	for name, all := range map[string][]Response{"info": v.Respond.Info, "warning": v.Respond.Warning, "critical": v.Respond.Critical} {
		for i, r := range all {
			switch field := fmt.Sprintf("validation.respond.%s[%d]", name, i); {
			case !slices.Contains(Responses, r):
				return bad(field, "%q: use one of %v", r, Responses)
			case r == Quarantine && len(g.NICs) == 0:
				return bad(field, "%s: the guest has no NICs", r)
			case r == Revoke && g.TPM.Disabled:
				return bad(field, "%s: the guest has no TPM", r)
			}
		}
	}
	return nil
}
