package baseline

import (
	"cmp"
	"slices"
)

// A snapshot shows the disk as it is after a sudden stop: what a guest wrote last may be half there. So a deviation counts
// only when a second snapshot, taken after the guest's journal was committed, shows it too.

// Confirm divides what the first snapshot showed by what the second one shows. Confirmed findings are of the same kind and
// name in both, as the second has them: what a file is may have changed again, and deviates all the same. The others of the
// first are withdrawn. Both are in the order of [Finding.Compare].
//
// What only the second shows is in neither: see [Unconfirmed].
func Confirm(first, second []Finding) (confirmed, withdrawn []Finding) {
	is := index(second)
	for _, f := range first {
		if g, ok := is[kindOf(f)]; ok {
			confirmed = append(confirmed, g)
		} else {
			withdrawn = append(withdrawn, f)
		}
	}
	return ordered(confirmed), ordered(withdrawn)
}

// Unconfirmed is what only the second snapshot shows: it takes another one to confirm it. A guest that keeps deviating in
// other ways has such findings each time, and is not to be let off for that: its names deviate in both.
func Unconfirmed(first, second []Finding) []Finding {
	was := index(first)
	var all []Finding
	for _, f := range second {
		if _, ok := was[kindOf(f)]; !ok {
			all = append(all, f)
		}
	}
	return ordered(all)
}

type kindOfName struct {
	kind Kind
	name Name
}

func kindOf(f Finding) kindOfName { return kindOfName{f.Kind, f.Name} }

func index(all []Finding) map[kindOfName]Finding {
	m := make(map[kindOfName]Finding, len(all))
	for _, f := range all {
		m[kindOf(f)] = f
	}
	return m
}

// ordered sorts findings, and takes one that is there twice for one.
func ordered(all []Finding) []Finding {
	slices.SortFunc(all, func(a, b Finding) int {
		return cmp.Or(a.Compare(b), cmp.Compare(a.Was, b.Was), cmp.Compare(a.Is, b.Is))
	})
	return slices.CompactFunc(all, func(a, b Finding) bool { return a.Compare(b) == 0 })
}
