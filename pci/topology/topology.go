// Package topology says what a guest's PCI bus looks like: which device has which slot, where its
// registers lie, which of the machine's interrupt routes its vectors use. [Assign] decides it from
// what the devices need; [Topology.Check] and [Topology.Holds] say whether a bus can be built from
// an answer. All of it is pure; what was read from a message was checked.
//
// The assignment is a partition, not a search. Each kind of device has slots of its own, and each
// slot a share of the window and of the routes that is its own. So the same devices get the same
// places at each start, under every emulator; and one that is added moves no other.
//
// References: PCI Local Bus 3.0 §6.2.5 (BARs), §6.8.2 (MSI-X).
package topology

import "fmt"

// Machine is what the bus belongs to.
type Machine string

// The machines.
const (
	// Native is the native monitor's: BARs and interrupt routes are assigned.
	Native Machine = "native"
	// QEMU is QEMU's q35: slots and vectors are assigned; the guest's firmware places BARs, and
	// the kernel or QEMU makes interrupt routes as the guest writes its messages.
	QEMU Machine = "qemu"
)

// Kind is one of device.
type Kind string

// The kinds.
const (
	RNG     Kind = "rng"
	Channel Kind = "channel" // the byte channel between host and guest
	Disk    Kind = "disk"
	NIC     Kind = "nic"
)

// Slots are the numbers of devices on a bus. Slot 0 is every machine's host bridge, and the last
// one QEMU's chipset.
const (
	Slots     = 32
	firstSlot = 1
	lastSlot  = Slots - 2
)

// The native machine's window for BARs, in bytes of guest-physical address, and its interrupt
// routes, as KVM numbers them (GSIs): what comes before are the I/O APIC's pins.
const (
	WindowBase = 0xc000_0000
	WindowSize = 0x2000_0000
	FirstRoute = 24
	Routes     = 1024

	windowShare = WindowSize / Slots // of a slot
	routeShare  = Routes / Slots
)

// Bounds of one device.
const (
	MinBAR     = 4 << 10 // bytes; BARs are powers of two
	MaxBAR     = windowShare
	MaxVectors = routeShare
)

// kinds are the slots of each kind. Slots 27 to 30 are free.
var kinds = map[Kind]struct{ first, count int }{
	RNG:     {1, 1},
	Channel: {2, 1},
	Disk:    {3, 16},
	NIC:     {19, 8},
}

// Devices are some of a kind and what each of them needs.
type Devices struct {
	Kind    Kind   `json:"kind"`
	Count   int    `json:"count"`
	BAR     uint64 `json:"bar,omitempty"` // bytes, with the MSI-X structures; 0: none that is assigned
	Vectors int    `json:"vectors,omitempty"`
}

// A Request asks for places.
type Request struct {
	Machine Machine   `json:"machine"`
	Devices []Devices `json:"devices"` // each kind once at most
}

// A Place is one device's.
type Place struct {
	Kind    Kind   `json:"kind"`
	Index   int    `json:"index"` // among those of its kind, from 0
	Slot    int    `json:"slot"`
	BAR     uint64 `json:"bar,omitempty"`   // guest-physical address; 0: none that is assigned
	Size    uint64 `json:"size,omitempty"`  // of the BAR, in bytes
	Route   uint32 `json:"route,omitempty"` // of vector 0, the others follow; 0: none that is assigned
	Vectors int    `json:"vectors,omitempty"`
}

// A Topology is a bus: these devices in these places and nothing else.
type Topology struct {
	Machine Machine `json:"machine"`
	Places  []Place `json:"places"`
}

// Check says what is wrong with a request.
func (r Request) Check() error {
	if r.Machine != Native && r.Machine != QEMU {
		return fmt.Errorf("pci: machine %q: want %s or %s", r.Machine, Native, QEMU)
	}
	seen := map[Kind]bool{}
	for _, d := range r.Devices {
		k, ok := kinds[d.Kind]
		switch {
		case !ok:
			return fmt.Errorf("pci: there is no device of kind %q", d.Kind)
		case seen[d.Kind]:
			return fmt.Errorf("pci: %s is there twice", d.Kind)
		case d.Count < 0 || d.Count > k.count:
			return fmt.Errorf("pci: %d devices of kind %s: the most is %d", d.Count, d.Kind, k.count)
		case d.Vectors < 0 || d.Vectors > MaxVectors:
			return fmt.Errorf("pci: %s with %d vectors: the most is %d", d.Kind, d.Vectors, MaxVectors)
		case d.BAR != 0 && (r.Machine == QEMU || !isBAR(d.BAR)):
			return fmt.Errorf("pci: %s with a BAR of %d bytes on machine %s: want a power of two from %d to %d, none for %s", d.Kind, d.BAR, r.Machine, MinBAR, MaxBAR, QEMU)
		}
		seen[d.Kind] = true
	}
	return nil
}

func isBAR(n uint64) bool { return n >= MinBAR && n <= MaxBAR && n&(n-1) == 0 }

