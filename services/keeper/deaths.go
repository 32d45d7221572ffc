package keeper

import "time"

// A service that dies more than MaxDeaths times within DeathWindow is given up.
const (
	MaxDeaths   = 20
	DeathWindow = 10 * time.Second
)

// deaths are the latest ones of a service.
type deaths []time.Time

// add notes one and reports whether they are so many that replacing is no answer: more than most
// within DeathWindow.
func (d *deaths) add(now time.Time, most int) bool {
	*d = append(*d, now)
	if len(*d) <= most {
		return false
	}
	*d = (*d)[len(*d)-most-1:]
	return now.Sub((*d)[0]) < DeathWindow
}
