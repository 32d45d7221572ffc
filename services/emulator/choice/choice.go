// Package choice settles which emulator runs a guest on this host.
package choice

import (
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/qemu"
	"redoubt.dev/redoubt/spec"
)

// HaveKVM reports whether KVM can run guests here: QEMU then uses it too.
func HaveKVM() bool {
	accel, _ := qemu.ChooseAccel()
	return accel == qemu.KVM
}

// Of settles which emulator runs a guest.
func Of(g *spec.Guest) (spec.Emulator, error) {
	accel, why := qemu.ChooseAccel()
	if g.Modules != nil && accel != qemu.KVM {
		return "", rpc.Errorf(rpc.Unavailable, "modules: only the native monitor isolates them, and it needs KVM, %s: leave modules out (see `redoubt doctor`)", why)
	}
	switch g.Emulator {
	case spec.QEMU:
		return spec.QEMU, nil
	case spec.Native:
		if accel != qemu.KVM {
			return "", rpc.Errorf(rpc.Unavailable, "emulator: native needs KVM, %s: use emulator auto or qemu (see `redoubt doctor`)", why)
		}
		return spec.Native, nil
	}
	if accel == qemu.KVM && g.Boot.Firmware == "" {
		return spec.Native, nil
	}
	return spec.QEMU, nil
}
