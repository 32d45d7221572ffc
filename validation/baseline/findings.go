package baseline

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A Kind is how a file deviates from its baseline.
type Kind string

// Kinds.
const (
	Added      Kind = "added"
	Removed    Kind = "removed"
	Type       Kind = "type"       // it is another kind of file
	Changed    Kind = "content"    // of a regular file
	Attributes Kind = "metadata"   // permissions, owner, group, or a size without its contents
	Link       Kind = "link"       // a symbolic link's target, or the number of a file's names
	SetIDBits  Kind = "setuid"     // a set-id bit gained or lost, or an added file that has one
	Privilege  Kind = "capability" // file capabilities gained, changed or lost
	Extended   Kind = "attribute"  // another extended attribute
	DeviceNode Kind = "device"     // a device node, or other numbers of one
	Unreadable Kind = "unreadable" // the scan could not read it, so nothing is known
	Hidden     Kind = "hidden"     // the running guest does not show it: see [Rules.Hidden]
)

// A Finding is one deviation of one file; a file may have several.
type Finding struct {
	Kind     Kind     `json:"kind"`
	Name     Name     `json:"name"`           // as ParseName reads it
	Rule     string   `json:"rule,omitempty"` // that the file belongs to, as it was if it was there
	Severity Severity `json:"severity"`
	Was      string   `json:"was,omitempty"` // short and printable, such as 0644 0:0
	Is       string   `json:"is,omitempty"`
}

// inJSON is a finding whose name is one text: JSON has no other bytes than those of letters.
type inJSON struct {
	finding
	Name string `json:"name"`
}

type finding Finding

// MarshalJSON has the name as one text, disk0p1:/etc/passwd.
func (f Finding) MarshalJSON() ([]byte, error) {
	return json.Marshal(inJSON{finding(f), f.Name.escaped()})
}

// UnmarshalJSON reads it.
func (f *Finding) UnmarshalJSON(b []byte) error {
	var in inJSON
	if err := json.Unmarshal(b, &in); err != nil {
		return err
	}
	n, err := ParseName(in.Name)
	*f = Finding(in.finding)
	f.Name = n
	return err
}

// String is one line of printable ASCII.
func (f Finding) String() string {
	s := fmt.Sprintf("%s %s %s", f.Severity, f.Kind, f.Name.escaped())
	switch {
	case f.Was != "" && f.Is != "":
		s += ": " + f.Was + " → " + f.Is
	case f.Was != "":
		s += ": was " + f.Was
	case f.Is != "":
		s += ": " + f.Is
	}
	if f.Rule != "" {
		s += " (" + f.Rule + ")"
	}
	return s
}

// Compare orders findings by name, then by kind: one file has at most one of each.
func (f Finding) Compare(g Finding) int {
	return cmp.Or(f.Name.Compare(g.Name), cmp.Compare(f.Kind, g.Kind))
}

// A Problem is what a scan could not read, and why.
type Problem struct {
	Name Name
	Text string
}

const (
	maxText   = 200 // bytes of Was and of Is
	shortHash = 8   // bytes of a digest that are shown
)

// deviations appends how a file deviates: was is nil if it is in no baseline, is if it does not exist. What it is now is as
// the scan read it. unread says that some of it could not be read, which is a finding already.
func (r *Rules) deviations(all []Finding, was, is *Entry, unread bool) []Finding {
	if was == nil && is == nil {
		return all
	}
	of := cmp.Or(was, is)
	i, check := r.rule(of)
	if i < 0 && was == nil {
		return all
	}
	d := deviant{name: of.Name, severity: Critical, rightsSeverity: Critical, all: all}
	if i < 0 {
		check = checkAll // the rule that the baseline was made by is gone
	} else {
		d.rule, d.severity = r.rules[i].Name, r.rules[i].Severity
		d.rightsSeverity = max(d.severity, r.worstHaving(of.Name, entryTraits(was)|entryTraits(is)))
		if was != nil {
			was = ptr(r.strip(*was, i, check))
		}
		if is != nil {
			if j, _ := r.rule(is); j >= 0 {
				d.severity = max(d.severity, r.rules[j].Severity) // for what it is now there may be a worse one
			}
			is = ptr(r.strip(*is, i, check))
		}
	}
	switch {
	case was == nil:
		d.add(Added, "", describe(is))
	case is == nil:
		if !unread {
			d.add(Removed, describe(was), "")
		}
		return d.all
	case was.Mode&unix.S_IFMT != is.Mode&unix.S_IFMT:
		d.add(Type, describe(was), describe(is))
	default:
		d.compare(was, is, check&Content != 0, unread)
	}
	d.rights(was, is)
	return d.all
}

func ptr(e Entry) *Entry { return &e }

