package spec

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

const full = `name: web-1
emulator: qemu
cpus: 2
memory: 1GiB
boot:
  kernel: /boot/vmlinuz
  initrd: /boot/initrd.img
disks:
  - path: /srv/web.img
  - path: /srv/data.img
    readonly: true
nics:
  - {}
  - vlan: 7
    mac: 02:00:00:00:00:0A
    addresses: [192.0.2.1, '2001:DB8::1']
tpm:
  timeout: 90s
  banks: [sha384]
`

func TestParse(t *testing.T) {
	g, err := Parse(strings.NewReader(full))
	if err != nil {
		t.Fatal(err)
	}
	if g.Memory != 1<<30 || g.CPUs != 2 || len(g.Disks) != 2 || !g.Disks[1].ReadOnly ||
		time.Duration(g.TPM.Timeout) != 90*time.Second || len(g.TPM.Banks) != 2 || g.TPM.Banks[1] != SHA256 || g.Boot.Cmdline != "console=ttyS0" {
		t.Fatalf("%+v", g)
	}
	if n := g.NICs; len(n) != 2 || n[0].VLAN != 1 || n[0].MAC != "" || n[1].VLAN != 7 || n[1].MAC != "02:00:00:00:00:0a" ||
		n[1].Addresses[1] != "2001:db8::1" {
		t.Fatalf("%+v", n)
	}
}

