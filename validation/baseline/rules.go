package baseline

import (
	"crypto/sha256"
	"fmt"
	"iter"
	"strings"

	"golang.org/x/sys/unix"
)

// Bounds of rules.
const (
	MaxRules      = 64        // rules
	MaxRulesFile  = 256 << 10 // bytes of their file
	maxPatterns   = 4096      // of all rules
	maxPattern    = 4096      // bytes of one
	maxComponents = 64        // of one
	maxVolumes    = 64        // that a rule names
	maxRuleName   = 64        // bytes
	capability    = "security.capability"
	permissions   = 0o7777
	checkAll      = Metadata | Content | Xattrs
)

// A Severity is how bad a deviation is. What follows from it is the guest's specification's to say.
type Severity uint8

// Severities, the least first.
const (
	Info Severity = iota
	Warning
	Critical
)

var severities = [...]string{"info", "warning", "critical"}

// String is the severity's name: info, warning or critical.
func (s Severity) String() string {
	if int(s) < len(severities) {
		return severities[s]
	}
	return fmt.Sprintf("severity %d", uint8(s))
}

// MarshalText gives its name.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText takes its name.
func (s *Severity) UnmarshalText(b []byte) error {
	for i, name := range severities {
		if name == string(b) {
			*s = Severity(i)
			return nil
		}
	}
	return fmt.Errorf("%.20q is no severity: use %s", b, strings.Join(severities[:], ", "))
}

// A Trait is what a file may be that a rule asks for, as a set.
type Trait uint8

// Traits. Those that a set-id bit makes are of regular files: with other files the bits give nobody any rights.
const (
	SetUID     Trait = 1 << iota // runs as its owner
	SetGID                       // runs as its group
	Capability                   // has file capabilities
	Device                       // is a device node
)

// A Rule says of the names that its patterns match what is checked, and how severe a deviation is.
//
// A pattern is a path from the volume's root. It matches that name and, if it is a directory, all beneath. In a component *
// stands for any bytes, ? for one, and \ takes the next as it is; ** as a component stands for any number of components.
type Rule struct {
	Name     string   // lower-case letters, digits, dashes
	Include  []string // patterns
	Exclude  []string // patterns of what it does not match all the same
	Volumes  []string // that it is for, such as disk0p1; none: all
	Having   Trait    // that a file must have one of; none: any file
	Check    Want     // of Metadata, Content, Xattrs. Existence, type, set-id bits, link target and device numbers always are
	Severity Severity
	Ignore   bool // what it matches is in no baseline; the fields from Having on are not used
}

// Rules say what of a guest's disk is in its baseline, and how severe a deviation is. The first rule that matches a name
// decides. They do not change, and may be used by several goroutines.
type Rules struct {
	rules     []Rule
	root      node
	anyVolume set            // rules for all volumes
	volumes   map[string]set // those for some
	ignore    set
	whole     set // those of them that exclude nothing: all beneath is ignored, too
	traits    set // rules that ask for traits
	canonical []byte
	digest    [sha256.Size]byte
}

// compile makes rules of those that were checked.
func compile(rules []Rule) *Rules {
	r := &Rules{rules: rules, volumes: map[string]set{}}
	for i, rule := range rules {
		for _, p := range rule.Include {
			r.root.add(p, i, false)
		}
		for _, p := range rule.Exclude {
			r.root.add(p, i, true)
		}
		for _, v := range rule.Volumes {
			r.volumes[v] |= only(i)
		}
		if len(rule.Volumes) == 0 {
			r.anyVolume |= only(i)
		}
		if rule.Ignore {
			r.ignore |= only(i)
			if len(rule.Exclude) == 0 {
				r.whole |= only(i)
			}
		}
		if rule.Having != 0 {
			r.traits |= only(i)
		}
	}
	r.canonical = encodeRules(rules)
	r.digest = sha256.Sum256(r.canonical)
	return r
}

// All returns the rules in their order; it is the caller's.
func (r *Rules) All() []Rule { return append([]Rule(nil), r.rules...) }

// Encode returns the canonical form: [ParseRules] makes the same rules of it, and rules that say the same in the same order
// have the same.
func (r *Rules) Encode() []byte { return append([]byte(nil), r.canonical...) }

// Digest is the SHA-256 of the canonical form: what one scan read is of use to another one if it is the same.
func (r *Rules) Digest() [sha256.Size]byte { return r.digest }

// traitsOf are those that a mode tells.
func traitsOf(mode uint32) (t Trait) {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		if mode&unix.S_ISUID != 0 {
			t |= SetUID
		}
		if mode&unix.S_ISGID != 0 {
			t |= SetGID
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		t = Device
	}
	return t
}

// covering is the rules that match a name if it has their traits, and those that may match in it.
func (r *Rules) covering(n Name) (here, below set) {
	m := r.root.match(n.Path)
	all := (r.anyVolume | r.volumes[n.Volume]) &^ m.exclude
	here, below = m.include&all, (m.include|m.below)&all&^r.ignore
	if ignored := here & r.ignore; ignored != 0 {
		here &= upTo(ignored.first())
		if whole := ignored & r.whole; whole != 0 {
			below &= upTo(whole.first())
		}
	}
	return here, below
}

