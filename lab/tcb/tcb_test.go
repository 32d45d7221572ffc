package tcb

import "testing"

// The Builder, which has all privileges, is small; and everything that it is built of is counted.
func TestBuilderIsSmall(t *testing.T) {
	all, err := Count(t.Context(), ".")
	if err != nil {
		t.Fatal(err)
	}
	if n := Own(all); n < 100 || n > Most {
		t.Errorf("the Builder has %d lines of code of its own, it may have %d", n, Most)
	}
	for _, p := range all {
		if p.Lines == 0 && p.Module == "redoubt.dev/redoubt" {
			t.Errorf("%s: nothing counted", p.Path)
		}
	}
}

func TestLines(t *testing.T) {
	for text, want := range map[string]int{
		"":                          0,
		"\n\n// a\n/* b\n c */\n\n": 0,
		"package a // b\n":          1,
		"package a; var b int":      1,
		"package a\n\nvar b = `\n\nc`\nvar d = 1\n":                                               5,
		"package a\n\nfunc b() {\n\t// c\n\tx() /* d */ ; y()\n}\n":                               4,
		"// +build\n#include \"a.h\"\nTEXT ·b(SB),NOSPLIT,$0-8\n\tMOVQ a+0(FP), BX // c\n\tRET\n": 4,
	} {
		if n := lines([]byte(text)); n != want {
			t.Errorf("%q: %d lines, want %d", text, n, want)
		}
	}
}
