package isolate

import (
	"slices"
	"testing"

	"redoubt.dev/redoubt/kvm"
)

func same(at uint64) uint64 { return at }

// two are the places of two processors' variables.
func two() []uint64 { return []uint64{0x10000, 0x30000} }

// What a module allocates is its own until it frees it, and no longer.
func TestObjects(t *testing.T) {
	const stack = 1
	var o objects
	allocate := func(name string, r kvm.Regs, at uint64) {
		r.RSP = 0x1000
		o.asked(stack, name, &r, two, same)
		o.made(stack, 0x1000, at, same)
	}
	allocate("__kmalloc", kvm.Regs{RDI: 100}, 0x5000)
	allocate("kmalloc_trace", kvm.Regs{RDX: 24}, 0x5100)
	allocate("__kmalloc_noprof", kvm.Regs{RDI: 8}, 0x4f00)
	allocate("vmalloc", kvm.Regs{RDI: 0x3000}, 0x8000)
	allocate("__alloc_percpu", kvm.Regs{RDI: 16}, 0x20)
	allocate("__get_free_pages", kvm.Regs{RSI: 1}, 0x20000)
	allocate("__kmalloc", kvm.Regs{RDI: 100}, 0)                     // none left
	allocate("__kmalloc", kvm.Regs{RDI: 0}, 16)                      // ZERO_SIZE_PTR
	allocate("alloc_pages", kvm.Regs{}, ^uint64(11))                 // an error
	allocate("__kmalloc", kvm.Regs{RDI: ^uint64(0)}, 0xffff88800000) // more than there is
	o.made(stack, 0x2000, 0x7000, same)                              // a call that asked for nothing
	for _, c := range []struct {
		at, n uint64
		want  bool
	}{
		{0x5000, 100, true},
		{0x5000, 101, false},
		{0x5063, 1, true},
		{0x5064, 1, false},
		{0x4fff, 1, false},
		{0x5100, 24, true},
		{0x5117, 2, false},
		{0x4f00, 8, true},
		{0x4f08, 1, false},
		{0x10020, 16, true},
		{0x20, 16, false},
		{0x8000, 0x3000, true},
		{0xa000, 0x1001, false},
		{0x20000, 0x2000, true},
		{0x22000, 1, false},
		{0, 1, false},
		{16, 1, false},
		{0x7000, 1, false},
		{0x5000, ^uint64(0), false},
		{^uint64(0), 1, false},
	} {
		if got := o.has(c.at, c.n); got != c.want {
			t.Errorf("%d bytes at %#x: %v", c.n, c.at, got)
		}
	}
	if !o.whole(0x9000) || o.whole(0x5000) || o.whole(0xb000) {
		t.Error("whole pages")
	}
	if f := o.asked(stack, "kfree", &kvm.Regs{RDI: 0x5000}, nil, same); !slices.Equal(f, []object{{0x5000, 100}}) {
		t.Errorf("freed %+v", f)
	}
	if f := o.asked(stack, "kfree", &kvm.Regs{RDI: 0x5001}, nil, same); f != nil {
		t.Errorf("what is no object is freed: %+v", f)
	}
	if f := o.asked(stack, "free_percpu", &kvm.Regs{RDI: 0x20}, two, same); !slices.Equal(f, []object{{0x10020, 16}, {0x30020, 16}}) {
		t.Errorf("freed %+v", f)
	}
	if o.has(0x5000, 1) || o.has(0x10020, 1) || !o.has(0x5100, 1) {
		t.Error("after they were freed")
	}
}

func TestObjectsBounded(t *testing.T) {
	var o objects
	for n := range uint64(2 * maxObjects) {
		o.asked(1, "__kmalloc", &kvm.Regs{RDI: 8, RSP: n * 8}, nil, same)
	}
	if len(o.pending) > maxObjects {
		t.Errorf("%d calls are kept", len(o.pending))
	}
	for n := range uint64(2 * maxObjects) {
		o.made(1, n*8, 0x1000+n*8, same)
	}
	if len(o.all) > maxObjects {
		t.Errorf("%d objects are kept", len(o.all))
	}
}
