package isolate

import (
	"bytes"
	"encoding/binary"
	"fmt"

	layout "redoubt.dev/redoubt/isolate/view"
)

// stack is one of the kernel's: of a process, of interrupts.
type stack struct {
	span
	pages [][]byte // the guest's memory, lowest first
}

// stackOf finds the stack that an address is on, for a view: the pages around it that are mapped one after another, where there are as many
// as a stack has at most; else the aligned ones.
func (i *Isolation) stackOf(v *view, sp uint64) (*stack, error) {
	const most = layout.StackPages
	if s := v.stack; s != nil && !v.restack && s.has(sp-1) { // mostly the one it was on
		return s, nil
	}
	at := page(sp - 1)
	for base := at; base+most*pageSize > at && base != 0; base -= pageSize { // one that was found before
		if s := i.stacks[base]; s != nil && s.has(sp-1) {
			return s, nil
		}
	}
	mapped := func(a uint64) bool {
		m, err := i.place(a)
		return err == nil && m.Writable && !m.User
	}
	if sp>>63 == 0 || !mapped(at) {
		return nil, fmt.Errorf("the stack pointer is %#x", sp)
	}
	first, last := at, at
	for n := 1; n <= most && mapped(first-pageSize); n++ {
		first -= pageSize
	}
	for n := 1; n <= most && mapped(last+pageSize); n++ {
		last += pageSize
	}
	if last-first >= most*pageSize { // no guard pages: the kernel aligns its stacks to their size
		first = at &^ (most*pageSize - 1)
		last = first + (most-1)*pageSize
	}
	s := &stack{span: span{first, last + pageSize}}
	for a := first; a <= last; a += pageSize {
		b, err := i.bytes(a, pageSize)
		if err != nil {
			return nil, err
		}
		s.pages = append(s.pages, b)
	}
	if len(i.stacks) >= 1<<12 {
		clear(i.stacks)
	}
	i.stacks[s.from] = s
	return s, nil
}

// room is what the kernel needs below a stack pointer to take an interrupt or an exception.
const room = 512

// leaves says whether a stack pointer is on the stack, and leaves room.
func (s *stack) leaves(sp uint64) bool { return sp >= s.from+room && sp <= s.to-8 }

// word is 8 bytes of the kernel's own stack.
func (s *stack) word(at uint64) []byte {
	off := at - s.from
	return s.pages[off/pageSize][off%pageSize&^7:][:8]
}

// mine is 8 bytes of the stack as the module sees it.
func (v *view) mine(at uint64) []byte {
	off := at - v.stack.from
	p, _ := v.layout.Stack(int(off / pageSize))
	return p[off%pageSize&^7:][:8]
}

func (v *view) unmapStack() {
	for a := v.stack.from; a < v.stack.to; a += pageSize {
		v.layout.Unmap(a)
	}
	v.stack, v.stale, v.restack = nil, true, false
}

// shown is a stack as the module was shown it, from an address up.
type shown struct {
	from  uint64
	words [layout.StackPages * pageSize]byte
}

// changed is the first word from an address up, of those below to, that the module has changed since it was shown it; what lay below is its own.
// Both are multiples of 8.
func (v *view) changed(at, to uint64) uint64 {
	const block = 64
	for at < to && at >= v.shown.from {
		off := at - v.stack.from
		mine, _ := v.layout.Stack(int(off / pageSize))
		mine = mine[off%pageSize:]
		mine = mine[:min(uint64(len(mine)), to-at)]
		was := v.shown.words[off:][:len(mine)]
		switch {
		case bytes.Equal(mine, was):
			at += uint64(len(mine))
			continue
		case len(mine) > block && bytes.Equal(mine[:block], was[:block]):
			at += block
			continue
		}
		for len(mine) >= 8 && bytes.Equal(mine[:8], was[:8]) {
			mine, was, at = mine[8:], was[8:], at+8
		}
		break
	}
	return at
}

// showStack gives the view a stack, as it is from the stack pointer up. What lies below is the module's own.
func (i *Isolation) showStack(v *view, s *stack, sp uint64) error {
	if v.stack != s || v.restack {
		if v.stack != nil {
			v.unmapStack()
		}
		for n := range s.pages {
			_, gpa := v.layout.Stack(n)
			at := s.from + uint64(n)*pageSize
			if err := i.mapPage(v, at, gpa, layout.Write); err != nil {
				return err
			}
		}
		v.stack, v.stale = s, true
	}
	for n, from := range s.pages {
		begin := s.from + uint64(n)*pageSize
		if sp >= begin+pageSize {
			continue
		}
		to, _ := v.layout.Stack(n)
		off := max(sp, begin) - begin
		copy(v.shown.words[uint64(n)*pageSize+off:][:pageSize-off], from[off:])
		copy(to[off:], v.shown.words[uint64(n)*pageSize+off:][:pageSize-off])
	}
	v.shown.from = sp
	return nil
}

// writeBack brings what the module left on its stack to the kernel's: each word from the stack pointer up that it has changed.
// Others stay: another processor may have written what lies on the stack (the entry of a queue that it waits in). And a word
// of the kernel's, above base, that leads into code never changes: the return addresses of what called the module stay.
func (i *Isolation) writeBack(v *view, sp, base uint64) {
	s := v.stack
	for at := max(sp&^7, s.from); ; at += 8 {
		if !i.cfg.Modules.Weakened.Stack {
			at = v.changed(at, s.to)
		}
		if at >= s.to {
			return
		}
		mine, theirs := v.mine(at), s.word(at)
		now, was := binary.LittleEndian.Uint64(mine), binary.LittleEndian.Uint64(theirs)
		if now == was {
			continue
		}
		if at >= base && i.leadsToCode(was) {
			i.refused(v, Event{Kind: Stack, Address: at, Symbol: i.describe(was), Detail: fmt.Sprintf("a return address of the kernel's was changed to %#x", now)})
			continue
		}
		copy(theirs, mine)
		if at >= v.shown.from {
			copy(v.shown.words[at-s.from:][:8], mine)
		}
	}
}

// publish brings the kernel's stack up to what the module has on its own, before others are told of something there.
func (i *Isolation) publish(v *view, sp uint64) {
	s := v.stack
	base, ok := v.frames.Base(s.from)
	if !ok || !s.leaves(sp) || sp > base {
		return
	}
	sp &^= 7
	i.writeBack(v, sp, base)
	for at := sp; at < v.shown.from; at += 8 {
		copy(v.shown.words[at-s.from:][:8], v.mine(at))
	}
	v.shown.from = min(v.shown.from, sp)
}

// leadsToCode says whether a word is an address of the kernel's code or where modules have theirs.
func (i *Isolation) leadsToCode(w uint64) bool {
	return i.kernel.text.has(w) || w >= 0xffffffffc0000000 && w < 0xffffffffff000000
}
