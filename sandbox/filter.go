package sandbox

// The compiler from a Policy to a seccomp filter: a classic BPF program over struct seccomp_data
// (seccomp(2), linux/seccomp.h). Pure: the tests run its output in golang.org/x/net/bpf's
// virtual machine.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data; an argument is 8 bytes, its low half first (little endian).
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

// x32Bit marks calls of the x32 ABI, which share the architecture's number with x86-64.
const x32Bit = 0x40000000

// maxFilter is BPF_MAXINSNS, the kernel's limit.
const maxFilter = 4096

// compile makes the filter. Calls that no rule allows or answers end in action.
//
// Each call has one block: its rules in order, the first that matches decides. Blocks are
// linear: the kernel keeps a bitmap of calls that are always allowed and runs no filter for
// them (since 5.11), so the search costs only calls with conditions.
func compile(p *Policy, action uint32) ([]bpf.RawInstruction, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_X86_64, SkipTrue: 1},
		bpf.RetConstant{Val: action},
		bpf.LoadAbsolute{Off: offNumber, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: x32Bit, SkipTrue: 1},
		bpf.RetConstant{Val: action},
	}
	for _, nr := range p.calls() {
		block := []bpf.Instruction{}
		for _, r := range p.rules {
			if r.number == nr {
				block = append(block, r.compile()...)
			}
		}
		if _, ends := block[len(block)-1].(bpf.RetConstant); !ends || !p.unconditional(nr) {
			block = append(block, bpf.RetConstant{Val: action})
		}
		// A conditional jump reaches 255 instructions, a plain one all.
		prog = append(prog,
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: nr, SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(block))})
		prog = append(prog, block...)
	}
	prog = append(prog, bpf.RetConstant{Val: action})
	if len(prog) > maxFilter {
		return nil, fmt.Errorf("seccomp list %s: %d instructions, the kernel takes %d", p.Name, len(prog), maxFilter)
	}
	return bpf.Assemble(prog)
}

// instructionSize is that of a struct sock_filter (linux/filter.h): code, jt, jf, k.
const instructionSize = 8

func encodeFilter(filter []bpf.RawInstruction) []byte {
	b := make([]byte, 0, instructionSize*len(filter))
	for _, f := range filter {
		b = append(binary.LittleEndian.AppendUint16(b, f.Op), f.Jt, f.Jf)
		b = binary.LittleEndian.AppendUint32(b, f.K)
	}
	return b
}

func decodeFilter(b []byte) ([]unix.SockFilter, error) {
	if len(b) == 0 || len(b)%instructionSize != 0 {
		return nil, fmt.Errorf("seccomp: a filter of %d bytes", len(b))
	}
	filter := make([]unix.SockFilter, len(b)/instructionSize)
	for i := range filter {
		f := b[i*instructionSize:]
		filter[i] = unix.SockFilter{Code: binary.LittleEndian.Uint16(f), Jt: f[2], Jf: f[3], K: binary.LittleEndian.Uint32(f[4:])}
	}
	return filter, nil
}

// compile makes a rule's code: the conditions, each of which skips the rest when it fails, and
// the answer.
func (r rule) compile() []bpf.Instruction {
	ret := uint32(unix.SECCOMP_RET_ALLOW)
	if r.errno != 0 {
		ret = unix.SECCOMP_RET_ERRNO | uint32(r.errno)
	}
	code := []bpf.Instruction{bpf.RetConstant{Val: ret}}
	for _, c := range slices.Backward(r.conds) {
		code = append(c.compile(len(code)), code...)
	}
	return code
}

// compile makes code that falls through when the condition holds and skips rest instructions
// after it when not.
func (c cond) compile(rest int) []bpf.Instruction {
	low := uint32(offArgs + 8*c.arg)
	var code []bpf.Instruction
	half := func(off, mask, want uint32, after int) {
		part := []bpf.Instruction{bpf.LoadAbsolute{Off: off, Size: 4}}
		if mask != ^uint32(0) {
			part = append(part, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: mask})
		}
		part = append(part, bpf.JumpIf{Cond: bpf.JumpEqual, Val: want, SkipFalse: uint8(rest + after)})
		code = append(part, code...)
	}
	half(low, uint32(c.mask), uint32(c.value), 0)
	if !c.word {
		half(low+4, uint32(c.mask>>32), uint32(c.value>>32), len(code))
	}
	return code
}

// check refuses a policy that cannot be meant.
func (p *Policy) check() error {
	if len(p.rules) == 0 {
		return errors.New("an empty seccomp list allows no program to run")
	}
	for _, need := range []string{"write", "exit_group"} {
		if !p.unconditional(numbers[need]) {
			return fmt.Errorf("seccomp list %s: %s must be allowed, the launcher uses it", p.Name, need)
		}
	}
	for _, never := range []string{"execve", "execveat"} {
		if slices.Contains(p.calls(), numbers[never]) {
			return fmt.Errorf("seccomp list %s: %s cannot be allowed, the launcher's own is let through once", p.Name, never)
		}
	}
	return nil
}

// calls are the numbers that the policy has rules for, in order.
func (p *Policy) calls() []uint32 {
	var out []uint32
	for _, r := range p.rules {
		out = append(out, r.number)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// unconditional says whether some rule of a call has no condition.
func (p *Policy) unconditional(nr uint32) bool {
	return slices.ContainsFunc(p.rules, func(r rule) bool { return r.number == nr && len(r.conds) == 0 })
}
