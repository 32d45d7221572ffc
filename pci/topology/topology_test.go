package topology

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

// Every guest that a spec can ask for, with the largest devices there can be and with Redoubt's:
// nothing overlaps, every device has what it needs, nothing else is there, and what is added moves
// nothing.
func TestEveryGuest(t *testing.T) {
	where := map[Kind]map[int]Place{}
	for _, most := range []bool{false, true} {
		clear(where)
		for disks := range 17 {
			for nics := range 9 {
				r := Guest(Native, disks, nics, true)
				if most {
					for i := range r.Devices {
						r.Devices[i].BAR, r.Devices[i].Vectors = MaxBAR, MaxVectors
					}
				}
				top, err := Assign(r)
				if err != nil {
					t.Fatal(err)
				}
				if err := top.Holds(r); err != nil {
					t.Fatalf("%d disks, %d NICs: %v", disks, nics, err)
				}
				apart(t, top)
				for _, p := range top.Places {
					if where[p.Kind] == nil {
						where[p.Kind] = map[int]Place{}
					}
					if was, ok := where[p.Kind][p.Index]; ok && was != p {
						t.Fatalf("%d disks, %d NICs: %+v was %+v", disks, nics, p, was)
					}
					where[p.Kind][p.Index] = p
				}
				other, err := Assign(Guest(QEMU, disks, nics, false))
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range other.Places {
					if p.Slot != where[p.Kind][p.Index].Slot {
						t.Errorf("%s[%d] has slot %d under QEMU", p.Kind, p.Index, p.Slot)
					}
				}
			}
		}
	}
	if where[RNG][0].Slot != 1 || where[Channel][0].Slot != 2 || where[Disk][15].Slot != 18 || where[NIC][7].Slot != 26 {
		t.Errorf("the places of guests that exist have changed: %v", where)
	}
}

// apart holds places against one another by counting what each has, not by comparing bounds.
func apart(t *testing.T, top Topology) {
	t.Helper()
	slots, routes, pages := map[int]bool{}, map[uint32]bool{}, map[uint64]bool{}
	take := func(taken bool, what string, p Place) {
		if taken {
			t.Errorf("%s of %+v is taken", what, p)
		}
	}
	for _, p := range top.Places {
		take(slots[p.Slot] || p.Slot <= 0 || p.Slot >= 31, "the slot", p)
		slots[p.Slot] = true
		for v := range uint32(p.Vectors) {
			if top.Machine == QEMU {
				break // no route is assigned
			}
			r := p.Route + v
			take(routes[r] || r < 24 || r >= 24+1024, "a route", p)
			routes[r] = true
		}
		for a := p.BAR; a < p.BAR+p.Size; a += MinBAR {
			take(pages[a] || a < 0xc000_0000 || a >= 0xe000_0000, "a page", p)
			pages[a] = true
		}
	}
}

func TestRequestRefused(t *testing.T) {
	one := func(m Machine, d ...Devices) Request { return Request{m, d} }
	for _, c := range []struct {
		r    Request
		want string
	}{
		{one(""), "machine"},
		{one("xen"), "machine"},
		{one(Native, Devices{Kind: "gpu", Count: 1}), "no device of kind"},
		{one(Native, Devices{Kind: RNG}, Devices{Kind: RNG}), "twice"},
		{one(Native, Devices{Kind: Disk, Count: 17}), "most is 16"},
		{one(Native, Devices{Kind: NIC, Count: 9}), "most is 8"},
		{one(Native, Devices{Kind: RNG, Count: -1}), "-1 devices"},
		{one(Native, Devices{Kind: Disk, Count: 1, Vectors: -1}), "-1 vectors"},
		{one(Native, Devices{Kind: Disk, Count: 1, Vectors: 33}), "33 vectors"},
		{one(Native, Devices{Kind: Disk, Count: 1, BAR: 2048}), "BAR of 2048"},
		{one(Native, Devices{Kind: Disk, Count: 1, BAR: 3 << 12}), "BAR of 12288"},
		{one(Native, Devices{Kind: Disk, Count: 1, BAR: 32 << 20}), "BAR of 33554432"},
		{one(Native, Devices{Kind: Disk, Count: 1, BAR: 1 << 63}), "BAR of"},
		{one(QEMU, Devices{Kind: Disk, Count: 1, BAR: 4096}), "none for qemu"},
	} {
		if _, err := Assign(c.r); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.r, err, c.want)
		}
	}
}

