package kept

import (
	"fmt"
	"os"

	"redoubt.dev/redoubt/ipc/fdstore"
	"redoubt.dev/redoubt/services/protocol"
)

// devices begins the names of what is kept of guests' vTPMs.
const devices = "vtpm/"

// saved is what is kept of a device beside its descriptors: the journal, the channel if it is attached,
// the engine's if there is one.
type saved struct {
	Attach   protocol.Attach `json:"attach"`
	Attached bool            `json:"attached"`
	PID      int             `json:"pid"` // of the engine; 0: none
}

// save keeps a device as it is now; m.mu is held.
func (m *Manager) save(uuid string, d *device) error {
	files := []*os.File{d.journal}
	if d.channel != nil {
		files = append(files, d.channel)
	}
	files = append(files, d.engine...)
	return m.o.Kept.Put(devices+uuid, saved{d.attach, d.channel != nil, d.pid}, files...)
}

// forget gives a device up; m.mu is held.
func (m *Manager) forget(uuid string, d *device) {
	m.o.Kept.Drop(devices + uuid)
	d.close()
	delete(m.devices, uuid)
}

func (d *device) close() {
	d.closeChannel()
	for _, f := range d.engine {
		f.Close()
	}
	d.engine, d.pid = nil, 0
	d.journal.Close()
}

// Devices are guests' vTPMs, by UUID.
type Devices map[string]*device

// Left takes what a Builder that died has left of guests' vTPMs. Of each device with an emulator, runs says
// whether it is the guest's that runs; a device of a guest that is no more is not taken. engine goes on
// with an engine's process; one that is lost is as good as dead.
func Left(left *fdstore.Left, guest func(uuid string) bool, runs func(protocol.Attach) bool, engine func(pid int) error) (Devices, error) {
	out := Devices{}
	for _, name := range left.Names(devices) {
		uuid := name[len(devices):]
		if !guest(uuid) {
			continue
		}
		e, _ := left.Take(name)
		var s saved
		want := 1
		if err := e.Decode(&s, len(e.Files)); err != nil {
			return nil, err
		}
		if s.Attached {
			want++
		}
		if s.PID != 0 {
			want += len(engineFiles)
		}
		if len(e.Files) != want {
			return nil, fmt.Errorf("kept %s: %d descriptors, not %d", name, len(e.Files), want)
		}
		d := &device{journal: e.Files[0], attach: s.Attach}
		rest := e.Files[1:]
		if s.Attached {
			// Whoever was provisioning it is gone.
			d.channel, d.stage, rest = rest[0], provisioned, rest[1:]
			if !runs(s.Attach) {
				d.closeChannel()
			}
		}
		if s.PID != 0 {
			d.engine, d.pid = rest, s.PID
			if err := engine(s.PID); err != nil {
				for _, f := range d.engine {
					f.Close()
				}
				d.engine, d.pid = nil, 0
			}
		}
		out[uuid] = d
	}
	return out, nil
}
