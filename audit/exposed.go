package audit

import (
	"cmp"
	"iter"
	"slices"
	"time"
)

// The acts from which Exposed answers. Their outcome is Done; refused and failed ones change
// nothing.
const (
	ActInstanceStart = "instance-start" // object: the service; detail: instance
	ActInstanceEnd   = "instance-end"   // object: the service; detail: instance
	ActLink          = "link"           // object: the guest; detail: service, instance
	ActUnlink        = "unlink"         // object: the guest; detail: service, instance
	ActGuestEnd      = "guest-end"      // object: the guest: it depends on nothing any more
)

// Names of details.
const (
	DetailService  = "service"
	DetailInstance = "instance"
)

// An Exposure is a time in which a guest depended on an instance of a service.
type Exposure struct {
	Guest    string
	Instance string
	Since    time.Time
	Until    time.Time // zero: it lasts until the end of the log
}

// Exposed lists the guests that depended on a service at some moment between from and to, both
// included; service is its name. An exposure that ended exactly at from counts, as does one that
// began exactly at to: what is doubtful is listed. So is a link whose end is not in the log.
//
// Times are those of the records; where a clock was set back between link and unlink the
// exposure is taken to span both.
func Exposed(records iter.Seq2[*Record, error], service string, from, to time.Time) ([]Exposure, error) {
	x := exposures{service: service, open: map[link]time.Time{}}
	for r, err := range records {
		if err != nil {
			return nil, err
		}
		if r.Outcome == Done {
			x.take(r)
		}
	}
	for l, since := range x.open {
		x.all = append(x.all, Exposure{l.guest, l.instance, since, time.Time{}})
	}
	var out []Exposure
	for _, e := range x.all {
		if !e.Since.After(to) && (e.Until.IsZero() || !e.Until.Before(from)) {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b Exposure) int {
		return cmp.Or(cmp.Compare(a.Guest, b.Guest), a.Since.Compare(b.Since), cmp.Compare(a.Instance, b.Instance))
	})
	return out, nil
}

type link struct{ guest, instance string }

// exposures is the state after a prefix of the log.
type exposures struct {
	service string
	open    map[link]time.Time
	all     []Exposure
}

func (x *exposures) take(r *Record) {
	switch r.Act {
	case ActLink:
		if r.Detail[DetailService] != x.service {
			return
		}
		l := link{r.Object, r.Detail[DetailInstance]}
		if since, ok := x.open[l]; !ok || r.Time.Before(since) {
			x.open[l] = r.Time
		}
	case ActUnlink:
		if r.Detail[DetailService] == x.service {
			x.close(link{r.Object, r.Detail[DetailInstance]}, r.Time)
		}
	case ActInstanceEnd:
		if r.Object == x.service {
			x.closeAll(r.Time, func(l link) bool { return l.instance == r.Detail[DetailInstance] })
		}
	case ActGuestEnd:
		x.closeAll(r.Time, func(l link) bool { return l.guest == r.Object })
	}
}

func (x *exposures) closeAll(at time.Time, which func(link) bool) {
	for l := range x.open {
		if which(l) {
			x.close(l, at)
		}
	}
}

func (x *exposures) close(l link, at time.Time) {
	since, ok := x.open[l]
	if !ok {
		return
	}
	delete(x.open, l)
	if at.Before(since) {
		since, at = at, since
	}
	x.all = append(x.all, Exposure{l.guest, l.instance, since, at})
}
