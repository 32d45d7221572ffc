package monitor

import (
	"math/bits"

	"redoubt.dev/redoubt/kvm"
)

// CPUID bits (Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E).
const (
	leaf1VMX         = 1 << 5  // ECX
	leaf1TSCDeadline = 1 << 24 // ECX
	leaf1Hypervisor  = 1 << 31 // ECX
	leaf1HTT         = 1 << 28 // EDX
	extCmpLegacy     = 1 << 1  // 0x80000001 ECX
	extSVM           = 1 << 2
	extTopology      = 1 << 22
)

// cpuid is what vCPU id of n says: the host's features as KVM offers them, no nested
// virtualization, the kernel's timer without calibration, and every vCPU a core of one package.
func cpuid(supported []kvm.CPUIDEntry, id, n int, tscDeadline bool) []kvm.CPUIDEntry {
	width := uint32(bits.Len(uint(n - 1))) // of the core number in an APIC ID
	out := make([]kvm.CPUIDEntry, 0, len(supported)+2)
	for _, e := range supported {
		switch e.Function {
		case 1:
			e.EBX = e.EBX&0x0000_ffff | uint32(n)<<16 | uint32(id)<<24
			e.ECX = e.ECX&^(leaf1VMX|leaf1TSCDeadline) | leaf1Hypervisor
			if tscDeadline {
				e.ECX |= leaf1TSCDeadline
			}
			e.EDX &^= leaf1HTT
			if n > 1 {
				e.EDX |= leaf1HTT
			}
		case 4: // cache parameters: threads sharing, cores per package
			e.EAX &^= 0xffff_c000
			if level := e.EAX >> 5 & 7; level >= 3 {
				e.EAX |= (1<<width - 1) << 14
			}
			e.EAX |= (1<<width - 1) << 26
		case 0xb, 0x1f: // rebuilt below
			continue
		case 0x8000_0001:
			e.ECX &^= extSVM | extTopology | extCmpLegacy
			if n > 1 {
				e.ECX |= extCmpLegacy
			}
		case 0x8000_0008:
			e.ECX = width<<12 | uint32(n-1)
		case 0x8000_000a:
			e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0
		}
		out = append(out, e)
	}
	if len(supported) > 0 && supported[0].EAX >= 0xb {
		out = append(out,
			kvm.CPUIDEntry{Function: 0xb, Index: 0, Flags: kvm.SignificantIndex, EAX: 0, EBX: 1, ECX: 1 << 8, EDX: uint32(id)},
			kvm.CPUIDEntry{Function: 0xb, Index: 1, Flags: kvm.SignificantIndex, EAX: width, EBX: uint32(n), ECX: 2<<8 | 1, EDX: uint32(id)},
		)
	}
	return out
}
