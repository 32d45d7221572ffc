package builder

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services"
)

// DefaultResets are in force for services that the operator does not name.
const DefaultResets = "blkback=10m,netback=10m"

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

// every calls f again and again until stop is closed.
func every(d time.Duration, stop <-chan struct{}, f func()) {
	t := time.NewTicker(d)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			f()
		case <-stop:
			return
		}
	}
}

// resetToolstacks replaces all toolstacks, or that of one guest's tenant.
func (b *Builder) resetToolstacks(guest string) (done ResetDone) {
	b.mu.Lock()
	var all []*tenancy
	for _, t := range b.tenancies {
		wanted := guest == ""
		for _, g := range b.guests {
			wanted = wanted || g.tenant == t.name && g.build.Spec.Name == guest
		}
		if wanted {
			all = append(all, t)
		}
	}
	b.mu.Unlock()
	for _, t := range all {
		if t.reset() {
			done.Replaced++
		}
	}
	return done
}

// reset replaces a service's processes now.
func (b *Builder) reset(in Reset) (ResetDone, error) {
	if !slices.Contains(Resettable, in.Service) {
		return ResetDone{}, rpc.Errorf(rpc.Invalid, "%q is not replaced under its guests; services: %s", in.Service, strings.Join(Resettable, ", "))
	}
	if in.Service == services.NetBack {
		if in.Guest != "" {
			return ResetDone{}, rpc.Errorf(rpc.Invalid, "there is one NetBack for all guests: leave the guest out")
		}
		var done ResetDone
		if b.network.reset() {
			done.Replaced = 1
		}
		return done, nil
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
	if in.Service == services.Toolstack {
		return b.resetToolstacks(in.Guest), nil
	}
	for _, g := range all {
		if g.storage != nil && g.storage.reset() {
			done.Replaced++
		}
	}
	return done, nil
}
