package kept

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc/fdstore/fdstoretest"
	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/pci/topology"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
)

const uuid = "0b5ff3a6-0d8e-4a1c-9c41-0d7b4c2f6a01"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// file is one that says its name.
func file(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), name))
	must(t, err)
	t.Cleanup(func() { f.Close() })
	_, err = f.WriteString(name)
	must(t, err)
	return f
}

func is(t *testing.T, f *os.File, name string) {
	t.Helper()
	if f == nil {
		if name != "" {
			t.Errorf("no %s", name)
		}
		return
	}
	b := make([]byte, len(name)+1)
	if n, _ := f.ReadAt(b, 0); string(b[:n]) != name || name == "" {
		t.Errorf("%q, not %q", b[:n], name)
	}
	f.Close()
}

// TestGuest: a guest comes back as it was, whatever it has and lacks, and is forgotten as a whole.
func TestGuest(t *testing.T) {
	pci, err := topology.Assign(topology.Guest(topology.Native, 2, 1, true))
	must(t, err)
	for name, c := range map[string]struct {
		guest Guest
		run   Run
	}{
		"direct boot": {
			Guest{
				Kernel: file(t, "kernel"), Profile: file(t, "profile"), Console: file(t, "console"), Channel: file(t, "channel"),
				Ends:  []*os.File{file(t, "end 0"), file(t, "end 1"), file(t, "log")},
				Disks: []*os.File{file(t, "disk 0"), file(t, "disk 1")}, Bases: []*os.File{nil, file(t, "base 1")},
				Changes: []*os.File{file(t, "changes 0"), nil},
			},
			Run{Domain: 17, PID: 1234, QEMU: 1235, PCI: pci, Instance: audit.NewInstance("emulator", 1234), Memory: file(t, "memory")},
		},
		"firmware, rebooting": {
			Guest{Firmware: file(t, "firmware"), Vars: file(t, "vars"), Console: file(t, "console"), Channel: file(t, "channel")},
			Run{Domain: 18, PCI: pci, Asked: true, Exit: &protocol.Exit{Outcome: protocol.Reboot, Reason: "r"}, Over: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			keeper := fdstoretest.New(t)
			store, _ := keeper.Next()
			c.guest.Build = protocol.Build{UUID: uuid, Spec: spec.Guest{Name: "web", Memory: 128 << 20}}
			c.guest.Tenant, c.guest.Emulator = "acme", spec.QEMU
			must(t, c.guest.Keep(store))
			must(t, c.run.Keep(store, uuid))
			must(t, c.run.Keep(store, uuid)) // as it is now
			config := []network.NIC{{ID: 7, VLAN: 10}}
			must(t, KeepNICs(store, uuid, config, []*os.File{file(t, "tun")}))
			begun := time.Unix(1000, 0).UTC()
			for n := range 12 {
				KeepMoment(store, n, protocol.Event{UUID: uuid, Kind: "event", Time: begun.Add(time.Duration(n) * time.Second)})
			}

			store, left := keeper.Next()
			if all := Left(left); len(all) != 1 || all[0] != uuid {
				t.Fatalf("left: %v", all)
			}
			g, r, timeline, err := Take(left, uuid)
			must(t, err)
			if g.Build.Spec.Name != "web" || g.Build.Spec.Memory != 128<<20 || g.Tenant != "acme" || g.Emulator != spec.QEMU {
				t.Errorf("%+v", g)
			}
			files, want := g.files(), c.guest.files()
			if len(files) != len(want) {
				t.Fatalf("%d files, not %d", len(files), len(want))
			}
			for i, f := range want {
				name := ""
				if f != nil {
					name = filepath.Base(f.Name())
				}
				is(t, files[i], name)
			}
			if !c.run.Over {
				is(t, r.Memory, "memory")
			}
			c.run.Memory, r.Memory = nil, nil
			if !reflect.DeepEqual(*r, c.run) {
				t.Errorf("%+v, not %+v", *r, c.run)
			}
			if len(timeline) != 12 || !timeline[11].Time.Equal(begun.Add(11*time.Second)) {
				t.Errorf("timeline %v", timeline)
			}
			nics, tuns, err := TakeNICs(left, uuid)
			must(t, err)
			if !reflect.DeepEqual(nics, config) || len(tuns) != 1 {
				t.Fatalf("%v, %v", nics, tuns)
			}
			is(t, tuns[0], "tun")
			Drop(store, uuid, len(timeline))
			if n := keeper.Len(); n > 0 {
				t.Errorf("%d entries are left", n)
			}
		})
	}
}

// TestNeverRan: what is kept of a guest whose first start did not come to its end is not taken, nor is what does not
// fit together.
func TestNeverRan(t *testing.T) {
	keeper := fdstoretest.New(t)
	store, _ := keeper.Next()
	g := Guest{Build: protocol.Build{UUID: uuid}, Console: file(t, "console")}
	must(t, g.Keep(store))
	store, left := keeper.Next()
	if _, r, _, err := Take(left, uuid); r != nil || err != nil {
		t.Errorf("%v, %v", r, err)
	}
	pci, err := topology.Assign(topology.Guest(topology.Native, 1, 0, true))
	must(t, err)
	run := Run{PCI: pci, Memory: file(t, "memory")}
	for name, spoil := range map[string]func() error{
		"a descriptor too many": func() error {
			return store.Put(guestEntry(uuid), savedGuest{Guest: &g, Has: make([]bool, 7)}, run.Memory)
		},
		"a disk too many": func() error {
			return store.Put(guestEntry(uuid), savedGuest{Guest: &g, Has: make([]bool, 7), Disks: 1})
		},
		"a negative disk": func() error {
			return store.Put(guestEntry(uuid), savedGuest{Guest: &g, Has: make([]bool, 5), Disks: -1})
		},
		"no text":   func() error { return store.Put(guestEntry(uuid), 7) },
		"no memory": func() error { return store.Put(runEntry(uuid), run) },
	} {
		must(t, g.Keep(store))
		must(t, run.Keep(store, uuid))
		must(t, spoil())
		if store, left = keeper.Next(); len(Left(left)) != 1 {
			t.Fatal("no guest")
		}
		if _, r, _, err := Take(left, uuid); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