// TestModules: without the section nothing is isolated; with it, all that is not said is as strict as it can be. What is
// measured of it does not depend on how it was written.
func TestModules(t *testing.T) {
	parse := func(modules string) *Guest {
		t.Helper()
		g, err := Parse(strings.NewReader("name: a\nboot: {kernel: /k}\n" + modules))
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	if g := parse(""); g.Modules != nil || g.Modules.Policy() != nil {
		t.Errorf("%+v", g.Modules)
	}
	if got := *parse("modules: {}\n").Modules; !reflect.DeepEqual(got, Modules{Default: Isolate, Mode: Enforce}) {
		t.Errorf("%+v", got)
	}
	g := parse("modules: {default: refuse, mode: learn, trusted: [virtio-net, ext4], profile: /p}\n")
	want := Modules{Default: Refuse, Mode: Learn, Trusted: []string{"ext4", "virtio_net"}, Profile: "/p"}
	if !reflect.DeepEqual(*g.Modules, want) {
		t.Errorf("%+v", *g.Modules)
	}
	if err := g.Complete(); err != nil || !reflect.DeepEqual(*g.Modules, want) {
		t.Errorf("again: %+v, %v", *g.Modules, err)
	}
	if p := g.Modules.Policy(); p.Profile != "" || p.Mode != Learn || g.Modules.Profile != "/p" {
		t.Errorf("%+v", p)
	}
	if g := parse("emulator: native\nmodules: {default: trust}\n"); g.Modules.Default != Trust || g.CPUs != 1 {
		t.Errorf("%+v", g)
	}
}

// TestDefaultMAC: each NIC of each guest has one of its own, always the same.
func TestDefaultMAC(t *testing.T) {
	seen := map[string]bool{}
	for _, uuid := range []string{"a", "b"} {
		for i := range MaxNICs {
			m := DefaultMAC(uuid, i)
			if m[0]&3 != 2 || seen[m.String()] || m.String() != DefaultMAC(uuid, i).String() {
				t.Errorf("%s %d: %v", uuid, i, m)
			}
			seen[m.String()] = true
		}
	}
}

// TestErrorsNameFieldAndLine: every mistake is one line that names where it is.
func TestErrorsNameFieldAndLine(t *testing.T) {
	for _, c := range []struct{ doc, want string }{
		{"", "line 1: name:"},
		{"name: Web\nboot: {kernel: /k}\n", "line 1: name:"},
		{"name: a\ncpus: 9\nboot: {kernel: /k}\n", "line 2: cpus: 9"},
		{"name: a\nboot: {kernel: /k}\nmemory: 64MiB\n", "line 3: memory: 64MiB"},
		{"name: a\nboot: {kernel: /k}\nmemory: lots\n", "no size"},
		{"name: a\nboot:\n  kernel: /k\n  bios: x\n", "line 4: bios: no such field"},
		{"name: a\nboot:\n  firmware: ovmf\n", "line 3: boot.firmware: needs a disk"},
		{"name: a\nboot: {}\n", "line 2: boot.kernel: missing"},
		{"name: a\nboot: {kernel: /k}\ndisks:\n- path: /a\n- readonly: true\n", "line 5: disks[1].path"},
		{"name: a\nboot: {kernel: /k}\n---\nname: b\n", "more than one document"},
		{"name: a\nboot: {kernel: /k, cmdline: \"a\\nb\"}\n", "control character"},
		{"name: a\nboot: {kernel: /k}\ntpm: {timeout: 2 parsecs}\n", "no duration"},
		{"name: a\nboot: {kernel: /k}\ntpm:\n  banks: [sha1, md5]\n", "line 4: tpm.banks[1]: \"md5\""},
		{"name: a\nboot: {kernel: /k}\ntpm: {banks: [sha1, sha1]}\n", "sha1 stands there twice"},
		{"name: a\nboot: [1]\n", "line 2"},
		{"name: a\nboot: {kernel: /k}\nnics:\n- {}\n- vlan: 4095\n", "line 5: nics[1].vlan: 4095"},
		{"name: a\nboot: {kernel: /k}\nnics:\n- vlan: -1\n", "line 4: nics[0].vlan: -1"},
		{"name: a\nboot: {kernel: /k}\nnics:\n- mac: '01:00:00:00:00:01'\n", "line 4: nics[0].mac: 01:00:00:00:00:01"},
		{"name: a\nboot: {kernel: /k}\nnics:\n- mac: 0200.0000.0001\n", "line 4: nics[0].mac"},
		{"name: a\nboot: {kernel: /k}\nnics:\n- addresses:\n  - 192.0.2.1\n  - 192.0.2.1/24\n", "line 6: nics[0].addresses[1]"},
		{"name: a\nboot: {kernel: /k}\nnics:\n- addresses: ['ff02::1']\n", "nics[0].addresses[0]: ff02::1: is no station"},
		{"name: a\nboot: {kernel: /k}\nnics: [{}, {}, {}, {}, {}, {}, {}, {}, {}]\n", "line 3: nics: 9"},
		{"\t", "line 1"},
		{"name: a\nboot: {kernel: /k}\nmodules:\n", "line 3: modules: empty: use {}"},
		{"name: a\nboot: {kernel: /k}\nmodules: isolate\n", "line 3"},
		{"name: a\nboot: {kernel: /k}\nmodules:\n  default: fence\n", "line 4: modules.default: \"fence\": use isolate, trust or refuse"},
		{"name: a\nboot: {kernel: /k}\nmodules:\n  mode: watch\n", "line 4: modules.mode: \"watch\": use monitor, learn or enforce"},
		{"name: a\nboot: {kernel: /k}\nmodules:\n  trusted:\n  - ext4\n  - ../x\n", "line 6: modules.trusted[1]: \"../x\": use a module's name"},
		{"name: a\nboot: {kernel: /k}\nmodules: {trusted: [virtio-net, virtio_net]}\n", "modules.trusted[1]: virtio_net stands there twice"},
		{"name: a\nboot: {kernel: /k}\nmodules: {trusted: [" + strings.Repeat("a, ", 64) + "a]}\n", "line 3: modules.trusted: 65: the most is 64"},
		{"name: a\nboot: {kernel: /k}\nmodules:\n  default: trust\n  trusted: [a]\n", "line 5: modules.trusted: modules.default is trust"},
		{"name: a\nboot: {kernel: /k}\nmodules:\n  profile: \"a\\nb\"\n", "line 4: modules.profile"},
		{"name: a\nboot: {kernel: /k}\nmodules:\n  profil: a\n", "line 4: profil: no such field"},
		{"name: a\nemulator: qemu\nboot: {kernel: /k}\nmodules: {}\n", "line 2: emulator: qemu isolates no modules"},
		{"name: a\nboot: {kernel: /k}\ntpm:\n  disabled: true\nmodules: {}\n", "line 4: tpm.disabled: modules are isolated from"},
		{"name: a\nboot:\n  firmware: ovmf\ndisks: [{path: /d}]\nmodules: {}\n", "line 3: boot.firmware: modules are isolated"},
	} {
		_, err := Parse(strings.NewReader(c.doc))
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", c.doc, err, c.want)
		}
		var e *Error
		if !errors.As(err, &e) {
			t.Errorf("%q: %T", c.doc, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("name: a\nboot: {kernel: /k}\nmemory: 99999999999TiB"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("name: a\nboot: {kernel: /k}\nmodules: {default: refuse, trusted: [a-b]}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := Parse(bytes.NewReader(b))
		if err == nil && (g.CPUs < 1 || g.CPUs > MaxCPUs || g.Memory < MinMemory || !ValidName(g.Name) ||
			g.Modules != nil && (g.Emulator == QEMU || g.TPM.Disabled || g.Boot.Kernel == "")) {
			t.Fatalf("accepted %+v", g)
		}
	})
}

func FuzzParseSize(f *testing.F) {
	f.Add("512MiB")
	f.Add("9223372036854775807K")
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := ParseSize(s); err == nil {
			if again, err := ParseSize(v.String()); v < 0 || err != nil || again != v {
				t.Fatalf("%q is %d, prints as %v", s, v, v)
			}
		}
	})
}

var rewrite = flag.Bool("rewrite", false, "renew docs/guest.schema.json")

// TestPublishedSchema: the schema in the docs is the one of the types.
func TestPublishedSchema(t *testing.T) {
	const path = "../docs/guest.schema.json"
	want, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	if *rewrite {
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s is not the schema of the types (%v): renew it with `go test ./spec -rewrite`", path, err)
	}
}

// A NIC of the command line is one of a spec; what is neither is refused.
func TestParseNIC(t *testing.T) {
	got, err := ParseNIC("vlan=10,mac=02:00:00:00:00:01,address=192.0.2.1,address=2001:db8::1")
	want := NIC{VLAN: 10, MAC: "02:00:00:00:00:01", Addresses: []string{"192.0.2.1", "2001:db8::1"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := ParseNIC(""); err != nil || !reflect.DeepEqual(got, NIC{}) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, text := range []string{"10", "vlan=", "vlan=x", "vlan=0", "vlan=-1", "vlan=1,vlan=2", "mac=a,mac=b", "ip=192.0.2.1"} {
		if got, err := ParseNIC(text); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

// TestValidation: what validates a guest is checked whole, each mistake by its field; the defaults are not written into the spec.
func TestValidation(t *testing.T) {
	const signer = "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	guest := func(v string) string {
		return "name: g\nboot: {kernel: /k}\ndisks: [{path: /d}]\nnics: [{}]\nvalidation: " + v + "\n"
	}
	g, err := Parse(strings.NewReader(guest("{signers: [\"" + signer + "\"], every: 1h, written: 64MiB, respond: {critical: [quarantine, log]}}")))
	if err != nil {
		t.Fatal(err)
	}
	if g.Validation.Tries != 0 || g.Validation.Scratch != 0 {
		t.Errorf("%+v", g.Validation)
	}
	if v := g.Validated(); v.Tries != DefaultTries || v.Scratch != DefaultScratch || len(v.Respond.Critical) != 2 || v.Respond.Info[0] != Log {
		t.Errorf("%+v", v)
	}
	if v := (&Guest{}).Validated(); v.Tries != DefaultTries || v.Every != 0 {
		t.Errorf("%+v", v)
	}
	for v, field := range map[string]string{
		"":                                  "validation",
		"{signers: [rsa]}":                  "validation.signers[0]",
		"{every: 10ms}":                     "validation.every",
		"{written: 4KiB}":                   "validation.written",
		"{exits: 5}":                        "validation.exits",
		"{status: 0x1002}":                  "validation.status",
		"{status: 0x800000000000}":          "validation.status",
		"{tries: 100000}":                   "validation.tries",
		"{scratch: 1KiB}":                   "validation.scratch",
		"{respond: {critical: [reboot]}}":   "validation.respond.critical[0]",
		"{respond: {warning: [log, nuke]}}": "validation.respond.warning[1]",
	} {
		_, err := Parse(strings.NewReader(guest(v)))
		var e *Error
		if !errors.As(err, &e) || e.Field != field {
			t.Errorf("%s: %v", v, err)
		}
	}
	for doc, field := range map[string]string{
		"name: g\nboot: {kernel: /k}\nvalidation: {every: 1h}\n":                                                                 "validation",
		"name: g\nboot: {kernel: /k}\ndisks: [{path: /d}]\nvalidation: {respond: {critical: [quarantine]}}\n":                    "validation.respond.critical[0]",
		"name: g\nboot: {kernel: /k}\ndisks: [{path: /d}]\ntpm: {disabled: true}\nvalidation: {respond: {critical: [revoke]}}\n": "validation.respond.critical[0]",
		"name: g\nemulator: qemu\nboot: {kernel: /k}\ndisks: [{path: /d}]\nvalidation: {exits: 5000}\n":                          "validation.exits",
	} {
		_, err := Parse(strings.NewReader(doc))
		var e *Error
		if !errors.As(err, &e) || e.Field != field {
			t.Errorf("%s: %v", doc, err)
		}
	}
}
