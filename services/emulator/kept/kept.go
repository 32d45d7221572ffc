// Package kept is what the Builder's successor must know of a guest: what it is made of, its emulator, its
// network devices and what has happened to it. All of it is kept from before the guest runs on until
// it is down for good:
//
//	guest/UUID          what it is made of
//	nics/UUID           its network devices
//	run/UUID            its emulator, from when the guest runs on
//	timeline/UUID/N     its events
//
// and then, until it is destroyed, end/TENANT/UUID: how it ended last.
package kept

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/store/tree"
)

const guests = "guest/"

func guestEntry(uuid string) string         { return guests + uuid }
func nicsEntry(uuid string) string          { return "nics/" + uuid }
func runEntry(uuid string) string           { return "run/" + uuid }
func timelineEntry(uuid string) string      { return "timeline/" + uuid + "/" }
func endEntry(tenant, uuid string) string   { return "end/" + tenant + "/" + uuid }
func momentEntry(uuid string, n int) string { return fmt.Sprintf("%s%03d", timelineEntry(uuid), n) }

// A Guest is what a guest is made of.
type Guest struct {
	Build    protocol.Build `json:"build"`
	Tenant   string         `json:"tenant"`
	Emulator spec.Emulator  `json:"emulator"`

	Kernel   *os.File   `json:"-"` // sealed copies of what the toolstack gave
	Initrd   *os.File   `json:"-"`
	Profile  *os.File   `json:"-"` // sealed copy of its modules' profiles, where it has some
	Firmware *os.File   `json:"-"` // sealed copy of the firmware image, for a guest that boots through it
	Vars     *os.File   `json:"-"` // OVMF's variable store of this guest
	Console  *os.File   `json:"-"`
	Channel  *os.File   `json:"-"`
	Ends     []*os.File `json:"-"` // the toolstack's ends of both, the console's log and its pipe, for the next toolstack
	Disks    []*os.File `json:"-"`
	Bases    []*os.File `json:"-"` // of those that are overlays, nil for others
	Changes  []*os.File `json:"-"` // maps of the disks' changes, see block.Changes; nil of those that are only read
}

// singles are the files of which a guest has one or none.
func (g *Guest) singles() []**os.File {
	return []**os.File{&g.Kernel, &g.Initrd, &g.Profile, &g.Firmware, &g.Vars, &g.Console, &g.Channel}
}

// files are all of a guest's files, nil for what it has not.
func (g *Guest) files() (all []*os.File) {
	for _, f := range g.singles() {
		all = append(all, *f)
	}
	return slices.Concat(all, g.Ends, g.Disks, g.Bases, g.Changes)
}

// Close closes all files.
func (g *Guest) Close() {
	for _, f := range g.files() {
		if f != nil {
			f.Close()
		}
	}
}

// savedGuest is a Guest without its files, and which it has.
type savedGuest struct {
	*Guest
	Has         []bool `json:"has"`
	Ends, Disks int
}

// Keep keeps a guest.
func (g *Guest) Keep(to *fdstore.Store) error {
	s := savedGuest{Guest: g, Ends: len(g.Ends), Disks: len(g.Disks)}
	var files []*os.File
	for _, f := range g.files() {
		s.Has = append(s.Has, f != nil)
		if f != nil {
			files = append(files, f)
		}
	}
	return to.Put(guestEntry(g.Build.UUID), s, files...)
}

// restore is Keep's other side; files are the Guest's then.
func restore(e fdstore.Entry) (g Guest, err error) {
	s := savedGuest{Guest: &g}
	if err := e.Decode(&s, len(e.Files)); err != nil {
		return g, err
	}
	want := 0
	for _, has := range s.Has {
		if has {
			want++
		}
	}
	singles := g.singles()
	if s.Ends < 0 || s.Disks < 0 || want != len(e.Files) || len(s.Has) != len(singles)+s.Ends+3*s.Disks {
		return g, fmt.Errorf("kept %s: %d descriptors, not %d", e.Name, len(e.Files), want)
	}
	rest := e.Files
	all := make([]*os.File, len(s.Has))
	for i, has := range s.Has {
		if has {
			all[i], rest = rest[0], rest[1:]
		}
	}
	for i, f := range singles {
		*f = all[i]
	}
	all = all[len(singles):]
	g.Ends, all = all[:s.Ends:s.Ends], all[s.Ends:]
	g.Disks, g.Bases, g.Changes = all[:s.Disks:s.Disks], all[s.Disks:][:s.Disks:s.Disks], all[2*s.Disks:]
	return g, nil
}

// A Run is a guest's emulator.
type Run struct {
	Domain   tree.Domain       `json:"domain"`
	PID      int               `json:"pid"`            // 0: it ended with the last Builder
	QEMU     int               `json:"qemu,omitempty"` // process id
	Instance audit.Instance    `json:"instance"`
	PCI      topology.Topology `json:"pci"`
	Asked    bool              `json:"asked,omitempty"`  // the operator asked for the guest's end
	Failed   string            `json:"failed,omitempty"` // why the Builder ended it
	Exit     *protocol.Exit    `json:"exit,omitempty"`   // its own word
	Over     bool              `json:"over,omitempty"`   // it has ended, and the guest is being started again

	Memory *os.File `json:"-"` // the guest's; nil when it is over
}