// decide returns the rule for a file with these traits, -1 if there is none, and whether one that comes before asks for a
// capability that the file may have.
func (r *Rules) decide(here set, t Trait, mode uint32) (rule int, asks bool) {
	for ; here != 0; here &= here - 1 {
		i := here.first()
		having := r.rules[i].Having
		if having == 0 || having&t != 0 {
			return i, asks
		}
		asks = asks || having&Capability != 0 && mode&unix.S_IFMT == unix.S_IFREG
	}
	return -1, asks
}

// Want says what a scan is to read of a file with that mode, type included; 0: nothing. For a directory Descend is in it
// where something beneath it may match. Which files have capabilities is known only once they are read: where a rule asks
// for them, the metadata and extended attributes of all regular files are wanted. So what was read is put through
// [Rules.Reduce].
func (r *Rules) Want(n Name, mode uint32) Want {
	here, below := r.covering(n)
	var w Want
	kind := mode & unix.S_IFMT
	if kind == unix.S_IFDIR && below != 0 {
		w = Descend
	}
	rule, asks := r.decide(here, traitsOf(mode), mode)
	if rule >= 0 {
		w |= Metadata | r.rules[rule].Check
		asks = asks || kind == unix.S_IFREG && r.rules[rule].Having&Capability != 0
	}
	if kind != unix.S_IFREG {
		w &^= Content
	}
	if asks {
		w |= Metadata | Xattrs
	}
	return w
}

// rule returns the one for an entry, -1 if there is none, and what it checks: for a file that only a capability brings in,
// no more contents than [Rules.Want] could ask for.
func (r *Rules) rule(e *Entry) (int, Want) {
	t := entryTraits(e)
	here, _ := r.covering(e.Name)
	i, _ := r.decide(here, t, e.Mode)
	if i < 0 {
		return i, 0
	}
	check := r.rules[i].Check
	if e.Mode&unix.S_IFMT != unix.S_IFREG {
		return i, check &^ Content
	}
	if h := r.rules[i].Having; h != 0 && h&t == Capability {
		if j, _ := r.decide(here, t&^Capability, e.Mode); j < 0 || r.rules[j].Check&Content == 0 {
			check &^= Content
		}
	}
	return i, check
}

// entryTraits are all that an entry has; none if there is no entry.
func entryTraits(e *Entry) Trait {
	if e == nil {
		return 0
	}
	t := traitsOf(e.Mode)
	if e.Mode&unix.S_IFMT == unix.S_IFREG && hasCapability(e) {
		t |= Capability
	}
	return t
}

func hasCapability(e *Entry) bool {
	for _, x := range e.Xattrs {
		if x.Name == capability {
			return true
		}
	}
	return false
}

// Reduce takes from an entry what its rule does not check, so that it is as a baseline has it, and reports whether it is in
// the baseline at all.
func (r *Rules) Reduce(e Entry) (Entry, bool) {
	i, check := r.rule(&e)
	if i < 0 {
		return e, false
	}
	return r.strip(e, i, check), true
}

// strip takes from an entry what a rule does not check. What makes a file match its rule stays: else it would not any more.
func (r *Rules) strip(e Entry, rule int, check Want) Entry {
	kind := e.Mode & unix.S_IFMT
	if kind != unix.S_IFREG {
		e.Size = 0
		check &^= Content
	}
	if check&Metadata == 0 {
		e.Mode, e.UID, e.GID, e.Links = kind|setIDs(&e), 0, 0, 0
		if check&Content == 0 {
			e.Size = 0
		}
	}
	if check&Content == 0 {
		e.Digest = Digest{}
	}
	if check&Xattrs == 0 {
		var kept []Xattr
		for _, x := range e.Xattrs {
			if x.Name == capability && r.rules[rule].Having&Capability != 0 {
				kept = []Xattr{x}
			}
		}
		e.Xattrs = kept
	}
	if kind != unix.S_IFLNK {
		e.Target = ""
	}
	if kind != unix.S_IFCHR && kind != unix.S_IFBLK {
		e.Major, e.Minor = 0, 0
	}
	return e
}

// setIDs are the bits of a regular file that give whoever runs it rights, 0 if there is no file.
func setIDs(e *Entry) uint32 {
	if e == nil || e.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0
	}
	return e.Mode & (unix.S_ISUID | unix.S_ISGID)
}

// Kept reduces entries and leaves out those that are in no baseline.
func (r *Rules) Kept(all iter.Seq[Entry]) iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for e := range all {
			if kept, ok := r.Reduce(e); ok && !yield(kept) {
				return
			}
		}
	}
}

// RuleOf returns the name of the rule that an entry belongs to, "" if it is in no baseline.
func (r *Rules) RuleOf(e Entry) string {
	if i, _ := r.rule(&e); i >= 0 {
		return r.rules[i].Name
	}
	return ""
}

// Severity is how bad a finding is: as its rule says. What belongs to no rule is critical, as it may hide anything.
func (r *Rules) Severity(f Finding) Severity {
	for _, rule := range r.rules {
		if rule.Name == f.Rule {
			return rule.Severity
		}
	}
	return Critical
}
