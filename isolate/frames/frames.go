// Package frames keeps which calls lie on the kernel's stacks across the border between the kernel and one isolated
// module, and judges each crossing by them. It is a pure state machine: what happened goes in, a verdict comes out.
//
// A module is entered where a function of it begins, where a call that it made returns to, or where it was interrupted; it is
// left by a call, or to the very address that its caller wrote on the stack. Nothing else is a crossing: not the middle of
// a function, not a return address that the module made up, not a stack that it moved. Where an exception of the module
// goes on is for the kernel's handler to say (it mends faults, and carries out what it is about to patch).
//
// Calls nest on each stack, and a stack grows down: what lies below a later entry is gone, so the record is never longer
// than the stacks are deep.
package frames

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Bounds. A module whose calls do not fit is refused: the kernel's stacks hold 16 KiB.
const (
	maxStacks = 1 << 12
	maxDepth  = 1 << 9
)

// Why a crossing is refused.
var (
	ErrEntry  = errors.New("not where a function of the module begins, nor where a call of it returns")
	ErrReturn = errors.New("not the address that the module was called from")
	ErrStack  = errors.New("the stack is not where the call left it")
	ErrDepth  = errors.New("too many calls lie on the stacks")
)

// kind of a record.
type kind byte

const (
	entered     kind = iota // the kernel called the module: at is where the return address lies, address it
	called                  // the module called the kernel: at is where its return address lies, address it
	interrupted             // the module was left at address, with the stack at at
	faulted                 // the same by an exception, whose handler says where it goes on
)

// A record is one crossing that has not been made back.
type record struct {
	kind    kind
	at      uint64
	address uint64
}

// near says whether a stack pointer is where an exception found it, or a word beside: the kernel carries out instructions that
// it has put breakpoints on, which may push or pop.
func (r record) near(sp uint64) bool { return sp == r.at || sp+8 == r.at || sp == r.at+8 }

// Frames are one module's.
type Frames struct {
	stacks map[uint64]*calls // by where the stack lies; one without records may be dropped at any time
	last   *calls            // the one that was asked for last: mostly it is the next, too
}

// calls lie on one stack.
type calls struct {
	stack uint64
	all   []record
}

// on is what lies on a stack; nil: nothing ever did.
func (f *Frames) on(stack uint64) *calls {
	if f.last != nil && f.last.stack == stack {
		return f.last
	}
	c := f.stacks[stack]
	if c != nil {
		f.last = c
	}
	return c
}

// records are those on a stack.
func (f *Frames) records(stack uint64) []record {
	if c := f.on(stack); c != nil {
		return c.all
	}
	return nil
}

// An Entry is what Enter made of an entry.
type Entry int

// Kinds of entry.
const (
	Call   Entry = iota + 1 // of a function of the module
	Return                  // from what the module called
	Resume                  // of the module where it was interrupted
)

func (e Entry) String() string { return [...]string{"", "call", "return", "resume"}[e] }

// Enter judges the kernel's going on at an address of the module, with the stack pointer sp on the stack that is known as
// stack. begins says whether a function begins there; top is the word at sp.
func (f *Frames) Enter(stack, address, sp, top uint64, begins bool) (Entry, error) {
	all := f.records(stack)
	lay := len(all)
	// What lies below the stack pointer is over. A call's return address lies just below it when the call has returned.
	for len(all) > 0 {
		last := all[len(all)-1]
		switch {
		case last.kind == called && last.at+8 == sp && last.address == address:
			f.set(stack, all[:len(all)-1])
			return Return, nil
		case last.kind == interrupted && last.at == sp && last.address == address, last.kind == faulted && last.near(sp):
			f.set(stack, all[:len(all)-1])
			return Resume, nil
		case last.kind == called && last.at == sp && last.address == top && begins:
			// What the module called went on to a function of the module in its own place. That one returns to
			// the module without a crossing.
			f.set(stack, all[:len(all)-1])
			return Call, nil
		case last.at < sp, last.at == sp && last.kind == entered:
			all = all[:len(all)-1]
			continue
		}
		break
	}
	if len(all) < lay {
		f.set(stack, all)
	}
	if !begins {
		return 0, ErrEntry
	}
	if len(all) >= maxDepth {
		return 0, ErrDepth
	}
	if len(f.stacks) >= maxStacks {
		maps.DeleteFunc(f.stacks, func(_ uint64, c *calls) bool { return len(c.all) == 0 })
		f.last = nil
		if len(f.stacks) >= maxStacks {
			return 0, ErrDepth
		}
	}
	if f.on(stack) == nil {
		if f.stacks == nil {
			f.stacks = map[uint64]*calls{}
		}
		f.stacks[stack] = &calls{stack: stack}
	}
	f.set(stack, append(all, record{entered, sp, top}))
	return Call, nil
}

