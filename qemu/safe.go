package qemu

import (
	"bufio"
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Masked says which processors have interrupts switched off (RFLAGS.IF, Intel SDM volume 1, §3.4.3.3), but for those that
// the guest has never started. The machine is paused.
func (m *Machine) Masked() ([]int, error) {
	var text string
	err := m.obeying("info registers", func(ctx context.Context) (err error) {
		text, err = m.rein.tellRegisters(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("qemu %s: %w", m.config.Name, err)
	}
	masked, n, err := parseRegisters(text)
	if err == nil && n != m.config.CPUs {
		err = fmt.Errorf("registers of %d processors, not %d", n, m.config.CPUs)
	}
	if err != nil {
		return nil, fmt.Errorf("qemu %s: info registers: %w", m.config.Name, err)
	}
	return masked, nil
}

const (
	flagInterrupts = 1 << 9
	resetFlags     = 2      // RFLAGS after a reset
	resetIP        = 0xfff0 // and RIP: no kernel runs there
)

// parseRegisters reads what "info registers -a" prints: for each processor a line CPU#n and fields such as RIP=… and RFL=….
func parseRegisters(text string) (masked []int, processors int, err error) {
	var ip uint64
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "CPU#") {
			processors++
			continue
		}
		for _, field := range strings.Fields(line) {
			name, value, ok := strings.Cut(field, "=")
			if !ok || processors == 0 {
				continue
			}
			switch name {
			case "RIP", "EIP":
				if ip, err = strconv.ParseUint(value, 16, 64); err != nil {
					return nil, processors, fmt.Errorf("processor %d: %s: %w", processors-1, name, err)
				}
			case "RFL", "EFL":
				flags, err := strconv.ParseUint(value, 16, 64)
				if err != nil {
					return nil, processors, fmt.Errorf("processor %d: %s: %w", processors-1, name, err)
				}
				if flags&flagInterrupts == 0 && (flags != resetFlags || ip != resetIP) {
					masked = append(masked, processors-1)
				}
			}
		}
	}
	return masked, processors, lines.Err()
}
