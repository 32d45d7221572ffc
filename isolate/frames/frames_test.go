package frames

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// A line is a word and its numbers: "enter 1000 K" (a function, called from K, with the stack pointer at 1000), "call ff0 m"
// (the module calls the kernel, its return address m lies at ff0), "back ff0 m" (that returns), "leave 1000 K" (the module
// returns to K from the entry at 1000), "stop ff0 x" and "go ff0 x" (it is interrupted at x), "fault ff0 x" and "mend ff0 y".
func play(t *testing.T, f *Frames, script string) (out []string) {
	t.Helper()
	for line := range strings.Lines(script) {
		var what, rest string
		var sp, at uint64
		if n, _ := fmt.Sscanf(line, "%s %x %s", &what, &sp, &rest); n < 3 {
			continue
		}
		for _, c := range rest {
			at = at<<8 | uint64(c)
		}
		const stack = 1
		var err error
		var kind Entry
		switch what {
		case "enter":
			kind, err = f.Enter(stack, 'F', sp, at, true)
		case "middle", "back", "go", "mend":
			kind, err = f.Enter(stack, at, sp+map[string]uint64{"back": 8}[what], 0, false)
		case "call":
			err = f.Calls(stack, sp, at, strings.HasPrefix(rest, "m"))
		case "leave":
			var back bool
			if back, err = f.Returns(stack, at, sp+8); err == nil && !back {
				err = errors.New("no return")
			}
		case "stop":
			err = f.Interrupt(stack, at, sp)
		case "fault":
			err = f.Fault(stack, at, sp)
		default:
			t.Fatalf("line %q", line)
		}
		switch {
		case err != nil:
			out = append(out, err.Error())
		case kind != 0:
			out = append(out, kind.String())
		default:
			out = append(out, "ok")
		}
	}
	return out
}

func TestTranscripts(t *testing.T) {
	for _, c := range []struct{ name, script, want string }{
		{"a call", "enter 1000 K\nleave 1000 K", "call, ok"},
		{"it calls the kernel", "enter 1000 K\ncall ff0 m1\nback ff0 m1\nleave 1000 K", "call, ok, return, ok"},
		{
			"the kernel calls it meanwhile", "enter 1000 K\ncall ff0 m1\nenter f00 L\ncall ee0 m2\nback ee0 m2\nleave f00 L\nback ff0 m1\nleave 1000 K",
			"call, ok, call, ok, return, ok, return, ok",
		},
		{"interrupted", "enter 1000 K\nstop fe0 x\ngo fe0 x\nleave 1000 K", "call, ok, resume, ok"},
		{"interrupted, and called by the interrupt", "enter 1000 K\nstop fe0 x\nenter f00 L\nleave f00 L\ngo fe0 x\nleave 1000 K", "call, ok, call, ok, resume, ok"},
		{"a fault is mended elsewhere", "enter 1000 K\nfault fe0 x\nmend fe0 y\nleave 1000 K", "call, ok, resume, ok"},
		{"a breakpoint on a push", "enter 1000 K\nfault fe0 x\nmend fd8 y\nleave 1000 K", "call, ok, resume, ok"},
		{"a breakpoint on a pop", "enter 1000 K\nfault fe0 x\nmend fe8 y\nleave 1000 K", "call, ok, resume, ok"},
		{"a fault is mended with another stack", "enter 1000 K\nfault fe0 x\nmend fc0 y", "call, ok, " + ErrEntry.Error()},
		{"a tail call", "enter 1000 K\ncall 1000 K\nenter 2000 L\nleave 2000 L", "call, ok, call, ok"},
		{"the kernel goes on to a function of the module in the place of what it called", "enter 1000 K\ncall ff0 m1\nenter ff0 m1\nleave 1000 K", "call, ok, call, ok"},
		{"what was left on a stack that is used anew", "enter 1000 K\ncall ff0 m1\nenter 1800 L\nleave 1800 L\nback ff0 m1", "call, ok, call, ok, " + ErrEntry.Error()},

		{"the middle of a function", "middle 1000 x", ErrEntry.Error()},
		{"a return that was not called", "enter 1000 K\nback ff0 m1", "call, " + ErrEntry.Error()},
		{"a return to another place of the stack", "enter 1000 K\ncall ff0 m1\nback ee0 m1", "call, ok, " + ErrEntry.Error()},
		{"a return twice", "enter 1000 K\ncall ff0 m1\nback ff0 m1\nback ff0 m1", "call, ok, return, " + ErrEntry.Error()},
		{"resumed elsewhere", "enter 1000 K\nstop fe0 x\ngo fe0 y", "call, ok, " + ErrEntry.Error()},
		{"it returns to somewhere else", "enter 1000 K\nleave 1000 L", "call, no return"},
		{"it returns to a caller of its caller", "enter 1000 K\ncall ff0 m1\nenter f00 L\nleave 1000 K", "call, ok, call, " + ErrReturn.Error() + " but an earlier one"},
		{"it returns with another stack", "enter 1000 K\nleave ff0 K", "call, " + ErrStack.Error()},
		{"it calls with a return address of the kernel's", "enter 1000 K\ncall ff0 K", "call, " + ErrReturn.Error()},
		{"it calls from above its own frame", "enter 1000 K\ncall 1008 m1", "call, " + ErrStack.Error()},
		{"a tail call with another return address", "enter 1000 K\ncall 1000 m1", "call, " + ErrReturn.Error()},
		{"it calls without having been called", "call ff0 m1", ErrStack.Error()},
		{"it calls while the kernel runs what it called", "enter 1000 K\ncall ff0 m1\ncall fe0 m2", "call, ok, " + ErrStack.Error()},
		{"interrupted above its frame", "enter 1000 K\nstop 1008 x", "call, " + ErrStack.Error()},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f Frames
			if got := strings.Join(play(t, &f, c.script), ", "); got != c.want {
				t.Errorf("%s\ngot  %s\nwant %s", c.script, got, c.want)
			}
		})
	}
}

