package response

import (
	"fmt"
	"slices"
	"strings"
)

// A Response is what is done about a guest that deviates from what it should be. The zero value is none.
type Response uint8

// Responses, in the order of what they take from a guest, the least first; in this order they are carried out.
const (
	Log         Response = iota + 1 // nothing is taken: it is written down and told
	Quarantine                      // its NICs reach remediation addresses only
	DropDevices                     // its assigned devices are taken away
	Pause                           // its processors stand still until it is resumed
	Stop                            // it is ended
	Revoke                          // it is attested no more
)

var names = [...]string{Log: "log", Quarantine: "quarantine", DropDevices: "drop-devices", Pause: "pause", Stop: "stop", Revoke: "revoke"}

// All are the responses, the mildest first.
func All() []Response { return []Response{Log, Quarantine, DropDevices, Pause, Stop, Revoke} }

// Parse takes a response's name; its error names all that there are.
func Parse(name string) (Response, error) {
	for _, r := range All() {
		if names[r] == name {
			return r, nil
		}
	}
	return 0, fmt.Errorf("response %.40q: use %s", name, strings.Join(names[1:], ", "))
}

// String is its name: log, quarantine, drop-devices, pause, stop or revoke.
func (r Response) String() string {
	if r >= Log && int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("response %d", uint8(r))
}

// MarshalText gives its name; what has none is an error.
func (r Response) MarshalText() ([]byte, error) {
	if r < Log || int(r) >= len(names) {
		return nil, fmt.Errorf("%v has no name", r)
	}
	return []byte(names[r]), nil
}

// UnmarshalText takes its name.
func (r *Response) UnmarshalText(b []byte) (err error) {
	*r, err = Parse(string(b))
	return err
}

// Worst is the one that takes most from a guest; zero of none.
func Worst(all []Response) (worst Response) {
	for _, r := range all {
		worst = max(worst, r)
	}
	return worst
}

// Decide is what follows from findings by a policy: whatever it names for any severity that was found, each response once,
// in the order they are carried out. Any finding is logged at least, also one of a severity that the policy does not
// name. Without findings nothing follows. Guests that are stopped are not paused before.
func Decide[Severity comparable](found []Severity, policy map[Severity][]Response) []Response {
	if len(found) == 0 {
		return nil
	}
	all := []Response{Log}
	for _, s := range found {
		for _, r := range policy[s] {
			if !slices.Contains(all, r) {
				all = append(all, r)
			}
		}
	}
	slices.Sort(all)
	if slices.Contains(all, Stop) {
		all = slices.DeleteFunc(all, func(r Response) bool { return r == Pause })
	}
	return all
}
