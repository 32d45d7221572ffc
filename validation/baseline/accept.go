package baseline

import (
	"fmt"
	"io"
	"iter"
	"slices"
	"time"
)

// Next is the header of the baseline that follows one.
func (h Header) Next(created time.Time) Header {
	h.Version++
	h.Created = created
	return h
}

// Accept writes the draft that follows a baseline: the accepted names, in any order, are as they are now, which lookup says,
// as a scan read them; what does not exist or is in no baseline any more is left out. All other entries stay as they are.
// To accept everything, [Write] with [Header.Next] and [Rules.Kept] of a scan.
func Accept(w io.Writer, old *Baseline, accepted []Name, lookup func(Name) (Entry, bool), created time.Time) error {
	names := slices.Clone(accepted)
	slices.SortFunc(names, Name.Compare)
	names = slices.Compact(names)
	var failed error
	err := Write(w, old.Next(created), merged(old, names, lookup, &failed))
	if failed != nil {
		return fmt.Errorf("the old baseline: %w", failed)
	}
	return err
}

// merged yields the old entries but those with names, and these as they are now.
func merged(old *Baseline, names []Name, lookup func(Name) (Entry, bool), failed *error) iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		// next yields those of the names that come before one, or all.
		next := func(n *Name) bool {
			for len(names) > 0 && (n == nil || names[0].Compare(*n) <= 0) {
				at := names[0]
				names = names[1:]
				is, ok := lookup(at)
				is.Name = at
				if ok {
					is, ok = old.Rules.Reduce(is)
				}
				if ok && !yield(is) {
					return false
				}
			}
			return true
		}
		for e, err := range old.All() {
			if err != nil {
				*failed = err
				return
			}
			_, replaced := slices.BinarySearchFunc(names, e.Name, Name.Compare)
			if !next(&e.Name) || !replaced && !yield(e) {
				return
			}
		}
		next(nil)
	}
}
