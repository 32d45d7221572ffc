// Package locked finds the atomic instruction behind a write that a view's exit tells of. KVM carries out a locked instruction on
// memory that the view may not write as a read and a later write, and tells of the write alone, when the instruction is over:
// what another processor has stored meanwhile would be lost.
//
// So from the registers behind it and what it has written follows what it did: whether memory, as it is now, could have been what
// it found (then it is swapped for what the instruction makes of it), and the registers with which it is tried again, if not.
//
// Source: Intel SDM volume 3A, 9.1.2.2 "Software Controlled Bus Locking", volume 2 for each instruction; Linux,
// arch/x86/kvm/emulate.c ("emulating exchange as write").
package locked

import (
	"golang.org/x/arch/x86/x86asm"
)

// A Write is what an exit tells: a write that is done, by an instruction that is over.
type Write struct {
	Code      []byte     // that lies before RIP, at most MaxLength bytes
	RIP       uint64     // behind the instruction
	Registers [16]uint64 // behind it, as instructions number them: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15
	Carry     bool       // behind it
	Address   uint64     // virtual, of what was written
	Size      int        // 1, 2, 4 or 8 bytes
	Value     uint64     // that was written
}

// MaxLength is how long an instruction is at most.
const MaxLength = 15

// An Op is the instruction.
type Op struct {
	// Apply says what it makes of a value of memory, and whether it would then have left the registers and flags that it did.
	Apply func(was uint64) (now uint64, same bool)
	// Length of the instruction, and Registers before it.
	Length    int
	Registers [16]uint64
}

// Find finds the atomic instruction that did a write. false: none of those that are known did, so that it was a plain one. (ADC and
// SBB, which nobody locks, and those on parts of registers that are not their lowest are not known.)
func Find(w Write) (Op, bool) {
	for length := min(len(w.Code), MaxLength); length >= 2; length-- { // all prefixes before fewer
		i, err := x86asm.Decode(w.Code[len(w.Code)-length:], 64)
		if err != nil || i.Len != length || i.MemBytes != w.Size || !isAtomic(i) {
			continue
		}
		if op, ok := w.op(i); ok {
			return op, true
		}
	}
	return Op{}, false
}

// isAtomic says whether an instruction is.
func isAtomic(i x86asm.Inst) bool {
	for _, p := range i.Prefix {
		if p&0xff == x86asm.PrefixLOCK {
			return true
		}
	}
	return i.Op == x86asm.XCHG
}

func (w Write) op(i x86asm.Inst) (op Op, ok bool) {
	mask := ^uint64(0) >> (64 - 8*w.Size)
	op.Registers, op.Length = w.Registers, i.Len
	source, isRegister := 0, false
	operand := uint64(0)
	m, isMemory := i.Args[0].(x86asm.Mem)
	other := i.Args[1]
	if !isMemory && i.Op == x86asm.XCHG { // either operand may be named first
		m, isMemory = i.Args[1].(x86asm.Mem)
		other = i.Args[0]
	}
	if !isMemory {
		return op, false
	}
	switch a := other.(type) {
	case x86asm.Reg:
		if source, isRegister = number(a, w.Size); !isRegister {
			return op, false
		}
		operand = w.Registers[source]
	case x86asm.Imm:
		operand = uint64(a)
	}
	address := m.Disp
	switch i.Op {
	case x86asm.XADD: // it has put what it found into its source
		was := operand & mask
		operand = w.Value - was
		op.Registers[source] = op.Registers[source]&^mask | operand&mask
		op.Apply = func(now uint64) (uint64, bool) { return w.Value, now&mask == was }
	case x86asm.XCHG:
		was := operand & mask
		op.Registers[source] = op.Registers[source]&^mask | w.Value&mask
		op.Apply = func(now uint64) (uint64, bool) { return w.Value, now&mask == was }
	case x86asm.CMPXCHG:
		expected := w.Registers[0] & mask
		op.Apply = func(now uint64) (uint64, bool) {
			if w.Value&mask == expected { // it found something else, which is in RAX now; or has written what was there
				return now, true
			}
			return w.Value, now&mask == expected
		}
	case x86asm.BTS, x86asm.BTR, x86asm.BTC:
		bits := uint64(8 * w.Size)
		if isRegister { // bits beyond the operand are in memory beyond it
			signed := int64(operand<<(64-bits)) >> (64 - bits)
			address += (signed >> 3) &^ (int64(w.Size) - 1)
		}
		bit := uint64(1) << (operand % bits)
		op.Apply = func(was uint64) (uint64, bool) {
			now := map[x86asm.Op]uint64{x86asm.BTS: was | bit, x86asm.BTR: was &^ bit, x86asm.BTC: was ^ bit}[i.Op]
			return now, (was&bit != 0) == w.Carry
		}
	default:
		f := plain(i.Op, operand)
		if f == nil {
			return op, false
		}
		op.Apply = func(was uint64) (uint64, bool) { return f(was) & mask, f(was)&mask == w.Value&mask }
	}
	return op, w.effective(m, address, &op.Registers) == w.Address
}

// plain are those whose flags follow from what they write and their operand.
func plain(o x86asm.Op, operand uint64) func(uint64) uint64 {
	switch o {
	case x86asm.ADD:
		return func(was uint64) uint64 { return was + operand }
	case x86asm.SUB:
		return func(was uint64) uint64 { return was - operand }
	case x86asm.AND:
		return func(was uint64) uint64 { return was & operand }
	case x86asm.OR:
		return func(was uint64) uint64 { return was | operand }
	case x86asm.XOR:
		return func(was uint64) uint64 { return was ^ operand }
	case x86asm.INC:
		return func(was uint64) uint64 { return was + 1 }
	case x86asm.DEC:
		return func(was uint64) uint64 { return was - 1 }
	case x86asm.NOT:
		return func(was uint64) uint64 { return ^was }
	case x86asm.NEG:
		return func(was uint64) uint64 { return -was }
	}
	return nil
}

// effective is the address of an operand, with the registers before the instruction. 1 (which is the address of no write that is
// looked for twice) where it cannot be told.
func (w Write) effective(m x86asm.Mem, disp int64, r *[16]uint64) uint64 {
	const unknown = 1
	if m.Segment == x86asm.FS || m.Segment == x86asm.GS {
		return unknown
	}
	at := uint64(disp)
	switch base, ok := number(m.Base, 8); {
	case m.Base == x86asm.RIP:
		at += w.RIP
	case ok:
		at += r[base]
	case m.Base != 0:
		return unknown
	}
	if m.Index != 0 {
		n, ok := number(m.Index, 8)
		if !ok {
			return unknown
		}
		at += r[n] * uint64(m.Scale)
	}
	return at
}

// number is the place of a register of so many bytes among the registers.
func number(r x86asm.Reg, size int) (int, bool) {
	from, to := x86asm.RAX, x86asm.R15
	switch size {
	case 1:
		switch {
		case r >= x86asm.AL && r <= x86asm.BL:
			return int(r - x86asm.AL), true
		case r >= x86asm.SPB && r <= x86asm.R15B:
			return int(r-x86asm.SPB) + 4, true
		}
		return 0, false
	case 2:
		from, to = x86asm.AX, x86asm.R15W
	case 4:
		from, to = x86asm.EAX, x86asm.R15L
	}
	return int(r - from), r >= from && r <= to
}