// Base is where the innermost entry on a stack found its return address: what lies at and above it is the kernel's.
func (f *Frames) Base(stack uint64) (uint64, bool) {
	all := f.records(stack)
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].kind == entered {
			return all[i].at, true
		}
	}
	return 0, false
}

// Returns judges the module's leaving to an address with the stack pointer sp: whether it is the return to its caller.
// An address that is no caller's is none, and to be judged as a call.
func (f *Frames) Returns(stack, address, sp uint64) (bool, error) {
	all := f.records(stack)
	i := len(all) - 1
	if i < 0 || all[i].kind != entered {
		return false, ErrStack // the module runs without having been entered
	}
	if all[i].address != address {
		for _, r := range all[:i] {
			if r.kind == entered && r.address == address {
				return false, fmt.Errorf("%w but an earlier one", ErrReturn)
			}
		}
		return false, nil
	}
	if sp != all[i].at+8 {
		return false, ErrStack
	}
	f.set(stack, all[:i])
	return true, nil
}

// Calls judges the module's leaving by a call, with its return address ret at sp, that lies in the module where mine. A
// call in the place of a return (a tail call) leaves the caller's address there.
func (f *Frames) Calls(stack, sp, ret uint64, mine bool) error {
	all := f.records(stack)
	i := len(all) - 1
	if i < 0 || all[i].kind != entered {
		return ErrStack
	}
	switch {
	case sp == all[i].at:
		if ret != all[i].address {
			return ErrReturn
		}
		f.set(stack, all[:i])
		return nil
	case sp > all[i].at:
		return ErrStack
	case !mine:
		return ErrReturn
	case len(all) >= maxDepth:
		return ErrDepth
	}
	f.set(stack, append(all, record{called, sp, ret}))
	return nil
}

// Interrupt notes that the module was left at an address, to be gone on with there.
func (f *Frames) Interrupt(stack, address, sp uint64) error {
	return f.leave(stack, record{interrupted, sp, address})
}

// Fault notes that the module raised an exception, with the stack pointer at sp.
func (f *Frames) Fault(stack, address, sp uint64) error {
	return f.leave(stack, record{faulted, sp, address})
}

func (f *Frames) leave(stack uint64, r record) error {
	all := f.records(stack)
	i := len(all) - 1
	if i < 0 || all[i].kind != entered || r.at > all[i].at {
		return ErrStack
	}
	if len(all) >= maxDepth {
		return ErrDepth
	}
	f.set(stack, append(all, r))
	return nil
}

// Trace is the addresses of the crossings on a stack, the innermost first: where the kernel called the module from, and the
// module the kernel.
func (f *Frames) Trace(stack uint64) []uint64 {
	all := f.records(stack)
	out := make([]uint64, 0, len(all))
	for _, r := range slices.Backward(all) {
		out = append(out, r.address)
	}
	return out
}

// Drop forgets a stack, which the kernel has given back.
func (f *Frames) Drop(stack uint64) {
	delete(f.stacks, stack)
	f.last = nil
}

// Len is how many crossings have not been made back.
func (f *Frames) Len() int {
	n := 0
	for _, c := range f.stacks {
		n += len(c.all)
	}
	return n
}

// set changes what lies on a stack that has been entered. The memory of one whose last record is gone is kept: the next call is made
// there.
func (f *Frames) set(stack uint64, all []record) { f.on(stack).all = all }
