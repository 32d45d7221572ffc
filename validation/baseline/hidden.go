package baseline

import "golang.org/x/sys/unix"

// Findings of a cross view: names that a disk has and that its running guest does not show. Rules decide how severe each is, and
// what is left out; what belongs to no rule is critical, as nobody hides what is nothing.

// Hidden is the finding of a file that the running guest does not show, of which at least name and mode are known. It is false
// for what a rule with ignore decides.
func (r *Rules) Hidden(e Entry) (Finding, bool) {
	i, _ := r.rule(&e)
	if i < 0 && r.ignored(e.Name) {
		return Finding{}, false
	}
	return r.unseen(Hidden, e.Name, i, Critical, describe(&e)), true
}

// Covered is the finding of a directory on which another file system is mounted, so that what the disk has in it is not shown.
// It is as severe as the rule says that what is in it, such as the name given, belongs to, and else a warning.
func (r *Rules) Covered(dir Name, such, text string) Finding {
	i, _ := r.rule(&Entry{Name: Name{dir.Volume, dir.Path + "/" + such}, Mode: unix.S_IFREG})
	return r.unseen(Hidden, dir, i, Warning, text)
}

// Blind is the finding of a directory that could not be read, so that nobody knows what the guest should show of it. It is false
// for what a rule with ignore decides.
func (r *Rules) Blind(dir Name, text string) (Finding, bool) {
	i, _ := r.rule(&Entry{Name: dir, Mode: unix.S_IFDIR})
	if i < 0 && r.ignored(dir) {
		return Finding{}, false
	}
	return r.unseen(Unreadable, dir, i, Critical, Escape(text)), true
}

func (r *Rules) unseen(k Kind, n Name, rule int, severity Severity, text string) Finding {
	f := Finding{Kind: k, Name: n, Severity: severity, Is: short(text)}
	if rule >= 0 {
		f.Rule, f.Severity = r.rules[rule].Name, r.rules[rule].Severity
	}
	return f
}

// ignored reports whether a name is one that a rule with ignore matches.
func (r *Rules) ignored(n Name) bool {
	m := r.root.match(n.Path)
	return m.include&^m.exclude&(r.anyVolume|r.volumes[n.Volume])&r.ignore != 0
}
