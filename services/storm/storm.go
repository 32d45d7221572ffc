// Package storm tells deaths that are accidents, which replacing is for, from those that are not.
package storm

import "time"

// A service that dies more than MaxDeaths times within DeathWindow is given up.
const (
	MaxDeaths   = 20
	DeathWindow = 10 * time.Second
)

// Deaths are the latest ones of a service.
type Deaths []time.Time

// Add notes one and reports whether they are so many that replacing is no answer: more than most
// within DeathWindow.
func (d *Deaths) Add(now time.Time, most int) bool {
	*d = append(*d, now)
	if len(*d) <= most {
		return false
	}
	*d = (*d)[len(*d)-most-1:]
	return now.Sub((*d)[0]) < DeathWindow
}
