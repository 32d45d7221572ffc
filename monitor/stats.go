package monitor

import "redoubt.dev/redoubt/kvm"

// area is what an access went to.
type area int

const (
	areaSerial area = iota
	areaACPI
	areaOtherPort
	areaTPM
	areaConfig
	areaBAR
	areaFenced
	areaOtherMemory
	numAreas
)

var areaNames = [numAreas]string{"serial", "acpi", "other ports", "tpm", "pci config", "pci bars", "modules' code", "other memory"}

// Stats counts what the guest cost since the start.
type Stats struct {
	Exits        map[string]uint64 // by the kernel's reason; reasons never met are absent
	Accesses     map[string]uint64 // by what the guest touched
	ConsoleBytes uint64            // written by the guest
}

// Stats may be called at any time.
func (m *Machine) Stats() Stats {
	s := Stats{Exits: map[string]uint64{}, Accesses: map[string]uint64{}, ConsoleBytes: m.serial.Written()}
	for _, c := range m.vcpus {
		for r := range c.exits {
			if n := c.exits[r].Load(); n > 0 {
				s.Exits[kvm.Reason(r).String()] += n
			}
		}
		for a := range c.areas {
			if n := c.areas[a].Load(); n > 0 {
				s.Accesses[areaNames[a]] += n
			}
		}
	}
	return s
}
