package types

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// blob is the BTF of two structures, one with a member that has no name.
func blob(t testing.TB) []byte {
	t.Helper()
	word := &btf.Int{Name: "u64", Size: 8}
	links := &btf.Struct{Name: "list_head", Size: 16, Members: []btf.Member{
		{Name: "next", Type: &btf.Pointer{Target: &btf.Void{}}}, {Name: "prev", Type: &btf.Pointer{Target: &btf.Void{}}, Offset: 64},
	}}
	inner := &btf.Union{Size: 8, Members: []btf.Member{{Name: "a", Type: word}, {Name: "b", Type: word}}}
	b, err := btf.NewBuilder([]btf.Type{&btf.Struct{Name: "module", Size: 32, Members: []btf.Member{
		{Name: "list", Type: links, Offset: 64}, {Type: inner, Offset: 192},
	}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := b.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestField(t *testing.T) {
	all, err := Find(blob(t))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]Field{"list.prev": {16, 8}, "b": {24, 8}, "list": {8, 16}} {
		if f, err := all.Field("module", path); err != nil || f != want {
			t.Errorf("%s: %+v, %v", path, f, err)
		}
	}
	for _, path := range []string{"c", "list.c", "list.next.next", ""} {
		if f, err := all.Field("module", path); !errors.Is(err, ErrNoField) {
			t.Errorf("%s: %+v, %v", path, f, err)
		}
	}
	if n, err := all.Size("module"); err != nil || n != 32 {
		t.Error(n, err)
	}
	if _, err := all.Size("nothing"); err == nil {
		t.Error("a structure that is not there has a size")
	}
	if _, err := Find(nil); err == nil {
		t.Error("nothing has types")
	}
}

// FuzzFind: whatever the BTF, it is refused, or every member can be asked for.
func FuzzFind(f *testing.F) {
	b := blob(f)
	f.Add(b)
	f.Add(b[:len(b)-9])
	f.Fuzz(func(_ *testing.T, b []byte) {
		all, err := Find(b)
		if err != nil {
			return
		}
		for _, s := range []string{"module", "list_head"} {
			for _, m := range []string{"list.next", "b", "next"} {
				_, _ = all.Field(s, m)
			}
			_, _ = all.Size(s)
		}
	})
}
