package validator

import (
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/inspector/asked"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/verdict"
)

// A seen is a listing of what a guest shows, which its disk is held to. It is a tenant's, made by a guest, and only an inspector
// reads it.
type seen struct {
	is      protocol.Seen
	listing asked.Text // sealed
}

// takeSeen takes the listing of a request, if it has one: a copy that nobody can change. It closes the request's descriptors.
func takeSeen(in protocol.Validate, r *rpc.Request) (*seen, error) {
	defer ipc.CloseAll(r.Files)
	files, err := in.Files.Take(r)
	switch given := files[protocol.FileSeen]; {
	case err != nil:
		return nil, err
	case in.Seen == nil && len(r.Files) == 0:
		return nil, nil
	case in.Seen == nil || len(r.Files) != 1 || len(given) != 1:
		return nil, rpc.Errorf(rpc.Invalid, "validate: other descriptors than one of a listing")
	case in.Seen.Size <= 0 || in.Seen.Size > protocol.MaxSeen || in.Seen.Begun.IsZero():
		return nil, rpc.Errorf(rpc.Invalid, "validate: a listing of %d bytes, begun at %v: the most is %d", in.Seen.Size, in.Seen.Begun, protocol.MaxSeen)
	default:
		st, err := given[0].Stat()
		if err != nil {
			return nil, err
		}
		if st.Size() != int64(in.Seen.Size) {
			return nil, rpc.Errorf(rpc.Invalid, "validate: a listing of %d bytes, that is to have %d", st.Size(), in.Seen.Size)
		}
		f, err := memfd.Sealed("listing", given[0])
		if err != nil {
			return nil, err
		}
		return &seen{is: *in.Seen, listing: asked.Text{File: f, Size: in.Seen.Size}}, nil
	}
}

// end tells who waits, if anybody does, and gives back what was brought along.
func (a *want) end(r *verdict.Report) {
	if a.seen != nil {
		a.seen.listing.Close()
	}
	if r != nil {
		a.report <- r
	}
}

// anySeen reports whether anybody who waits has brought a listing: one is looked at at a time.
func (w *worker) anySeen() bool {
	for _, a := range w.waiting {
		if a.seen != nil {
			return true
		}
	}
	return false
}

// take has somebody's wishes be the validation's.
func (n *inquiry) take(a *want) {
	n.full, n.force = n.full || a.full, n.force || a.force
	if a.seen != nil {
		n.seen = a.seen
	}
}

// hidden notes what came of the listing, and returns all findings.
func (n *inquiry) hidden(c verdict.Compared) []baseline.Finding {
	if h := c.Hidden; h != nil && n.seen != nil {
		n.report.Seen = &verdict.Seen{
			Begun: n.seen.is.Begun, Volume: h.Volume, Listed: h.Listed, Names: h.Names, Unjudged: h.Unjudged, Some: h.Some,
		}
	}
	return c.All()
}
