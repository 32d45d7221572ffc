package isolate

import (
	"slices"
	"testing"
)

// Where a module had functions that the kernel has freed, nothing of it begins any more: neither of an isolated module's, whose
// place another may have taken (a trampoline of ftrace's), nor of a trusted one's.
func TestFreedFunctions(t *testing.T) {
	make := func(name string, from uint64) *module {
		core, init := span{from, from + 2*pageSize}, span{from + 4*pageSize, from + 5*pageSize}
		return &module{
			name:    name,
			regions: []region{{span: core, code: core}, {span: init, code: init, kind: "init"}},
			begins:  map[uint64]string{core.from + 0x40: name + "_run", init.from: name + "_init"},
		}
	}
	const a, b = firstMade, firstMade + 0x10000
	i := &Isolation{kernel: &kernel{}, others: []*module{make("a", a), make("b", b)}}
	if got := i.called(b + 4*pageSize); !slices.Equal(got, []string{"b_init"}) {
		t.Fatalf("before: %q", got)
	}
	if _, ok := i.others[1].drop(b + 4*pageSize); !ok {
		t.Fatal("nothing was freed")
	}
	for at, want := range map[uint64]string{a + 0x40: "a_run", a + 4*pageSize: "a_init", b + 0x40: "b_run", b + 4*pageSize: ""} {
		if got := i.called(at); want == "" && got != nil || want != "" && !slices.Equal(got, []string{want}) {
			t.Errorf("at %#x begins %q, want %q", at, got, want)
		}
	}
	v := make("c", a)
	if _, ok := v.drop(a + 4*pageSize); !ok || len(v.begins) != 1 || v.hasCode(a+4*pageSize) {
		t.Errorf("an isolated module keeps %v", v.begins)
	}
	if _, ok := v.drop(a + 4*pageSize); ok {
		t.Error("a region was freed twice")
	}
}