// Keep keeps the emulator of a guest.
func (r Run) Keep(to *fdstore.Store, uuid string) error {
	if r.Over {
		return to.Put(runEntry(uuid), r)
	}
	return to.Put(runEntry(uuid), r, r.Memory)
}

// KeepNICs keeps a guest's network devices and what keeps their taps.
func KeepNICs(to *fdstore.Store, uuid string, config []network.NIC, tuns []*os.File) error {
	return to.Put(nicsEntry(uuid), config, tuns...)
}

// KeepMoment keeps event n of a guest. A timeline may have gaps.
func KeepMoment(to *fdstore.Store, n int, e protocol.Event) { _ = to.Put(momentEntry(e.UUID, n), e) }

// KeepEnd keeps how a tenant's guest ended last.
func KeepEnd(to *fdstore.Store, tenant string, e protocol.Ended) {
	_ = to.Put(endEntry(tenant, e.UUID), e) // else its state is told less well
}

// DropEnd forgets it.
func DropEnd(from *fdstore.Store, tenant, uuid string) { from.Drop(endEntry(tenant, uuid)) }

// TakeEnds takes over how a tenant's guests ended last, by UUID.
func TakeEnds(left *fdstore.Left, tenant string) map[string]protocol.Ended {
	all := map[string]protocol.Ended{}
	for _, name := range left.Names(endEntry(tenant, "")) {
		var ended protocol.Ended
		e, _ := left.Take(name)
		if err := e.Decode(&ended, 0); err == nil {
			all[ended.UUID] = ended
		}
	}
	return all
}

// Drop forgets a guest that is down for good, and its first n events.
func Drop(from *fdstore.Store, uuid string, n int) {
	for _, name := range []string{guestEntry(uuid), nicsEntry(uuid), runEntry(uuid)} {
		from.Drop(name)
	}
	for i := range n {
		from.Drop(momentEntry(uuid, i))
	}
}

// Left are the guests that a Builder which died has left, by UUID.
func Left(left *fdstore.Left) (all []string) {
	for _, name := range left.Names(guests) {
		all = append(all, name[len(guests):])
	}
	return all
}

// Take takes one over; all is nil for one that never ran on. That, and one after an error, is still to be dropped.
func Take(left *fdstore.Left, uuid string) (g Guest, r *Run, timeline []protocol.Event, err error) {
	made, _ := left.Take(guestEntry(uuid))
	running, ok := left.Take(runEntry(uuid))
	if !ok {
		made.Close()
		return g, nil, nil, nil
	}
	r = &Run{}
	if err = running.Decode(r, len(running.Files)); err == nil {
		g, err = restore(made)
	}
	if n := len(running.Files); err == nil && (n > 1 || r.Over != (n == 0)) {
		err = errors.New("its emulator's memory")
	}
	if err != nil {
		made.Close()
		running.Close()
		return Guest{}, nil, nil, err
	}
	if !r.Over {
		r.Memory = running.Files[0]
	}
	for _, name := range left.Names(timelineEntry(uuid)) {
		var e protocol.Event
		moment, _ := left.Take(name)
		if err := moment.Decode(&e, 0); err == nil {
			timeline = append(timeline, e)
		}
	}
	return g, r, timeline, nil
}

// TakeNICs takes a guest's network devices over, if it has any.
func TakeNICs(left *fdstore.Left, uuid string) (config []network.NIC, tuns []*os.File, err error) {
	e, ok := left.Take(nicsEntry(uuid))
	if !ok {
		return nil, nil, nil
	}
	if err := e.Decode(&config, len(e.Files)); err == nil && len(config) == len(e.Files) {
		return config, e.Files, nil
	}
	ipc.CloseAll(e.Files)
	return nil, nil, errors.New("the network devices are not all kept")
}

// LastWord is how an emulator's run ended of which all that was said was heard: failed is why the Builder ended it, if it did,
// exit the emulator's own word, if it left one, asked whether the operator asked for the end, err its process's end.
func LastWord(failed string, exit *protocol.Exit, asked bool, err error) protocol.Exit {
	switch {
	case failed != "":
		return protocol.Exit{Outcome: protocol.Crashed, Reason: failed}
	case exit != nil && exit.Outcome == protocol.Stopped && !asked:
		return protocol.Exit{Outcome: protocol.Crashed, Reason: "the emulator was ended from outside"}
	case exit != nil:
		return *exit
	case asked:
		return protocol.Exit{Outcome: protocol.Stopped, Reason: "ended by the operator"}
	case err != nil:
		return protocol.Exit{Outcome: protocol.Crashed, Reason: err.Error()}
	}
	return protocol.Exit{Outcome: protocol.Crashed, Reason: "the emulator ended without a word"}
}
