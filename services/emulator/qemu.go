package emulator

import (
	"context"
	"time"

	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/services/foreign"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/spec"
	"redoubt.dev/redoubt/vtpm/frontend"
)

// qemuMachine is a guest under QEMU.
type qemuMachine struct {
	*qemu.Machine
	g *guest
}

func newQEMU(g *guest) (machine, error) {
	c := qemu.Config{
		Name: g.in.Name, Memory: g.in.Memory, CPUs: g.in.CPUs, Accel: qemu.TCG,
		CommandLine: g.in.Cmdline, PCI: &g.in.PCI, Starter: foreign.Starter{Builder: g.service.peer},
	}
	if g.in.KVM {
		c.Accel = qemu.KVM
	}
	switch g.in.Firmware {
	case spec.SeaBIOS:
		c.Firmware, c.BootMenu = qemu.SeaBIOS, bootMenu
	case spec.OVMF:
		c.Firmware, c.BootMenu = qemu.OVMF, bootMenu
	}
	if one(g.files, protocol.FileTPM) == nil {
		c.TPM = qemu.NoTPM
	}
	m := qemu.New(c, qemu.Hooks{FirstTPM: func() {
		g.service.event(protocol.EventFirstAccess, "")
		g.xenbus.connect()
	}})
	return &qemuMachine{m, g}, nil
}

// bootMenu is how long firmware offers its menu, from which its TPM menu is reached.
const bootMenu = 3 * time.Second

// transport is nil without a TPM: a nil *Frontend in an interface would not be.
func transport(f *frontend.Frontend) qemu.Transport {
	if f == nil {
		return nil
	}
	return f
}

func (m *qemuMachine) Run(ctx context.Context, tpm *frontend.Frontend, started func()) protocol.Exit {
	files := qemu.Files{
		RAM: one(m.g.files, protocol.FileMemory), Kernel: one(m.g.files, protocol.FileKernel),
		Initrd: one(m.g.files, protocol.FileInitrd), Console: one(m.g.files, protocol.FileConsole),
		Channel: one(m.g.files, protocol.FileChannel),
		Code:    one(m.g.files, protocol.FileCode), Vars: one(m.g.files, protocol.FileVars),
	}
	disks, ended, err := m.g.relayDisks(ctx)
	if err != nil {
		return protocol.Exit{Outcome: protocol.Crashed, Reason: err.Error()}
	}
	defer ended()
	nics, nicsEnded, err := m.g.relayNICs(ctx)
	if err != nil {
		return protocol.Exit{Outcome: protocol.Crashed, Reason: err.Error()}
	}
	defer nicsEnded()
	files.Disks, files.NICs = disks, nics
	if err := m.Start(ctx, files, transport(tpm)); err != nil {
		return protocol.Exit{Outcome: protocol.Crashed, Reason: err.Error()}
	}
	started()
	outcome, err := m.Wait()
	exit := protocol.Exit{Outcome: protocol.Outcome(outcome)}
	if outcome == qemu.Crash {
		exit.Outcome = protocol.Crashed
	}
	exit.Reason = reasons[exit.Outcome]
	if err != nil {
		exit.Reason = err.Error()
	}
	return exit
}

func (m *qemuMachine) Close() error { return nil }

var reasons = map[protocol.Outcome]string{
	protocol.PowerOff: "the guest powered off",
	protocol.Reboot:   "the guest asked for a reboot",
	protocol.Stopped:  "ended by the operator",
	protocol.Crashed:  "the guest crashed",
}