// Every answer that no bus can be built from is refused, whoever made it.
func TestTopologyRefused(t *testing.T) {
	r := Guest(Native, 2, 2, true)
	for want, change := range map[string]func(*Topology){
		"machine":                     func(t *Topology) { t.Machine = "" },
		"not native":                  func(t *Topology) { *t, _ = Assign(Guest(QEMU, 2, 2, true)) },
		"firmware places":             func(t *Topology) { t.Machine = QEMU },
		"no device":                   func(t *Topology) { t.Places[0].Kind = "gpu" },
		`no device "disk"[99]`:        func(t *Topology) { t.Places[2].Index = 99 },
		"slot 0":                      func(t *Topology) { t.Places[1].Slot = 0 },
		"slot 31":                     func(t *Topology) { t.Places[1].Slot = 31 },
		"slot 32":                     func(t *Topology) { t.Places[1].Slot = 32 },
		"slot -1":                     func(t *Topology) { t.Places[1].Slot = -1 },
		"overlap: slot 3":             func(t *Topology) { t.Places[3].Slot = 3 },
		"the same device":             func(t *Topology) { t.Places[3].Index = 0 },
		"overlap: BARs":               func(t *Topology) { t.Places[3].BAR = t.Places[2].BAR },
		"overlap: BARs at 0xc3008000": func(t *Topology) { t.Places[2].Size = 0x10000; t.Places[3].BAR = t.Places[2].BAR + 0x8000 },
		"not aligned":                 func(t *Topology) { t.Places[3].BAR += 4096 },
		"0xdfff9000":                  func(t *Topology) { t.Places[3].BAR = 0xdfff_9000 },
		"0xe0000000":                  func(t *Topology) { t.Places[3].BAR = 0xe000_0000 },
		"0xbfff8000":                  func(t *Topology) { t.Places[3].BAR = 0xbfff_8000 },
		"0xffffffffffff8000":          func(t *Topology) { t.Places[3].BAR = 1<<64 - 0x8000 },
		"BAR of 0 bytes":              func(t *Topology) { t.Places[3].Size = 0 },
		"BAR of 12288":                func(t *Topology) { t.Places[3].Size = 12288 },
		"overlap: routes":             func(t *Topology) { t.Places[3].Route = t.Places[2].Route + 1 },
		"routes from 23":              func(t *Topology) { t.Places[3].Route = 23 },
		"routes from 1047":            func(t *Topology) { t.Places[3].Route = 1047 },
		"routes from 4294967295":      func(t *Topology) { t.Places[3].Route = 1<<32 - 1 },
		"for no vector":               func(t *Topology) { t.Places[3].Vectors = 0 },
		"-1 vectors":                  func(t *Topology) { t.Places[3].Vectors = -1 },
		"33 vectors":                  func(t *Topology) { t.Places[3].Vectors = 33 },
		"1 vectors and needs":         func(t *Topology) { t.Places[3].Vectors = 1 },
		"16384 bytes and 2":           func(t *Topology) { t.Places[3].Size = 16384 },
		"nic[1] has no place":         func(t *Topology) { t.Places = t.Places[:5] },
		"1 places without":            func(t *Topology) { t.Places = append(t.Places, Place{Kind: NIC, Index: 2, Slot: 27}) },
	} {
		top, err := Assign(r)
		if err != nil {
			t.Fatal(err)
		}
		change(&top)
		if err := top.Holds(r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

func TestMessageRefused(t *testing.T) {
	for text, want := range map[string]string{
		`{"machine":"native","devices":[{"kind":"disk","count":99}]}`:              "99 devices",
		`{"machine":"native","devices":[{"kind":"disk","count":1e99}]}`:            "at byte",
		`{"machine":"native","devices":[],"more":1}`:                               "unknown field",
		`{"machine":"native","devices":[` + strings.Repeat(" ", maxMessage) + `]}`: "bytes",
	} {
		var r Request
		if err := json.Unmarshal([]byte(text), &r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v, want %q", text, err, want)
		}
	}
	var top Topology
	if err := json.Unmarshal([]byte(`{"machine":"qemu","places":[{"kind":"nic","index":0,"slot":31}]}`), &top); err == nil || !strings.Contains(err.Error(), "slot 31") {
		t.Errorf("%v", err)
	}
}

// FuzzRequest: whatever is asked, the answer is none or one from which a bus can be built, and is
// read back as it is.
func FuzzRequest(f *testing.F) {
	for _, r := range []Request{Guest(Native, 16, 8, true), Guest(QEMU, 1, 2, false), {Machine: Native}} {
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Request
		if json.Unmarshal(b, &r) != nil {
			return
		}
		top, err := Assign(r)
		if err != nil {
			t.Fatalf("%s was read but cannot be assigned: %v", b, err)
		}
		if err := top.Holds(r); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		apart(t, top)
		text, err := json.Marshal(top)
		if err != nil {
			t.Fatal(err)
		}
		var again Topology
		if err := json.Unmarshal(text, &again); err != nil || !reflect.DeepEqual(again, top) {
			t.Fatalf("%s: %v", text, err)
		}
	})
}

// FuzzTopology: what is taken for a topology has nothing that overlaps.
func FuzzTopology(f *testing.F) {
	for _, r := range []Request{Guest(Native, 2, 1, true), Guest(QEMU, 1, 2, false)} {
		top, err := Assign(r)
		if err != nil {
			f.Fatal(err)
		}
		b, err := json.Marshal(top)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var top Topology
		if json.Unmarshal(b, &top) != nil {
			return
		}
		apart(t, top)
	})
}
