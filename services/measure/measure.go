// Package measure says as an event log what the Builder gives to a guest: the sealed bytes that it boots, and what its machine
// looks like. Nothing else is in it, so that it is the same at each of the guest's starts.
package measure

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/services/emulator/kept"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/version"
)

// machine is the configuration that PCR 1 stands for: what the guest's hardware looks like and how its modules are isolated,
// not where its disks lie.
type machine struct {
	Emulator spec.Emulator `json:"emulator"`
	CPUs     int           `json:"cpus"`
	Memory   spec.Size     `json:"memory"`
	Firmware spec.Firmware `json:"firmware,omitempty"`
	Disks    []bool        `json:"disksReadOnly,omitempty"`
	Modules  *modules      `json:"modules,omitempty"`
}

// modules is what becomes of the guest's modules. Profiles are measured by their file's bytes, whatever is in them.
type modules struct {
	*spec.Modules
	ProfileSHA256 string `json:"profileSHA256,omitempty"`
}

// Log makes the event log of a guest, whose measured files it reads whole.
func Log(g *kept.Guest) ([]byte, error) {
	config, err := configuration(g)
	if err != nil {
		return nil, err
	}
	events, err := events(g, version.Monitor(string(g.Emulator)), config)
	if err != nil {
		return nil, err
	}
	return eventlog.Encode(events)
}

// configuration is the guest's machine in its one form.
func configuration(g *kept.Guest) ([]byte, error) {
	s := &g.Build.Spec
	m := machine{Emulator: g.Emulator, CPUs: s.CPUs, Memory: s.Memory, Firmware: s.Boot.Firmware}
	for _, d := range s.Disks {
		m.Disks = append(m.Disks, d.ReadOnly)
	}
	if s.Modules != nil {
		m.Modules = &modules{Modules: s.Modules.Policy()}
		profile, err := content(g.Profile)
		if err != nil {
			return nil, err
		}
		if profile != nil {
			h := sha256.New()
			if _, err := io.Copy(h, profile); err != nil {
				return nil, err
			}
			m.Modules.ProfileSHA256 = hex.EncodeToString(h.Sum(nil))
		}
	}
	return json.Marshal(m)
}

func events(g *kept.Guest, version string, config []byte) ([]eventlog.Event, error) {
	banks, err := eventlog.ParseBanks(g.Build.Spec.TPM.Banks)
	if err != nil {
		return nil, err
	}
	if g.Firmware != nil {
		image, err := content(g.Firmware)
		if err != nil {
			return nil, err
		}
		return eventlog.BootFirmware(eventlog.FirmwareConfig{MonitorVersion: version, MachineConfig: config, Firmware: image, Banks: banks})
	}
	kernel, err := content(g.Kernel)
	if err != nil {
		return nil, err
	}
	initrd, err := content(g.Initrd)
	if err != nil {
		return nil, err
	}
	return eventlog.Boot(eventlog.BootConfig{
		MonitorVersion: version, MachineConfig: config,
		Kernel: kernel, Initrd: initrd, Cmdline: g.Build.Spec.Boot.Cmdline, Banks: banks,
	})
}

// content reads a file from its start; nil has none.
func content(f *os.File) (io.Reader, error) {
	if f == nil {
		return nil, nil
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.NewSectionReader(f, 0, st.Size()), nil
}
