package sandbox

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// seccompData is struct seccomp_data.
type seccompData struct {
	number, arch uint32
	args         [6]uint64
}

// decide is the meaning of a list, written a second time and without a program.
func (p *Policy) decide(d seccompData, action uint32) uint32 {
	if d.arch != unix.AUDIT_ARCH_X86_64 || d.number&x32Bit != 0 {
		return action
	}
next:
	for _, r := range p.rules {
		if r.number != d.number {
			continue
		}
		for _, c := range r.conds {
			a := d.args[c.arg]
			if c.word {
				a = uint64(uint32(a))
			}
			if a&c.mask != c.value {
				continue next
			}
		}
		if r.errno != 0 {
			return unix.SECCOMP_RET_ERRNO | uint32(r.errno)
		}
		return unix.SECCOMP_RET_ALLOW
	}
	return action
}

// packet is d for the virtual machine, which reads words big-endian while the kernel reads them as
// they are.
func (d seccompData) packet() []byte {
	b := binary.BigEndian.AppendUint32(nil, d.number)
	b = binary.BigEndian.AppendUint32(b, d.arch)
	b = append(b, make([]byte, 8)...)
	for _, a := range d.args {
		b = binary.BigEndian.AppendUint32(b, uint32(a))
		b = binary.BigEndian.AppendUint32(b, uint32(a>>32))
	}
	return b
}

// Every list of this package, and one that uses all of the language, run in a virtual machine:
// for every number of a call and arguments at and beside those that rules name.
func TestFilter(t *testing.T) {
	lists := map[string]string{"all": `
		include go
		ioctl w1=0xae80
		ioctl w1=0x8004ae00 a2=0
		socket a0=AF_UNIX a1&0xf=1
		-socket EAFNOSUPPORT a0=AF_INET
		-socket EAFNOSUPPORT
		io_cancel a0=0xfedcba9876543210 a5&0xffff0000ffff0000=0x1234000056780000
		io_cancel a1=1 a2=2 a3=3 a4=4 a5=5 a0&7=7
	`}
	entries, err := fs.ReadDir(policies, "policies")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name, _ := strings.CutSuffix(e.Name(), ".txt")
		lists[name] = "write\nexit_group\ninclude " + name
	}
	for name, text := range lists {
		t.Run(name, func(t *testing.T) { testFilter(t, MustParsePolicy(name, []byte(text))) })
	}
}

func testFilter(t *testing.T, p *Policy) {
	const action = unix.SECCOMP_RET_USER_NOTIF
	raw, err := compile(p, action)
	if err != nil {
		t.Fatal(err)
	}
	prog, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("does not disassemble")
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	values := []uint64{0, 1, ^uint64(0)}
	for _, r := range p.rules {
		for _, c := range r.conds {
			values = append(values, c.value, c.value^1, c.value|1<<32, c.value|^c.mask, c.mask)
		}
	}
	n := 0
	try := func(d seccompData) {
		n++
		got, err := vm.Run(d.packet())
		if err != nil {
			t.Fatal(err)
		}
		if want := p.decide(d, action); uint32(got) != want {
			t.Fatalf("%s %x arch %#x: %#x, want %#x", callName(d.number), d.args, d.arch, got, want)
		}
	}
	for number := range uint32(512) {
		for range 40 {
			d := seccompData{number: number, arch: unix.AUDIT_ARCH_X86_64}
			for i := range d.args {
				d.args[i] = values[rnd.IntN(len(values))]
			}
			try(d)
			d.number |= x32Bit
			try(d)
			d.number, d.arch = number, unix.AUDIT_ARCH_I386
			try(d)
		}
	}
	// Each rule with arguments that meet it, and with each condition missed.
	for _, r := range p.rules {
		d := seccompData{number: r.number, arch: unix.AUDIT_ARCH_X86_64}
		for i := range d.args {
			d.args[i] = rnd.Uint64()
		}
		for _, c := range r.conds {
			d.args[c.arg] = d.args[c.arg]&^c.mask | c.value
		}
		try(d)
		for _, c := range r.conds {
			for bit := range 64 {
				e := d
				e.args[c.arg] ^= 1 << bit
				try(e)
			}
		}
	}
	t.Logf("%d instructions, %d calls tried", len(raw), n)
}

func TestPolicyErrors(t *testing.T) {
	for text, want := range map[string]string{
		"read\nfrobnicate":             `line 2: there is no system call "frobnicate"`,
		"include ../go":                `"../go" is not a name`,
		"include nothing":              `no list "nothing"`,
		"include":                      "include takes one name",
		"-read":                        "lacks its error",
		"-read ENOTHING":               `no error "ENOTHING"`,
		"read a6=1":                    "a0 to a5",
		"read a0":                      "must be an argument",
		"read a0=AF_NONE":              `"AF_NONE" is neither`,
		"read a0&1=2":                  "never holds",
		"read w0=0x100000000":          "does not fit",
		"read a0=0x10000000000000000":  "neither a number",
		"read a0=1,a1=2":               "neither a number",
		"mmap a2&=1":                   "neither a number",
		"ioctl w1&0x1ffffffff=1":       "does not fit",
		"socket a0 = AF_UNIX":          "must be an argument",
		"# fine\n\nread # fine\nread=": `"read="`,
	} {
		_, err := ParsePolicy("test", []byte(text))
		var pe *ParseError
		if !errors.As(err, &pe) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	for text, want := range map[string]string{
		"":                                   "empty",
		"read":                               "write must be allowed",
		"write a0=1\nexit_group":             "write must be allowed",
		"include go\nexecve":                 "execve cannot be allowed",
		"include go\n-execveat EPERM":        "execveat cannot be allowed",
		"include go\nexecveat a4=0x1000\n\n": "execveat cannot be allowed",
	} {
		p, err := ParsePolicy("test", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := compile(p, 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// What the parser takes compiles, or is refused with a reason.
func FuzzPolicy(f *testing.F) {
	entries, err := fs.ReadDir(policies, "policies")
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range entries {
		b, err := fs.ReadFile(policies, "policies/"+e.Name())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("include go\nioctl w1=0xae80 a2&1=0"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if len(text) > 1<<16 {
			return
		}
		p, err := ParsePolicy("fuzz", text)
		if err != nil {
			return
		}
		raw, err := compile(p, unix.SECCOMP_RET_KILL_PROCESS)
		if err != nil {
			return
		}
		prog, ok := bpf.Disassemble(raw)
		if !ok {
			t.Fatal("does not disassemble")
		}
		vm, err := bpf.NewVM(prog)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range p.rules {
			d := seccompData{number: r.number, arch: unix.AUDIT_ARCH_X86_64}
			for _, c := range r.conds {
				d.args[c.arg] |= c.value
			}
			got, err := vm.Run(d.packet())
			if err != nil {
				t.Fatal(err)
			}
			if want := p.decide(d, unix.SECCOMP_RET_KILL_PROCESS); uint32(got) != want {
				t.Fatalf("%s: %#x, want %#x", callName(r.number), got, want)
			}
		}
	})
}

func TestMain(m *testing.M) {
	LauncherMain()
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "as-program":
			os.Exit(7)
		case "as-parent":
			parent()
		}
	}
	status := m.Run()
	if bin, err := buildProbe(); err == nil && bin != os.Getenv("REDOUBT_TEST_PROBE") {
		_ = os.RemoveAll(filepath.Dir(bin))
	}
	os.Exit(status)
}

// What the launcher installs is what was compiled; less than whole instructions it refuses.
func TestFilterEncoding(t *testing.T) {
	p, err := BasePolicy("go")
	if err != nil {
		t.Fatal(err)
	}
	want, err := compile(p, unix.SECCOMP_RET_USER_NOTIF)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.told()
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeFilter(b)
	if err != nil || len(got) != len(want) {
		t.Fatalf("%d instructions of %d, %v", len(got), len(want), err)
	}
	for i, w := range want {
		if g := got[i]; g.Code != w.Op || g.Jt != w.Jt || g.Jf != w.Jf || g.K != w.K {
			t.Errorf("instruction %d is %+v, was %+v", i, g, w)
		}
	}
	for _, bad := range [][]byte{nil, b[:len(b)-1]} {
		if _, err := decodeFilter(bad); err == nil {
			t.Errorf("a filter of %d bytes was taken", len(bad))
		}
	}
}
