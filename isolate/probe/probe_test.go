package probe

import (
	"bytes"
	"errors"
	"testing"
)

func TestPlant(t *testing.T) {
	for _, c := range []struct {
		name string
		code []byte
		at   int
		ok   bool
	}{
		{"a no-op", []byte{0x0f, 0x1f, 0x44, 0, 0, 0x55, 0x48, 0x89, 0xe5}, 0, true},
		{"behind endbr64", []byte{0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0}, 4, true},
		{"behind a sealed endbr64", []byte{0x66, 0x0f, 0x1f, 0x00, 0x0f, 0x1f, 0x44, 0, 0}, 4, true},
		{"traced", []byte{0xe8, 1, 2, 3, 4, 0x55, 0x48, 0x89, 0xe5}, 0, false},
		{"no place", []byte{0x55, 0x48, 0x89, 0xe5, 0x0f, 0x1f, 0x44, 0, 0}, 0, false},
		{"cut", []byte{0x0f, 0x1f, 0x44}, 0, false},
		{"nothing", nil, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			code := bytes.Clone(c.code)
			at, err := Plant(code)
			if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrNoPlace) || at != c.at {
				t.Fatalf("at %d, %v", at, err)
			}
			if err != nil {
				if !bytes.Equal(code, c.code) {
					t.Errorf("code that has no place was changed to % x", code)
				}
				return
			}
			if code[at] != 0xe6 || code[at+1] != Port {
				t.Errorf("the trap is % x", code[at:])
			}
			if _, err := Plant(code); err == nil {
				t.Error("a second trap in the same place")
			}
			Remove(code, at)
			if !bytes.Equal(code, c.code) {
				t.Errorf("without the trap it is % x, it was % x", code, c.code)
			}
		})
	}
}