// worstHaving is the highest severity of the rules that match a name for its traits, also of those that do not decide: a
// set-id bit in /etc is no less severe than one in /tmp.
func (r *Rules) worstHaving(n Name, t Trait) (worst Severity) {
	for here, _ := r.covering(n); here != 0; here &= here - 1 {
		if rule := r.rules[here.first()]; rule.Having&t != 0 {
			worst = max(worst, rule.Severity)
		}
	}
	return worst
}

// A deviant is a file whose findings are made.
type deviant struct {
	name     Name
	rule     string
	severity Severity
	all      []Finding

	rightsSeverity Severity // of what gives rights
}

func (d *deviant) add(k Kind, was, is string) {
	s := d.severity
	if k == SetIDBits || k == Privilege || k == DeviceNode {
		s = max(s, d.rightsSeverity)
	}
	d.all = append(d.all, Finding{k, d.name, d.rule, s, short(was), short(is)})
}

// compare finds what differs in files of one type, but for what gives rights.
func (d *deviant) compare(was, is *Entry, content, unread bool) {
	changed := content && was.Digest != is.Digest
	if changed && (!unread || is.Digest != (Digest{})) {
		d.add(Changed, contents(was), contents(is))
	}
	other := uint32(permissions)
	if was.Mode&unix.S_IFMT == unix.S_IFREG {
		other &^= unix.S_ISUID | unix.S_ISGID
	}
	switch {
	case was.Mode&other != is.Mode&other || was.UID != is.UID || was.GID != is.GID:
		d.add(Attributes, access(was), access(is))
	case was.Size != is.Size && !changed:
		d.add(Attributes, fmt.Sprintf("%d bytes", was.Size), fmt.Sprintf("%d bytes", is.Size))
	}
	switch {
	case was.Target != is.Target:
		d.add(Link, "->"+Escape(was.Target), "->"+Escape(is.Target))
	case was.Links != is.Links:
		d.add(Link, fmt.Sprintf("%d names", was.Links), fmt.Sprintf("%d names", is.Links))
	}
}

// rights finds what gives a file rights, and its other attributes; was is nil for one that is added.
func (d *deviant) rights(was, is *Entry) {
	if setIDs(was) != setIDs(is) {
		d.add(SetIDBits, access(was), access(is))
	}
	if a, b := device(was), device(is); a != b && b != "" {
		d.add(DeviceNode, a, b)
	}
	if a, b := xattrs(was, true), xattrs(is, true); a != b {
		d.add(Privilege, a, b)
	}
	if a, b := xattrs(was, false), xattrs(is, false); a != b && was != nil {
		d.add(Extended, a, b) // an added file is a deviation whatever it has
	}
}

// access is who may do what.
func access(e *Entry) string {
	if e == nil {
		return ""
	}
	return fmt.Sprintf("%04o %d:%d", e.Mode&permissions, e.UID, e.GID)
}

func contents(e *Entry) string {
	if e.Digest == (Digest{}) {
		return "not read"
	}
	return fmt.Sprintf("%d bytes sha256:%x…", e.Size, e.Digest[:shortHash])
}

// device is a device node's type and numbers, empty for other files.
func device(e *Entry) string {
	if e == nil || traitsOf(e.Mode)&Device == 0 {
		return ""
	}
	return fmt.Sprintf("%c %d:%d", typeLetter(e.Mode), e.Major, e.Minor)
}

// xattrs is file capabilities, or all other attributes. A value is there in full, so that texts differ where values do:
// [deviant.add] shortens them.
func xattrs(e *Entry, capabilities bool) string {
	if e == nil {
		return ""
	}
	var b []byte
	for _, x := range e.Xattrs {
		if capabilities == (x.Name == capability) {
			b = append(b, ' ')
			b = append(b, x.Name...)
			b = append(b, '=')
			b = appendEscaped(b, x.Value)
		}
	}
	return strings.TrimPrefix(string(b), " ")
}

// describe says what a file is.
func describe(e *Entry) string {
	text := access(e)
	kind := e.Mode & unix.S_IFMT
	for _, t := range types {
		if t.mode == kind {
			text = t.name + " " + text
		}
	}
	switch {
	case kind == unix.S_IFLNK:
		text += " ->" + Escape(e.Target)
	case device(e) != "":
		text += " " + device(e)
	case e.Digest != Digest{}:
		text += " " + contents(e)
	case kind == unix.S_IFREG:
		text += fmt.Sprintf(" %d bytes", e.Size)
	}
	return text
}

// short cuts a text off: an attacker may have made it long.
func short(s string) string {
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "…"
}

// same reports whether nothing differs.
func same(e, f *Entry) bool {
	return e.Name == f.Name && e.Mode == f.Mode && e.UID == f.UID && e.GID == f.GID && e.Links == f.Links && e.Size == f.Size &&
		e.Digest == f.Digest && e.Target == f.Target && e.Major == f.Major && e.Minor == f.Minor && slices.Equal(e.Xattrs, f.Xattrs)
}
