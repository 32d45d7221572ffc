// Package spec is what an operator asks for: one guest, in YAML (or JSON, which is YAML), with
// every value checked before anything is made of it.
//
// The published schema is docs/guest.schema.json, made from these types.
package spec

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// A Guest is one trusted virtual machine.
type Guest struct {
	Name     string   `yaml:"name" json:"name" jsonschema:"required,pattern=^[a-z0-9][a-z0-9-]{0\\,62}$,description=unique on the host; lower-case letters\\, digits and dashes"`
	Emulator Emulator `yaml:"emulator,omitempty" json:"emulator,omitempty" jsonschema:"enum=auto,enum=native,enum=qemu,default=auto,description=auto takes the native monitor where KVM can run it and nothing needs QEMU"`
	CPUs     int      `yaml:"cpus,omitempty" json:"cpus,omitempty" jsonschema:"minimum=1,maximum=8,default=1"`
	Memory   Size     `yaml:"memory,omitempty" json:"memory,omitempty" jsonschema:"default=512MiB,description=128MiB or more; a number with KiB\\, MiB or GiB"`
	Boot     Boot     `yaml:"boot" json:"boot"`
	Disks    []Disk   `yaml:"disks,omitempty" json:"disks,omitempty" jsonschema:"maxItems=16"`
	NICs     []NIC    `yaml:"nics,omitempty" json:"nics,omitempty" jsonschema:"maxItems=8"`
	TPM      TPM      `yaml:"tpm,omitempty" json:"tpm,omitzero"`
	Modules  *Modules `yaml:"modules,omitempty" json:"modules,omitempty" jsonschema:"description=isolate the modules of the guest's kernel (native monitor only)"`

	Validation *Validation `yaml:"validation,omitempty" json:"validation,omitempty" jsonschema:"description=hold the guest's disks to a baseline while it runs"`
}

// Emulator chooses what runs the guest.
type Emulator string

const (
	Auto   Emulator = "auto"
	Native Emulator = "native"
	QEMU   Emulator = "qemu"
)

// Boot says what runs first: a kernel, or firmware that boots from the first disk.
type Boot struct {
	Kernel   string   `yaml:"kernel,omitempty" json:"kernel,omitempty" jsonschema:"description=path of a Linux bzImage"`
	Initrd   string   `yaml:"initrd,omitempty" json:"initrd,omitempty" jsonschema:"description=path of an initial RAM file system"`
	Cmdline  string   `yaml:"cmdline,omitempty" json:"cmdline,omitempty" jsonschema:"default=console=ttyS0,description=kernel command line"`
	Firmware Firmware `yaml:"firmware,omitempty" json:"firmware,omitempty" jsonschema:"enum=seabios,enum=ovmf,description=boot the first disk through firmware (QEMU only)"`
}

// Firmware of a guest that boots from its disk.
type Firmware string

const (
	SeaBIOS Firmware = "seabios"
	OVMF    Firmware = "ovmf"
)

// A Disk is a raw image, or an overlay over one.
type Disk struct {
	Path     string `yaml:"path" json:"path" jsonschema:"required,description=raw image; make one with redoubt disk create"`
	Base     string `yaml:"base,omitempty" json:"base,omitempty" jsonschema:"description=raw image that is only read; path is an overlay over it\\, made with redoubt disk create --base"`
	ReadOnly bool   `yaml:"readonly,omitempty" json:"readonly,omitempty"`
}

// TPM settings. Every guest has a TPM unless Disabled.
type TPM struct {
	Disabled bool     `yaml:"disabled,omitempty" json:"disabled,omitempty" jsonschema:"description=start without a TPM; such a guest cannot be attested"`
	Timeout  Duration `yaml:"timeout,omitempty" json:"timeout,omitempty" jsonschema:"default=2m,description=how long a guest may wait for its vTPM before it is failed"`
	Banks    []Bank   `yaml:"banks,omitempty" json:"banks,omitempty" jsonschema:"enum=sha1,enum=sha256,enum=sha384,enum=sha512,uniqueItems=true,description=PCR banks in which the host measures the boot; default and always among them: sha256"`
}

// Bank names a PCR bank by its digest algorithm.
type Bank string

// SHA256 is the bank that quotes and policies are made of.
const SHA256 Bank = "sha256"

var banks = []Bank{"sha1", SHA256, "sha384", "sha512"}

// complete adds the bank that is always there.
func (t *TPM) complete() error {
	for i, b := range t.Banks {
		field := fmt.Sprintf("tpm.banks[%d]", i)
		if !slices.Contains(banks, b) {
			return &Error{Field: field, Text: fmt.Sprintf("%q: use sha1, sha256, sha384 or sha512", b)}
		}
		if slices.Contains(t.Banks[:i], b) {
			return &Error{Field: field, Text: fmt.Sprintf("%s stands there twice", b)}
		}
	}
	if !slices.Contains(t.Banks, SHA256) {
		t.Banks = append(t.Banks, SHA256)
	}
	return nil
}

