package policy

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestRead(t *testing.T) {
	all, err := Read(strings.NewReader("module: a\ncalls: [rtnl_lock]\nwrites: [{object: kmalloc-4k, from: 8, to: 16}]\n---\nmodule: b\n"))
	if err != nil || len(all) != 2 {
		t.Fatalf("%v, %v", all, err)
	}
	a := &all[0]
	for f, want := range map[string]bool{"rtnl_lock": true, "rtnl_unlock": false, "commit_creds": false, "__x86_indirect_thunk_rax": true, "ftrace_caller": true} {
		if a.Allows(f) != want {
			t.Errorf("%s: %v", f, !want)
		}
	}
	for _, c := range []struct {
		object string
		off, n uint64
		want   bool
	}{
		{"kmalloc-4k", 8, 8, true},
		{"kmalloc-4k", 12, 4, true},
		{"kmalloc-4k", 12, 8, false},
		{"kmalloc-4k", 7, 2, false},
		{"kmalloc-2k", 8, 8, false},
		{"kmalloc-4k", ^uint64(0), 8, false},
		{"kmalloc-4k", 8, ^uint64(0), false},
	} {
		if got := a.Writable(c.object, c.off, c.n); got != c.want {
			t.Errorf("%d bytes at %d of %s: %v", c.n, c.off, c.object, got)
		}
	}
	var b bytes.Buffer
	if err := Write(&b, all); err != nil {
		t.Fatal(err)
	}
	if again, err := Read(&b); err != nil || !reflect.DeepEqual(again, all) {
		t.Errorf("written and read again: %v, %v", again, err)
	}
}

func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"calls: [a]\n":                                                "no name of a module",
		"module: a\ncalls: [commit_creds]\n":                          "commit_creds is never allowed",
		"module: a\ncalls: ['']\n":                                    "no name of a function",
		"module: a\nwrites: [{object: x, from: 8, to: 8}]\n":          "is no range",
		"module: a\nwrites: [{object: cred_jar, from: 0, to: 8}]\n":   "cred_jar is never allowed",
		"module: a\nwrites: [{object: '', from: 8, to: 9}]\n":         "is no range",
		"module: a\nexecutes: all\n":                                  "executes",
		"module: [a]\n":                                               "cannot unmarshal",
		"module: a\n" + strings.Repeat("# padding\n", maxFile/10):     "more than",
		strings.Repeat("module: a\n---\n", maxProfiles) + "module: a": "more than",
	} {
		if _, err := Read(strings.NewReader(text)); !errors.Is(err, ErrProfile) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v", text, err)
		}
	}
}

func TestLearn(t *testing.T) {
	p := Profile{Module: "a"}
	for _, f := range []string{"b", "a", "c", "b", "commit_creds", "__fentry__"} {
		p.LearnCall(f)
	}
	if got := strings.Join(p.Calls, " "); got != "a b c" {
		t.Errorf("calls %s", got)
	}
	p.LearnWrite("x", 8, 8)
	p.LearnWrite("x", 32, 8)
	p.LearnWrite("x", 16, 8)
	p.LearnWrite("y", 0, 1)
	if !p.Writable("x", 8, 16) || p.Writable("x", 24, 8) || !p.Writable("x", 32, 8) || !p.Writable("y", 0, 1) {
		t.Errorf("writes %v", p.Writes)
	}
	if err := p.check(); err != nil {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("module: a\ncalls: [rtnl_lock]\nwrites: [{object: kmalloc-4k, from: 8, to: 16}]\n---\nmodule: b\n"))
	f.Add([]byte("module: a\nwrites: [{object: x, from: -1, to: 18446744073709551615}]\n"))
	f.Add([]byte("a: &a [*a, *a]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := Read(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrProfile) {
				t.Errorf("error %v", err)
			}
			return
		}
		var out bytes.Buffer
		if err := Write(&out, all); err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			for _, c := range p.Calls {
				if Never(c) {
					t.Errorf("%s is allowed", c)
				}
			}
		}
	})
}
