package baseline

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"
)

// ErrIncomplete is a comparison that left findings out: none can go on from it, the next one must be in full.
var ErrIncomplete = errors.New("the last comparison left findings out")

// A Comparison is what deviates from a baseline.
type Comparison struct {
	Findings []Finding `json:"findings"` // in the order of Finding.Compare
	Omitted  int       `json:"omitted"`  // that are too many: none is worse than those that are there
}

// Worst is the highest severity of the findings, false if there are none.
func (c Comparison) Worst() (Severity, bool) {
	if len(c.Findings) == 0 {
		return 0, false
	}
	return slices.MaxFunc(c.Findings, func(a, b Finding) int { return cmp.Compare(a.Severity, b.Severity) }).Severity, true
}

// A kept collects findings, and keeps the worst where there are too many.
type kept struct {
	most  int
	by    [len(severities)][]Finding
	total int
}

func (k *kept) add(all []Finding) {
	for _, f := range all {
		k.total++
		if s := min(f.Severity, Critical); len(k.by[s]) < k.most {
			k.by[s] = append(k.by[s], f)
		}
	}
}

func (k *kept) comparison() Comparison {
	c := Comparison{Findings: []Finding{}}
	for _, some := range slices.Backward(k.by[:]) {
		c.Findings = append(c.Findings, some[:min(len(some), k.most-len(c.Findings))]...)
	}
	slices.SortFunc(c.Findings, Finding.Compare)
	c.Omitted = k.total - len(c.Findings)
	return c
}

// Compare finds all deviations of a guest's files from its baseline, and keeps at most most. The entries are those of a
// scan by the baseline's rules, sorted by name, as they were read, not reduced: what lost the bits for which it is in the
// baseline is seen then. What the scan could not read, of an entry or instead of it, is in problems, in any order.
//
// Errors are that entries are not sorted ([ErrUnsorted]) and a damaged baseline ([ErrFormat]).
func Compare(b *Baseline, actual iter.Seq[Entry], problems []Problem, most int) (Comparison, error) {
	return b.Rules.join(b.All(), actual, problems, most)
}

// Diff finds what an operator accepts with a new baseline: its deviations from the old one, by the new one's rules.
func Diff(old, next *Baseline, most int) (Comparison, error) {
	var failed error
	entries := func(yield func(Entry) bool) {
		for e, err := range next.All() {
			if err != nil {
				failed = err
				return
			}
			if !yield(e) {
				return
			}
		}
	}
	c, err := next.Rules.join(old.All(), entries, nil, most)
	if failed != nil {
		err = failed
	}
	return c, err
}

// join goes through what was, what is and what could not be read at once, by name.
func (r *Rules) join(was iter.Seq2[Entry, error], is iter.Seq[Entry], problems []Problem, most int) (Comparison, error) {
	k := kept{most: max(0, most)}
	problems = sortedProblems(problems)
	next, stop := iter.Pull2(was)
	defer stop()
	var old *Entry
	advance := func() error {
		e, err, ok := next()
		if old = nil; ok {
			old = &e
		}
		return err
	}
	if err := advance(); err != nil {
		return Comparison{}, err
	}
	// before handles all that comes before a name; everything if it is nil.
	var found []Finding
	before := func(n *Name) error {
		for old != nil || len(problems) > 0 {
			var at Name
			switch {
			case old == nil, len(problems) > 0 && problems[0].Name.Compare(old.Name) < 0:
				at = problems[0].Name
			default:
				at = old.Name
			}
			if n != nil && at.Compare(*n) >= 0 {
				return nil
			}
			var e *Entry
			if old != nil && old.Name == at {
				e = old
			}
			found = r.file(found[:0], at, e, nil, take(&problems, at))
			k.add(found)
			if e != nil {
				if err := advance(); err != nil {
					return err
				}
			}
		}
		return nil
	}
	var last *Name
	for e := range is {
		if last != nil && last.Compare(e.Name) >= 0 {
			return Comparison{}, fmt.Errorf("%w: %s after %s", ErrUnsorted, e.escaped(), last.escaped())
		}
		last = &e.Name
		if err := before(&e.Name); err != nil {
			return Comparison{}, err
		}
		var of *Entry
		if old != nil && old.Name == e.Name {
			of = old
		}
		found = r.file(found[:0], e.Name, of, &e, take(&problems, e.Name))
		k.add(found)
		if of != nil {
			if err := advance(); err != nil {
				return Comparison{}, err
			}
		}
	}
	if err := before(nil); err != nil {
		return Comparison{}, err
	}
	return k.comparison(), nil
}

