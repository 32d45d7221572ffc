// Package probe turns the place that a traceable kernel function keeps for ftrace into a trap: a write to a port, which ends
// KVM_RUN on every processor, needs no single step and no breakpoint, and leaves every register as it was.
//
// Source: Linux, arch/x86/kernel/ftrace.c (the 5-byte no-op at the start of each function, behind endbr64 where the
// kernel has that); Intel SDM volume 2, OUT, NOP, ENDBR64.
package probe

import (
	"bytes"
	"errors"
)

// Port is the one that traps write to. Nothing of a PC is there; which trap it was, the address says.
const Port = 0xf5

// Size is how many bytes of a function's start may be looked at.
const Size = 4 + len5

const len5 = 5

// ErrNoPlace says that a function does not begin with a place for ftrace, or that the place is in use.
var ErrNoPlace = errors.New("the function has no free place for a probe")

var (
	nop5 = []byte{0x0f, 0x1f, 0x44, 0x00, 0x00}
	trap = []byte{0xe6, Port, 0x0f, 0x1f, 0x00} // out %al,$Port; nopl (%rax)

	// What may stand before it: endbr64, or what the kernel has put in its place where nothing calls it indirectly.
	before = [][]byte{nil, {0xf3, 0x0f, 0x1e, 0xfa}, {0x0f, 0x1f, 0x40, 0x00}, {0x66, 0x0f, 0x1f, 0x00}, {0xd6, 0x0f, 0x1f, 0x00}}
)

// Plant puts a trap into the first bytes of a function, of which there are Size, and says at which of them it is.
func Plant(code []byte) (at int, err error) {
	for _, b := range before {
		if n := len(b); len(code) >= n+len5 && bytes.Equal(code[:n], b) && bytes.Equal(code[n:n+len5], nop5) {
			copy(code[n:], trap)
			return n, nil
		}
	}
	return 0, ErrNoPlace
}

// Remove takes a trap away that Plant put at such an offset; it leaves alone what is none.
func Remove(code []byte, at int) {
	if len(code) >= at+len5 && bytes.Equal(code[at:at+len5], trap) {
		copy(code[at:], nop5)
	}
}
