// Package lab runs commands and test binaries in the nested test machine, where KVM is real.
//
// Most development machines have no usable KVM. The lab is a first-level machine (L1) under
// QEMU's software emulation with nested AMD-V: kvm_amd loads in it, and a monitor's guest (L2)
// runs as on hardware, only slower. L1's root is this host's root, read-only over 9p beneath a
// tmpfs, so that every file here is there too and nothing written there comes back. Output
// leaves L1 over a virtio port, and the exit status over a second one that only L1's init
// opens.
//
// A test that needs KVM calls [NeedsKVM] once, first. `lab test` runs it: natively where kvm_intel
// or kvm_amd is loaded, in the lab elsewhere; it is never skipped silently.
package lab

import (
	"os"
)

// Environment variables of the lab.
const (
	// InLab is "1" inside L1.
	InLab = "REDOUBT_IN_LAB"
	// Later is set to "1" by a test run that is followed by `lab test`.
	Later = "REDOUBT_LAB_LATER"
)

// TB is the part of testing.TB that NeedsKVM uses.
type TB interface {
	Helper()
	Skip(args ...any)
	Fatal(args ...any)
}

// KVM reports whether this machine runs guests of its own: /dev/kvm opens and one of the
// hardware modules stands behind it. The device alone says little: other modules serve it
// too, and ordinary guests do not run on them.
func KVM() bool {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	_ = f.Close()
	for _, m := range []string{"kvm_intel", "kvm_amd"} {
		if _, err := os.Stat("/sys/module/" + m); err == nil {
			return true
		}
	}
	return false
}

// NeedsKVM declares that the test runs guests on KVM. Where there is none the test fails. It is
// skipped only where the caller of `go test` has promised to run it by `lab test` (Later).
func NeedsKVM(t TB) {
	t.Helper()
	switch {
	case os.Getenv(InLab) == "1" && !KVM():
		t.Fatal("in the lab, but KVM is not usable: see L1's console")
	case os.Getenv(Later) == "1":
		t.Skip("needs KVM: `make lab-tests` runs it, natively where KVM is usable, else in the lab")
	case KVM():
	default:
		t.Fatal("this host runs no KVM guests: run `go run ./lab/cmd/lab test PACKAGE`")
	}
}
