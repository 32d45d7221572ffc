package builder

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
)

// DefaultResets are in force for services that the operator does not name.
const DefaultResets = "blkback=10m"

// minReset is the most often that a service can be replaced.
const minReset = 100 * time.Millisecond

// ParseResets reads a list such as "blkback=10s,netback=off" on top of the default.
func ParseResets(text string) (map[string]time.Duration, error) {
	out := map[string]time.Duration{}
	for item := range strings.SplitSeq(DefaultResets+","+text, ",") {
		if item == "" {
			continue
		}
		name, value, ok := strings.Cut(item, "=")
		if !ok || !slices.Contains(Resettable, name) {
			return nil, fmt.Errorf("%q is not SERVICE=DURATION; services: %s", item, strings.Join(Resettable, ", "))
		}
		if value == "off" {
			delete(out, name)
			continue
		}
		d, err := time.ParseDuration(value)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is no duration such as 10s, nor off", name, value)
		}
		if d < minReset {
			return nil, fmt.Errorf("%s: %v is less than %v", name, d, minReset)
		}
		out[name] = d
	}
	return out, nil
}

// reset replaces a service's processes now.
func (b *Builder) reset(in Reset) (ResetDone, error) {
	if !slices.Contains(Resettable, in.Service) {
		return ResetDone{}, rpc.Errorf(rpc.Invalid, "%q is not replaced under its guests; services: %s", in.Service, strings.Join(Resettable, ", "))
	}
	b.mu.Lock()
	var all []*guest
	for _, g := range b.guests {
		if in.Guest == "" || g.build.Spec.Name == in.Guest {
			all = append(all, g)
		}
	}
	b.mu.Unlock()
	var done ResetDone
	for _, g := range all {
		if g.storage != nil && g.storage.reset() {
			done.Replaced++
		}
	}
	return done, nil
}
