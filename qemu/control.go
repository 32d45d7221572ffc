package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// Wait waits until the machine has ended and all its goroutines with it. The error says why,
// where the outcome alone does not.
func (m *Machine) Wait() (Outcome, error) {
	<-m.done
	return m.outcome, m.err
}

// Done is closed when the machine has ended.
func (m *Machine) Done() <-chan struct{} { return m.done }

// command runs one QMP command.
func (m *Machine) command(name string) error {
	return m.obeying(name, func(ctx context.Context) error { return m.qmp.Execute(ctx, name, nil, nil) })
}

// obeying calls f once QEMU obeys. The guest's first TPM command may ask for something while Start still connects: then it
// waits for that.
func (m *Machine) obeying(name string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	select {
	case <-m.ready:
	case <-m.done:
		return fmt.Errorf("qemu %s: %s: the machine has ended", m.config.Name, name)
	case <-ctx.Done():
		return fmt.Errorf("qemu %s: %s: not started", m.config.Name, name)
	}
	return f(ctx)
}

// Pause stops every vCPU and the guest's clock (QMP stop).
func (m *Machine) Pause() error {
	return m.obeying("stop", func(ctx context.Context) error { return m.rein.turn(ctx, true) })
}

// Resume lets them go on, as if no time had passed (QMP cont).
func (m *Machine) Resume() error {
	return m.obeying("cont", func(ctx context.Context) error { return m.rein.turn(ctx, false) })
}

// PowerButton presses the ACPI power button. The guest may ignore it.
func (m *Machine) PowerButton() error { return m.command("system_powerdown") }

// Quit ends QEMU in order (disks are flushed), whatever the guest does. Wait tells when.
func (m *Machine) Quit() error { return m.command("quit") }

// SetEventLog gives the event log of the host's measurements. With Direct it stands in the
// guest's log area before the guest sees its TPM's first response, and so before its driver
// looks for it. With firmware it is dropped: the firmware keeps that area for its own log.
func (m *Machine) SetEventLog(log []byte) error {
	if len(log) > maxLogArea {
		return fmt.Errorf("event log of %d bytes: at most %d", len(log), maxLogArea)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log = bytes.Clone(log)
	return nil
}

// beforeReply runs once, when the answer to the guest's first TPM command is about to be given:
// its ACPI tables exist by then (firmware made them), its TPM driver has not looked yet.
func (m *Machine) beforeReply() error {
	m.mu.Lock()
	log := m.log
	m.mu.Unlock()
	if m.config.Firmware != Direct || len(log) == 0 {
		return nil
	}
	return m.withRAM(func(r ram) error { return r.putLog(log) })
}

// ReadEventLog copies the guest's event log area: what SetEventLog put there, or the log of
// SeaBIOS. The rest of the area is zeros. OVMF keeps its log elsewhere and hands it to the guest
// through UEFI. The guest can change the area: only a quote over the PCRs vouches for it.
func (m *Machine) ReadEventLog() ([]byte, error) {
	var log []byte
	err := m.withRAM(func(r ram) (err error) {
		log, err = r.getLog()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("qemu %s: event log: %w", m.config.Name, err)
	}
	return log, nil
}

// withRAM calls f with the low part of guest memory.
func (m *Machine) withRAM(f func(ram) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ram == nil {
		return errors.New("the machine does not run")
	}
	return f(ram{m.ram, lowRAM(m.config.Memory)})
}
