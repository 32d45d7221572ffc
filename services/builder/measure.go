package builder

import (
	"encoding/json"
	"io"
	"os"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/version"
)

// machine is the configuration that PCR 1 stands for: what the guest's hardware looks like,
// not where its disks lie.
type machine struct {
	Emulator spec.Emulator `json:"emulator"`
	CPUs     int           `json:"cpus"`
	Memory   spec.Size     `json:"memory"`
	Firmware spec.Firmware `json:"firmware,omitempty"`
	Disks    []bool        `json:"disksReadOnly,omitempty"`
}

// measure makes the event log of the sealed bytes the guest was given, once: a reboot gives
// it the same ones.
func (g *guest) measure() error {
	if g.log != nil {
		return nil
	}
	m := machine{Emulator: g.Emulator, CPUs: g.Build.Spec.CPUs, Memory: g.Build.Spec.Memory, Firmware: g.Build.Spec.Boot.Firmware}
	for _, d := range g.Build.Spec.Disks {
		m.Disks = append(m.Disks, d.ReadOnly)
	}
	config, err := json.Marshal(m)
	if err != nil {
		return err
	}
	version := version.Monitor(string(g.Emulator))
	events, err := g.events(version, config)
	if err != nil {
		return err
	}
	g.log, err = eventlog.Encode(events)
	return err
}

func (g *guest) events(version string, config []byte) ([]eventlog.Event, error) {
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
