// Package qemu runs a guest under QEMU: for guests that need a full machine (firmware, a disk
// image that boots itself) and for hosts without a usable KVM.
//
// One [Machine] is one QEMU process and one life of the guest: a guest reset ends the process
// with the outcome [Reboot], and the caller starts a new one. QEMU is given every descriptor it
// may use (memory, kernel, disks, console, QMP, TPM); no socket has a path and QEMU's own
// seccomp filter forbids it to spawn or to gain privileges.
//
// The TPM of the guest is not QEMU's business: [TPM] speaks the emulator control protocol to
// QEMU, answers everything about the device's life from itself and at once, and forwards only
// the guest's TPM commands. QEMU therefore starts, and its guest runs, while no TPM exists yet.
//
// QEMU faces the guest and is not trusted: what it says over QMP and over the TPM sockets is
// bounded and checked.
package qemu
