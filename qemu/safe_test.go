package qemu

import (
	"fmt"
	"slices"
	"testing"
)

const registers = `
CPU#0
RAX=ffffffff9b2f7a60 RBX=0000000000000000 RCX=0000000000000000 RDX=0000000000000000
RIP=ffffffff9b2f7c6b RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
ES =0000 0000000000000000 00000000 00000000

CPU#1
RIP=ffffffff81000000 RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0

CPU#2
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=1
`

// TestRegisters: whose interrupts are off is read from what QEMU prints; a processor that was never started does not count.
func TestRegisters(t *testing.T) {
	masked, n, err := parseRegisters(registers)
	if err != nil || n != 3 || !slices.Equal(masked, []int{1}) {
		t.Error(masked, n, err)
	}
	if _, _, err := parseRegisters("CPU#0\nRIP=x RFL=2\n"); err == nil {
		t.Error("nonsense was taken for a register")
	}
	if _, n, err := parseRegisters(""); n != 0 || err != nil {
		t.Error(n, err)
	}
}

// FuzzRegisters: whatever it prints is read within bounds.
func FuzzRegisters(f *testing.F) {
	f.Add(registers)
	f.Add("CPU#0\nRFL=")
	f.Fuzz(func(t *testing.T, text string) {
		masked, n, err := parseRegisters(text)
		for _, cpu := range masked {
			if err == nil && (cpu < 0 || cpu >= n) {
				t.Error(fmt.Sprint(masked, n))
			}
		}
	})
}