// Assign gives each device its place.
func Assign(r Request) (Topology, error) {
	if err := r.Check(); err != nil {
		return Topology{}, err
	}
	t := Topology{Machine: r.Machine, Places: []Place{}}
	for _, d := range r.Devices {
		for i := range d.Count {
			p := Place{Kind: d.Kind, Index: i, Slot: kinds[d.Kind].first + i, Vectors: d.Vectors}
			if d.BAR != 0 {
				p.BAR, p.Size = WindowBase+uint64(p.Slot)*windowShare, d.BAR
			}
			if r.Machine == Native && d.Vectors > 0 {
				p.Route = FirstRoute + uint32(p.Slot)*routeShare
			}
			t.Places = append(t.Places, p)
		}
	}
	return t, nil
}

// Check says why no bus can be built from a topology, however it was made: places that overlap or
// lie outside what there is.
func (t Topology) Check() error {
	if t.Machine != Native && t.Machine != QEMU {
		return fmt.Errorf("pci: machine %q: want %s or %s", t.Machine, Native, QEMU)
	}
	for i, p := range t.Places {
		if err := p.check(t.Machine); err != nil {
			return err
		}
		for _, o := range t.Places[:i] { // of at most Slots, or a slot was found taken
			if what := p.collides(o); what != "" {
				return fmt.Errorf("pci: %s[%d] and %s[%d] overlap: %s", p.Kind, p.Index, o.Kind, o.Index, what)
			}
		}
	}
	return nil
}

func (p Place) check(m Machine) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("pci: %s[%d]: %s", p.Kind, p.Index, fmt.Sprintf(format, args...))
	}
	if _, ok := kinds[p.Kind]; !ok || p.Index < 0 || p.Index >= Slots {
		return fmt.Errorf("pci: there is no device %q[%d]", p.Kind, p.Index)
	}
	if p.Slot < firstSlot || p.Slot > lastSlot {
		return bad("slot %d: want %d to %d", p.Slot, firstSlot, lastSlot)
	}
	if p.Vectors < 0 || p.Vectors > MaxVectors {
		return bad("%d vectors: the most is %d", p.Vectors, MaxVectors)
	}
	if m == QEMU {
		if p.BAR != 0 || p.Size != 0 || p.Route != 0 {
			return bad("firmware places its BAR, and no route is assigned")
		}
		return nil
	}
	switch {
	case p.Size == 0 && p.BAR != 0, p.Size != 0 && !isBAR(p.Size):
		return bad("BAR of %d bytes at %#x", p.Size, p.BAR)
	case p.Size != 0 && (p.BAR%p.Size != 0 || p.BAR < WindowBase || p.BAR > WindowBase+WindowSize-p.Size):
		return bad("BAR of %d bytes at %#x: not aligned, or outside the window", p.Size, p.BAR)
	case p.Vectors == 0 && p.Route != 0:
		return bad("route %d for no vector", p.Route)
	case p.Vectors > 0 && (p.Route < FirstRoute || p.Route > FirstRoute+Routes-uint32(p.Vectors)):
		return bad("routes from %d for %d vectors: want %d to %d", p.Route, p.Vectors, FirstRoute, FirstRoute+Routes-1)
	}
	return nil
}

// collides says what two places, each checked, have in common that they may not; "" for nothing.
func (p Place) collides(o Place) string {
	switch {
	case p.Kind == o.Kind && p.Index == o.Index:
		return "the same device"
	case p.Slot == o.Slot:
		return fmt.Sprintf("slot %d", p.Slot)
	case p.BAR < o.BAR+o.Size && o.BAR < p.BAR+p.Size:
		return fmt.Sprintf("BARs at %#x and %#x", p.BAR, o.BAR)
	case p.Route < o.Route+uint32(o.Vectors) && o.Route < p.Route+uint32(p.Vectors) && p.Route != 0:
		return fmt.Sprintf("routes from %d and %d", p.Route, o.Route)
	}
	return ""
}

// Holds says why a topology is not a bus of just the devices of a request: one has no place or not
// what it needs there, a place has no device, or places overlap.
func (t Topology) Holds(r Request) error {
	if err := r.Check(); err != nil {
		return err
	}
	if err := t.Check(); err != nil {
		return err
	}
	if t.Machine != r.Machine {
		return fmt.Errorf("pci: a topology for machine %s, not %s", t.Machine, r.Machine)
	}
	left := len(t.Places)
	for _, d := range r.Devices {
		for i := range d.Count {
			p, ok := t.Find(d.Kind, i)
			if !ok {
				return fmt.Errorf("pci: %s[%d] has no place", d.Kind, i)
			}
			if p.Size != d.BAR || p.Vectors != d.Vectors {
				return fmt.Errorf("pci: %s[%d] has a place for a BAR of %d bytes and %d vectors and needs %d and %d", d.Kind, i, p.Size, p.Vectors, d.BAR, d.Vectors)
			}
			left--
		}
	}
	if left != 0 {
		return fmt.Errorf("pci: %d places without a device", left)
	}
	return nil
}

// Find is a device's place.
func (t Topology) Find(k Kind, index int) (Place, bool) {
	for _, p := range t.Places {
		if p.Kind == k && p.Index == index {
			return p, true
		}
	}
	return Place{}, false
}
