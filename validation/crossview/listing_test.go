package crossview

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		text string
		want []string // nil: refused
		why  string
	}{
		{"/\x00/etc\x00/etc/a\nb\x00", []string{"/", "/etc", "/etc/a\nb"}, ""},
		{"/\n/etc\n/bin\n/etc\n", []string{"/", "/bin", "/etc"}, ""},
		{"/\x00/\xff\x00", []string{"/", "/\xff"}, ""},
		{"", nil, "byte 0: the last name has no end"},
		{"/\x00/etc", nil, "byte 6: the last name has no end"},
		{"/\n/a\nb\n", nil, `byte 5: "b": no absolute path`},
		{"/etc\x00", nil, "the root is not in it"},
		{"/\x00//etc\x00", nil, "byte 2"},
		{"/\x00/etc/../x\x00", nil, "byte 2"},
		{"/\x00/etc/\x00", nil, "byte 2"},
		{"/\x00\x00", nil, "byte 2"},
		{"/\n\n", nil, "byte 2"},
		{"/\x00/" + strings.Repeat("x", maxPath) + "\x00", nil, "the most is 65536"},
		{strings.Repeat("/\n", MaxNames+1), nil, "the most is 2097152"},
		{strings.Repeat("/", MaxListing+1), nil, "the most is 33554432"},
	} {
		l, err := Parse([]byte(c.text))
		switch {
		case c.want == nil && (!errors.Is(err, ErrListing) || !strings.Contains(err.Error(), c.why)):
			t.Errorf("%.40q: %v, not %q", c.text, err, c.why)
		case c.want != nil && (err != nil || !slices.Equal(l.names, c.want)):
			t.Errorf("%q: %q, %v", c.text, l, err)
		}
	}
}

func TestBelow(t *testing.T) {
	l, err := Parse([]byte("/\n/a\n/a-b\n/a/c\n/d\n/d-e/f\n"))
	if err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]bool{"/": true, "/a": true, "/d": false, "/a/c": false, "/z": false, "/d-e": true} {
		if got := l.below(dir); got != want {
			t.Errorf("%s: %v", dir, got)
		}
	}
	if root, err := Parse([]byte("/\n")); err != nil || root.below("/") {
		t.Error("below nothing but the root there is something")
	}
}

func TestFstab(t *testing.T) {
	got := parseFstab("# /dev/x /no ext4\nUUID=1 / ext4\n/dev/b\t/boot  ext4 defaults 0 2\nshort\ntmpfs /my\\040data/ tmpfs\nswap none swap\nx /a//b ext4\ny /q\\999 ext4\n")
	if want := []string{"/boot", "/my data", `/q\999`}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrListing) {
				t.Error(err)
			}
			return
		}
		if !slices.IsSorted(l.names) || l.names[0] != "/" {
			t.Errorf("%q", l.names)
		}
		for _, n := range l.names {
			if _, ok := l.find([]byte(n)); !ok || checkName(n) != nil {
				t.Errorf("%q is not found", n)
			}
			l.below(n)
		}
	})
}

func FuzzFstab(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		for _, p := range parseFstab(text) {
			if checkName(p) != nil || p == "/" {
				t.Errorf("%q", p)
			}
		}
	})
}