// Size in bytes.
type Size int64

// Duration of a wait.
type Duration time.Duration

// Bounds.
const (
	MinMemory    Size = 128 << 20
	MaxMemory    Size = 1 << 40
	MaxCPUs           = 8
	MaxCmdline        = 2047 // the kernel's COMMAND_LINE_SIZE less its NUL
	MaxDisks          = 16
	MaxNICs           = 8
	MaxVLAN           = 4094
	MaxAddresses      = 16 // of one NIC
	maxDocument       = 64 << 10
	granularity       = 2 << 20
)

// An Error is a mistake in a spec: where, what, and how to mend it.
type Error struct {
	Line  int    // 1-based; 0 where the value came from a flag
	Field string // dotted path, such as boot.kernel
	Text  string
}

func (e *Error) Error() string {
	if e.Line > 0 {
		return fmt.Sprintf("line %d: %s: %s", e.Line, e.Field, e.Text)
	}
	return fmt.Sprintf("%s: %s", e.Field, e.Text)
}

// Parse reads one guest, refuses unknown fields, fills in the defaults and checks it.
func Parse(r io.Reader) (*Guest, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxDocument {
		return nil, &Error{Field: "document", Text: fmt.Sprintf("over %d bytes", maxDocument)}
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, yamlError(err)
	}
	if len(doc.Content) == 0 {
		return nil, &Error{Line: 1, Field: "name", Text: "the document is empty: give at least name and boot"}
	}
	var g Guest
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	dec.KnownFields(true)
	if err := dec.Decode(&g); err != nil {
		return nil, yamlError(err)
	}
	if n := key(doc.Content[0], "modules"); n != nil && g.Modules == nil { // else nothing would be isolated
		return nil, &Error{Line: n.Line, Field: "modules", Text: "empty: use {} for the defaults, or leave it out"}
	}
	if n := key(doc.Content[0], "validation"); n != nil && g.Validation == nil {
		return nil, &Error{Line: n.Line, Field: "validation", Text: "empty: say when (every, written), or leave it out and use `redoubt validate`"}
	}
	if err := dec.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, &Error{Line: 1, Field: "document", Text: "more than one document: one guest a file"}
	}
	if err := g.Complete(); err != nil {
		var e *Error
		if errors.As(err, &e) {
			e.Line = lineOf(doc.Content[0], e.Field)
		}
		return nil, err
	}
	return &g, nil
}

var yamlLine = regexp.MustCompile(`line (\d+): (.*)`)

func yamlError(err error) error {
	m := yamlLine.FindStringSubmatch(err.Error())
	if m == nil {
		return &Error{Line: 1, Field: "document", Text: strings.TrimPrefix(err.Error(), "yaml: ")}
	}
	n, _ := strconv.Atoi(m[1])
	text, field := m[2], "document"
	if f, ok := strings.CutPrefix(text, "field "); ok {
		if name, _, ok := strings.Cut(f, " not found"); ok {
			field, text = name, "no such field: see docs/guest.schema.json"
		}
	}
	return &Error{Line: n, Field: field, Text: text}
}

// lineOf finds the line of a dotted field, or of its nearest parent.
func lineOf(n *yaml.Node, field string) int {
	line := n.Line
	for _, part := range strings.Split(field, ".") {
		name, index, _ := strings.Cut(strings.TrimSuffix(part, "]"), "[")
		var next *yaml.Node
		if n.Kind == yaml.MappingNode {
			for i := 0; i+1 < len(n.Content); i += 2 {
				if n.Content[i].Value == name {
					line, next = n.Content[i].Line, n.Content[i+1]
				}
			}
		}
		if next == nil {
			return line
		}
		if i, err := strconv.Atoi(index); err == nil && next.Kind == yaml.SequenceNode && i < len(next.Content) {
			next = next.Content[i]
			line = next.Line
		}
		n = next
	}
	return line
}

// key finds the name of a field that is there, whatever its value is.
func key(n *yaml.Node, field string) *yaml.Node {
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == field {
			return n.Content[i]
		}
	}
	return nil
}

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// ValidName reports whether s can be a guest's name.
func ValidName(s string) bool { return nameForm.MatchString(s) }

