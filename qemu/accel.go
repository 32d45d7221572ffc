package qemu

import (
	"fmt"
	"os"
)

// Accel is how QEMU runs the guest's processors.
type Accel string

// The accelerators.
const (
	KVM Accel = "kvm"
	TCG Accel = "tcg" // software emulation: everywhere, about ten times slower
)

// ChooseAccel is KVM where it can run guests, else TCG with the reason. A /dev/kvm alone says
// little: modules other than the processor vendors' own (a paravirtual one inside a cloud
// machine, say) offer it and cannot run an unmodified Linux.
func ChooseAccel() (accel Accel, why string) { return chooseAccel("/sys/module", "/dev/kvm") }

func chooseAccel(modules, device string) (Accel, string) {
	vendor := ""
	for _, m := range []string{"kvm_intel", "kvm_amd"} {
		if _, err := os.Stat(modules + "/" + m); err == nil {
			vendor = m
		}
	}
	if vendor == "" {
		return TCG, "neither kvm_intel nor kvm_amd is loaded"
	}
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return TCG, err.Error()
	}
	if err := f.Close(); err != nil {
		return TCG, fmt.Sprintf("%s: %v", device, err)
	}
	return KVM, vendor + " is loaded"
}