// sortedProblems sorts a copy by name, and by text: which one is told of a name that has several depends on nothing else.
func sortedProblems(all []Problem) []Problem {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Problem) int { return cmp.Or(a.Name.Compare(b.Name), cmp.Compare(a.Text, b.Text)) })
	return all
}

// take takes the problems of a name, which are the next ones if there are any, and returns the first.
func take(problems *[]Problem, n Name) *Problem {
	var first *Problem
	for len(*problems) > 0 && (*problems)[0].Name == n {
		if first == nil {
			first = &(*problems)[0]
		}
		*problems = (*problems)[1:]
	}
	return first
}

// file appends all findings of one name.
func (r *Rules) file(all []Finding, n Name, was, is *Entry, p *Problem) []Finding {
	if p != nil {
		all = r.unreadable(all, n, was, is, p)
	}
	return r.deviations(all, was, is, p != nil)
}

// unreadable appends the finding of a name that could not be read. Where nothing is known of it, it is taken for one that
// each rule's traits match; a directory in which something would be in the baseline belongs to no rule, and is critical.
func (r *Rules) unreadable(all []Finding, n Name, was, is *Entry, p *Problem) []Finding {
	f := Finding{Kind: Unreadable, Name: n, Is: short(Escape(p.Text))}
	rule := -1
	for _, e := range []*Entry{was, is} {
		if e != nil && rule < 0 {
			rule, _ = r.rule(e)
		}
	}
	if rule < 0 {
		here, below := r.covering(n)
		switch {
		case here != 0:
			rule = here.first()
		case below == 0 && was == nil:
			return all
		}
	}
	if rule >= 0 {
		f.Rule = r.rules[rule].Name
	}
	if was != nil {
		f.Was = short(describe(was))
	}
	f.Severity = r.Severity(f)
	return append(all, f)
}

// CompareTouched is [Compare] of the names that may have changed since the last comparison, and of those that have problems:
// lookup says what they are now, as a scan read them, and false for what does not exist. The findings of all others are
// kept. A name that came into being or is gone, with a directory that was moved or removed also all beneath, must be among
// them. Names may be in any order, and twice.
//
// Errors are [ErrIncomplete] and a damaged baseline.
func CompareTouched(
	b *Baseline, touched []Name, lookup func(Name) (Entry, bool), problems []Problem, last Comparison, most int,
) (Comparison, error) {
	if last.Omitted > 0 {
		return Comparison{}, ErrIncomplete
	}
	problems = sortedProblems(problems)
	names := slices.Clone(touched)
	for _, p := range problems {
		names = append(names, p.Name)
	}
	slices.SortFunc(names, Name.Compare)
	names = slices.Compact(names)
	k := kept{most: max(0, most)}
	for _, f := range last.Findings {
		if _, again := slices.BinarySearchFunc(names, f.Name, Name.Compare); !again {
			k.add([]Finding{f})
		}
	}
	var found []Finding
	for _, n := range names {
		was, ok, err := b.Lookup(n)
		if err != nil {
			return Comparison{}, err
		}
		var old, now *Entry
		if ok {
			old = &was
		}
		if is, ok := lookup(n); ok {
			is.Name = n
			now = &is
		}
		found = b.Rules.file(found[:0], n, old, now, take(&problems, n))
		k.add(found)
	}
	return k.comparison(), nil
}