// Complete fills in the defaults and checks every field. Errors are *Error.
func (g *Guest) Complete() error {
	bad := func(field, format string, args ...any) error {
		return &Error{Field: field, Text: fmt.Sprintf(format, args...)}
	}
	if g.Emulator == "" {
		g.Emulator = Auto
	}
	if g.CPUs == 0 {
		g.CPUs = 1
	}
	if g.Memory == 0 {
		g.Memory = 512 << 20
	}
	if g.TPM.Timeout == 0 {
		g.TPM.Timeout = Duration(2 * time.Minute)
	}
	if g.Boot.Kernel != "" && g.Boot.Cmdline == "" {
		g.Boot.Cmdline = "console=ttyS0"
	}
	switch {
	case !ValidName(g.Name):
		return bad("name", "%q: use up to 63 lower-case letters, digits and dashes", g.Name)
	case g.Emulator != Auto && g.Emulator != Native && g.Emulator != QEMU:
		return bad("emulator", "%q: use auto, native or qemu", g.Emulator)
	case g.CPUs < 1 || g.CPUs > MaxCPUs:
		return bad("cpus", "%d: use 1 to %d", g.CPUs, MaxCPUs)
	case g.Memory < MinMemory || g.Memory > MaxMemory:
		return bad("memory", "%v: use %v to %v", g.Memory, MinMemory, MaxMemory)
	case g.Memory%granularity != 0:
		return bad("memory", "%v: use a multiple of 2MiB", g.Memory)
	case g.TPM.Timeout < 0 || g.TPM.Timeout > Duration(time.Hour):
		return bad("tpm.timeout", "%v: use up to 1h", time.Duration(g.TPM.Timeout))
	case len(g.Disks) > MaxDisks:
		return bad("disks", "%d: the most is %d", len(g.Disks), MaxDisks)
	}
	if err := g.TPM.complete(); err != nil {
		return err
	}
	for i, d := range g.Disks {
		if d.Path == "" {
			return bad(fmt.Sprintf("disks[%d].path", i), "missing: give the path of a raw image")
		}
		if strings.ContainsAny(d.Path, "\x00\n") {
			return bad(fmt.Sprintf("disks[%d].path", i), "%q: no such characters in a path", d.Path)
		}
		if strings.ContainsAny(d.Base, "\x00\n") {
			return bad(fmt.Sprintf("disks[%d].base", i), "%q: no such characters in a path", d.Base)
		}
		if d.Base == d.Path {
			return bad(fmt.Sprintf("disks[%d].base", i), "%s is the overlay itself: name what it was made over", d.Base)
		}
	}
	if len(g.NICs) > MaxNICs {
		return bad("nics", "%d: the most is %d", len(g.NICs), MaxNICs)
	}
	for i := range g.NICs {
		if err := g.NICs[i].complete(fmt.Sprintf("nics[%d]", i), bad); err != nil {
			return err
		}
	}
	if err := g.Boot.check(g, bad); err != nil {
		return err
	}
	if err := g.Modules.complete(g, bad); err != nil {
		return err
	}
	return g.Validation.complete(g, bad)
}

func (b *Boot) check(g *Guest, bad func(field, format string, args ...any) error) error {
	switch {
	case b.Firmware == "" && b.Kernel == "":
		return bad("boot.kernel", "missing: give a kernel, or boot.firmware to boot from the first disk")
	case b.Firmware != "" && b.Firmware != SeaBIOS && b.Firmware != OVMF:
		return bad("boot.firmware", "%q: use seabios or ovmf", b.Firmware)
	case b.Firmware != "" && b.Kernel != "":
		return bad("boot.firmware", "excludes boot.kernel: give one of them")
	case b.Firmware != "" && (b.Initrd != "" || b.Cmdline != ""):
		return bad("boot.firmware", "boot.initrd and boot.cmdline belong to boot.kernel: leave them out")
	case b.Firmware != "" && g.Emulator == Native:
		return bad("boot.firmware", "needs emulator qemu or auto")
	case b.Firmware != "" && len(g.Disks) == 0:
		return bad("boot.firmware", "needs a disk to boot from")
	case len(b.Cmdline) > MaxCmdline:
		return bad("boot.cmdline", "%d bytes: the kernel takes %d", len(b.Cmdline), MaxCmdline)
	case strings.ContainsFunc(b.Cmdline, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return bad("boot.cmdline", "holds a control character")
	}
	return nil
}

// ParseSize reads a number of bytes with an optional KiB, MiB, GiB or TiB.
func ParseSize(s string) (Size, error) {
	num, shift := strings.TrimSpace(s), 0
	for unit, sh := range map[string]int{"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40, "K": 10, "M": 20, "G": 30, "T": 40} {
		if n, ok := strings.CutSuffix(num, unit); ok && (len(n) == 0 || n[len(n)-1] >= '0' && n[len(n)-1] <= '9' || n[len(n)-1] == ' ') {
			num, shift = strings.TrimSpace(n), sh
			break
		}
	}
	n, err := strconv.ParseUint(num, 10, 63)
	if err != nil || n > (1<<62)>>shift {
		return 0, fmt.Errorf("%q is no size: use a number with KiB, MiB or GiB", s)
	}
	return Size(n << shift), nil
}

func (s Size) String() string {
	for _, u := range []struct {
		shift int
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if s != 0 && s%(1<<u.shift) == 0 {
			return fmt.Sprintf("%d%s", s>>u.shift, u.name)
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// UnmarshalText reads what ParseSize reads.
func (s *Size) UnmarshalText(b []byte) error {
	v, err := ParseSize(string(b))
	if err == nil {
		*s = v
	}
	return err
}

// MarshalText writes the shortest exact form.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads a duration as 90s or 2m.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is no duration: use a number with ms, s or m", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }
