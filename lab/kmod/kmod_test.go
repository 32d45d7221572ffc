package kmod

import (
	"strings"
	"testing"

	"redoubt.dev/redoubt/lab/debian"
)

func TestLayout(t *testing.T) {
	c := []byte("x")
	files, err := layout([]Module{
		{Name: "one", Sources: map[string][]byte{"one.c": c, "one.h": c}},
		{Name: "two", Sources: map[string][]byte{"b.c": c, "a.c": c}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if k := string(files["Kbuild"]); k != "obj-m += one/\nobj-m += two/\n" {
		t.Errorf("Kbuild: %q", k)
	}
	if k := string(files["one/Kbuild"]); !strings.HasPrefix(k, "obj-m := one.o\n") || strings.Contains(k, "one-y") {
		t.Errorf("one/Kbuild: %q", k)
	}
	if k := string(files["two/Kbuild"]); !strings.Contains(k, "two-y := a.o b.o\n") {
		t.Errorf("two/Kbuild: %q", k)
	}
	for _, m := range []Module{
		{Name: "", Sources: map[string][]byte{"a.c": c}},
		{Name: "../x", Sources: map[string][]byte{"a.c": c}},
		{Name: "none", Sources: map[string][]byte{"a.h": c}},
		{Name: "one", Sources: map[string][]byte{"one.c": c, "a.c": c}},
	} {
		if _, err := layout([]Module{m}); err == nil {
			t.Errorf("%q of %d files: no error", m.Name, len(m.Sources))
		}
	}
}

// What a compiler says reaches who builds, and nothing stays of what failed.
func TestBuildFails(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a compiler: needs a run without -short, as `make test` is")
	}
	root, err := debian.Open()
	if err != nil {
		t.Fatal(err)
	}
	bad := Module{Name: "bad", Sources: map[string][]byte{"bad.c": []byte("#error as it should be\n")}}
	for range 2 {
		if _, err := Build(t.Context(), root, "6.1-cloud", bad); err == nil || !strings.Contains(err.Error(), "#error as it should be") {
			t.Errorf("error %v", err)
		}
	}
}
