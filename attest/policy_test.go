package attest

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestParsePolicy(t *testing.T) {
	digits := strings.Repeat("12", 32) // would be a number to YAML
	p, err := ParsePolicy([]byte(`
monitor: Redoubt 0.1.0 native
machine: '{"cpus":2}'
kernel: [` + digits + `, 0x` + strings.Repeat("AB", 32) + `]
cmdline:
  - quiet ro
  - ""
initrd: none
ek: ` + digits + `
pcrs:
  7: ` + digits + `
  8: [` + digits + `]
`))
	if err != nil {
		t.Fatal(err)
	}
	if p.Monitor[0] != "Redoubt 0.1.0 native" || len(p.Kernel) != 2 || p.Kernel[1][0] != 0xab || len(p.Cmdline) != 2 ||
		!p.NoInitrd || p.Kernel[0].String() != digits || len(p.PCRs) != 2 || p.PCRs[7][0].String() != digits {
		t.Errorf("read as %+v", p)
	}
	b, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := ParsePolicy(b); err != nil || !reflect.DeepEqual(p, again) {
		t.Errorf("written as\n%s%v", b, err)
	}
}

// Every mistake is told with its line, its field and the mend.
func TestPolicyErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                               "line 1: document: empty",
		"{}":                             "line 1: document: no field",
		"initrd: []":                     "line 1: initrd: 0 values",
		"- a":                            "line 1: document: not a mapping",
		"monitor: a\nfoo: b":             "line 2: foo: no such field",
		"monitor: a\nmonitor: b":         "line 2: monitor: given twice",
		"monitor:":                       "line 1: monitor: not a value",
		"monitor: {a: b}":                "line 1: monitor: not a value",
		"a: &x b\nmonitor: *x":           "line 1: a: no such field",
		"monitor: &x b\nmachine: *x":     "line 2: machine: not a value",
		"kernel:\n- 12ab":                `line 2: kernel: "12ab" is no SHA-256 digest`,
		"kernel: none":                   `line 1: kernel: "none" is no SHA-256 digest`,
		"pcrs: {}":                       "line 1: pcrs: empty",
		"pcrs: 5":                        "line 1: document.pcrs: not a mapping",
		"pcrs:\n  24: ab":                "line 2: pcrs.24: no such register",
		"pcrs:\n  08: ab":                "line 2: pcrs.08: no such register",
		"pcrs:\n  8: ab":                 `line 2: pcrs.8: "ab" is no SHA-256 digest`,
		"monitor: a\n\tb":                "line 2: document: ",
		strings.Repeat("#", MaxPolicy+1): "line 1: document: 262145 bytes",
	} {
		_, err := ParsePolicy([]byte(text))
		if p := (*PolicyError)(nil); !errors.As(err, &p) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%.30q: %v, want %q", text, err, want)
		}
	}
}

// Whatever the text, ParsePolicy returns; what it takes can be written and read again.
func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte("monitor: a\ncmdline: [quiet, ro]\npcrs: {7: " + strings.Repeat("ab", 32) + "}\n"))
	f.Add([]byte("initrd: none\nkernel:\n- " + strings.Repeat("00", 32)))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParsePolicy(b)
		if err != nil {
			if e := (*PolicyError)(nil); !errors.As(err, &e) || e.Line < 1 {
				t.Fatalf("error without a line: %v", err)
			}
			return
		}
		out, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParsePolicy(out); err != nil || !reflect.DeepEqual(p, again) {
			t.Fatalf("differs when read again: %v\n%s", err, out)
		}
	})
}