// Every order of six crossings on a small stack: a return to the kernel is only ever made to the caller of the innermost
// entry, with the stack as it was, and a return of the kernel's only to a call that was made and lies there.
func TestEveryOrder(t *testing.T) {
	type move struct {
		name string
		sp   uint64
	}
	var moves []move
	for _, n := range []string{"enter", "call", "back", "leave", "stop", "go", "tail"} {
		for _, sp := range []uint64{0x20, 0x40, 0x60} {
			moves = append(moves, move{n, sp})
		}
	}
	type open struct {
		kind string
		sp   uint64
	}
	// The model: what lies open, outermost first. It is true where the machine must agree.
	apply := func(m []open, x move) ([]open, bool) {
		drop := func(at uint64) []open {
			for len(m) > 0 && (m[len(m)-1].sp < at || m[len(m)-1].sp == at && m[len(m)-1].kind == "enter") {
				m = m[:len(m)-1]
			}
			return m
		}
		last := func() open {
			if len(m) == 0 {
				return open{}
			}
			return m[len(m)-1]
		}
		switch x.name {
		case "enter":
			return append(drop(x.sp), open{"enter", x.sp}), true
		case "back":
			for len(m) > 0 && m[len(m)-1] != (open{"call", x.sp}) && (m[len(m)-1].sp < x.sp+8) {
				m = m[:len(m)-1]
			}
			if last() == (open{"call", x.sp}) {
				return m[:len(m)-1], true
			}
			return m, false
		case "go":
			for len(m) > 0 && m[len(m)-1] != (open{"stop", x.sp}) && (m[len(m)-1].sp < x.sp || m[len(m)-1] == (open{"enter", x.sp})) {
				m = m[:len(m)-1]
			}
			if last() == (open{"stop", x.sp}) {
				return m[:len(m)-1], true
			}
			return m, false
		case "call":
			return append(m, open{"call", x.sp}), last().kind == "enter" && x.sp < last().sp
		case "stop":
			return append(m, open{"stop", x.sp}), last().kind == "enter" && x.sp <= last().sp
		case "leave", "tail":
			if last() == (open{"enter", x.sp}) {
				return m[:len(m)-1], true
			}
		}
		return m, false
	}
	runs := 0
	var try func(script []move, model []open, depth int)
	try = func(script []move, model []open, depth int) {
		for _, x := range moves {
			var f Frames
			for _, p := range script {
				step(&f, p.name, p.sp)
			}
			next, want := apply(append([]open(nil), model...), x)
			if got := step(&f, x.name, x.sp); got != want {
				t.Fatalf("after %v: %v: %v, want %v", script, x, got, want)
			}
			runs++
			if want && depth > 1 {
				try(append(append([]move(nil), script...), x), next, depth-1)
			}
		}
	}
	try(nil, nil, 6)
	t.Logf("%d crossings", runs)
}

// step makes one crossing: each place of the stack has its own addresses.
func step(f *Frames, name string, sp uint64) bool {
	const stack = 1
	kernel, module := sp+0x1000, sp+0x2000
	switch name {
	case "enter":
		_, err := f.Enter(stack, 1, sp, kernel, true)
		return err == nil
	case "call":
		return f.Calls(stack, sp, module, true) == nil
	case "tail":
		return f.Calls(stack, sp, kernel, false) == nil
	case "back":
		k, err := f.Enter(stack, module, sp+8, 0, false)
		return err == nil && k == Return
	case "leave":
		back, err := f.Returns(stack, kernel, sp+8)
		return err == nil && back
	case "stop":
		return f.Interrupt(stack, module+1, sp) == nil
	case "go":
		k, err := f.Enter(stack, module+1, sp, 0, false)
		return err == nil && k == Resume
	}
	return false
}

func TestBounds(t *testing.T) {
	var f Frames
	sp := uint64(1 << 40)
	for n := range maxDepth / 2 {
		if _, err := f.Enter(1, 1, sp, 2, true); err != nil {
			t.Fatalf("entry %d: %v", n, err)
		}
		sp -= 8
		if err := f.Calls(1, sp, 3, true); err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
		sp -= 8
	}
	if _, err := f.Enter(1, 1, sp, 2, true); !errors.Is(err, ErrDepth) {
		t.Errorf("one more entry: %v", err)
	}
	f.Drop(1)
	if f.Len() != 0 {
		t.Errorf("%d crossings lie on a stack that is gone", f.Len())
	}
	for n := range maxStacks {
		if _, err := f.Enter(uint64(n), 1, sp, 2, true); err != nil {
			t.Fatalf("stack %d: %v", n, err)
		}
	}
	if _, err := f.Enter(maxStacks, 1, sp, 2, true); !errors.Is(err, ErrDepth) {
		t.Errorf("one more stack: %v", err)
	}
	if back, err := f.Returns(7, 2, sp+8); !back || err != nil { // one is free again
		t.Errorf("the return on a stack: %v, %v", back, err)
	}
	for _, stack := range []uint64{maxStacks, 7} {
		_, err := f.Enter(stack, 1, sp, 2, true)
		if free := stack == maxStacks; free != (err == nil) {
			t.Errorf("stack %d while one is free: %v", stack, err)
		}
	}
	if n := f.Len(); n != maxStacks {
		t.Errorf("%d crossings, want %d", n, maxStacks)
	}
}
