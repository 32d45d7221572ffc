package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/attest/ima"
)

// Bounds of a policy.
const (
	MaxPolicy  = 256 << 10 // bytes of the document
	maxChoices = 256       // values of one field
)

// A Hash is a SHA-256 digest or register.
type Hash [sha256.Size]byte

// String is the digest in lower-case hexadecimal.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// A Policy says what is good. A field that is given must hold one of its values; a field that
// is not is not looked at. As YAML each field takes one value or a list:
//
//	monitor: Redoubt 0.1.0 native
//	kernel: [5a1f…, 77c0…]
//	cmdline: console=ttyS0 ro
//	pcrs: {7: 65ca…}
type Policy struct {
	Monitor  []string          // monitor version
	Machine  []string          // machine configuration, as measured
	Kernel   []Hash            // SHA-256 of the kernel image
	Cmdline  []string          // kernel command line
	Initrd   []Hash            // SHA-256 of the initial RAM file system
	NoInitrd bool              // a guest without one is good (the value none of initrd)
	Firmware []Hash            // SHA-256 of the firmware image
	EK       []Hash            // SHA-256 of the EK's SubjectPublicKeyInfo: which TPM
	IMA      []string          // what may be measured while the guest runs, each as a line of an allowlist
	PCRs     map[uint32][]Hash // registers of the SHA-256 bank
}

// A PolicyError is a mistake in a policy: where, what, and how to mend it.
type PolicyError struct {
	Line  int    // 1-based
	Field string // dotted path, such as pcrs.8
	Text  string
}

func (e *PolicyError) Error() string {
	return fmt.Sprintf("line %d: %s: %s", e.Line, e.Field, e.Text)
}

// ParsePolicy reads a policy as YAML and refuses what it does not know. Errors are
// *PolicyError. A policy without any field is refused: it would take everything for good.
func ParsePolicy(b []byte) (*Policy, error) {
	if len(b) > MaxPolicy {
		return nil, &PolicyError{1, "document", fmt.Sprintf("%d bytes: the most is %d", len(b), MaxPolicy)}
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, yamlError(err)
	}
	if len(doc.Content) == 0 {
		return nil, &PolicyError{1, "document", "empty: it would take everything for good"}
	}
	p := &Policy{}
	err := eachField(doc.Content[0], "", func(field string, key, value *yaml.Node) error {
		return p.field(field, key, value)
	})
	if err == nil && p.empty() {
		err = &PolicyError{doc.Content[0].Line, "document", "no field is given: it would take everything for good"}
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

var yamlLine = regexp.MustCompile(`line (\d+): (.*)`)

func yamlError(err error) error {
	m := yamlLine.FindStringSubmatch(err.Error())
	if m == nil {
		return &PolicyError{1, "document", strings.TrimPrefix(err.Error(), "yaml: ")}
	}
	n, _ := strconv.Atoi(m[1]) // digits: the expression says so
	return &PolicyError{n, "document", m[2]}
}

// eachField calls f for the fields of a mapping, each of which may stand there once.
func eachField(n *yaml.Node, under string, f func(field string, key, value *yaml.Node) error) error {
	if n.Kind != yaml.MappingNode {
		return &PolicyError{n.Line, strings.TrimSuffix("document."+under, "."), "not a mapping: use field: value"}
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field := under + key.Value
		if seen[key.Value] {
			return &PolicyError{key.Line, field, "given twice: use a list"}
		}
		seen[key.Value] = true
		if err := f(field, key, value); err != nil {
			return err
		}
	}
	return nil
}

func (p *Policy) field(field string, key, value *yaml.Node) error {
	if field == "pcrs" {
		if value.Kind == yaml.MappingNode && len(value.Content) == 0 {
			return &PolicyError{key.Line, field, "empty: give registers, or leave it out"}
		}
		p.PCRs = map[uint32][]Hash{}
		return eachField(value, "pcrs.", func(field string, key, value *yaml.Node) error {
			n, err := strconv.ParseUint(key.Value, 10, 8)
			if err != nil || n >= PCRCount || strconv.FormatUint(n, 10) != key.Value {
				return &PolicyError{key.Line, field, fmt.Sprintf("no such register: use 0 to %d", PCRCount-1)}
			}
			h, err := hashes(field, value, nil)
			p.PCRs[uint32(n)] = h
			return err
		})
	}
	var err error
	switch field {
	case "monitor":
		p.Monitor, err = values(field, value)
	case "machine":
		p.Machine, err = values(field, value)
	case "cmdline":
		p.Cmdline, err = values(field, value)
	case "kernel":
		p.Kernel, err = hashes(field, value, nil)
	case "firmware":
		p.Firmware, err = hashes(field, value, nil)
	case "ek":
		p.EK, err = hashes(field, value, nil)
	case "ima":
		p.IMA, err = allowed(field, value)
	case "initrd":
		p.Initrd, err = hashes(field, value, &p.NoInitrd)
	default:
		err = &PolicyError{key.Line, field, "no such field: use monitor, machine, kernel, cmdline, initrd, firmware, ek, ima or pcrs"}
	}
	return err
}

// allowed reads lines of an allowlist.
func allowed(field string, n *yaml.Node) ([]string, error) {
	lines, err := values(field, n)
	if err != nil {
		return nil, err
	}
	var list ima.Allowlist
	for i, l := range lines {
		if err := list.Add(l); err != nil {
			line := n.Line
			if n.Kind == yaml.SequenceNode {
				line = n.Content[i].Line
			}
			return nil, &PolicyError{line, field, err.Error()}
		}
	}
	return lines, nil
}

// values reads one text or a list of them.
func values(field string, n *yaml.Node) ([]string, error) {
	list := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		list = n.Content
	}
	if len(list) == 0 || len(list) > maxChoices {
		return nil, &PolicyError{n.Line, field, fmt.Sprintf("%d values: give 1 to %d", len(list), maxChoices)}
	}
	var out []string
	for _, v := range list {
		if v.Kind != yaml.ScalarNode || v.Tag == "!!null" {
			return nil, &PolicyError{v.Line, field, "not a value: give a text or a list of them"}
		}
		out = append(out, v.Value) // as written: a digest of digits alone is no number
	}
	return out, nil
}

// hashes reads digests; where none is not nil that word is a value too.
func hashes(field string, n *yaml.Node, none *bool) ([]Hash, error) {
	list, err := values(field, n)
	if err != nil {
		return nil, err
	}
	var out []Hash
	for i, s := range list {
		if none != nil && s == "none" {
			*none = true
			continue
		}
		b, err := hex.DecodeString(strings.TrimPrefix(s, "0x"))
		if err != nil || len(b) != sha256.Size {
			line := n.Line
			if n.Kind == yaml.SequenceNode {
				line = n.Content[i].Line
			}
			return nil, &PolicyError{line, field, fmt.Sprintf("%q is no SHA-256 digest: use %d hexadecimal digits", clip(s), 2*sha256.Size)}
		}
		out = append(out, Hash(b))
	}
	return out, nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func (p *Policy) empty() bool {
	return len(p.Monitor)+len(p.Machine)+len(p.Kernel)+len(p.Cmdline)+len(p.Initrd)+len(p.Firmware)+len(p.EK)+len(p.IMA)+len(p.PCRs) == 0 && !p.NoInitrd
}

// Encode writes the policy as YAML that [ParsePolicy] reads.
func (p *Policy) Encode() ([]byte, error) {
	texts := func(h []Hash) (out []string) {
		for _, v := range h {
			out = append(out, v.String())
		}
		return out
	}
	doc := struct {
		Monitor  []string            `yaml:"monitor,omitempty"`
		Machine  []string            `yaml:"machine,omitempty"`
		Kernel   []string            `yaml:"kernel,omitempty"`
		Cmdline  []string            `yaml:"cmdline,omitempty"`
		Initrd   []string            `yaml:"initrd,omitempty"`
		Firmware []string            `yaml:"firmware,omitempty"`
		EK       []string            `yaml:"ek,omitempty"`
		IMA      []string            `yaml:"ima,omitempty"`
		PCRs     map[uint32][]string `yaml:"pcrs,omitempty"`
	}{
		Monitor: p.Monitor, Machine: p.Machine, Kernel: texts(p.Kernel), Cmdline: p.Cmdline,
		Initrd: texts(p.Initrd), Firmware: texts(p.Firmware), EK: texts(p.EK), IMA: p.IMA, PCRs: map[uint32][]string{},
	}
	if p.NoInitrd {
		doc.Initrd = append(doc.Initrd, "none")
	}
	for pcr, h := range p.PCRs {
		doc.PCRs[pcr] = texts(h)
	}
	return yaml.Marshal(doc)
}

// PolicyFrom makes the policy that takes exactly this state of a guest for good, and any guest
// whose TPM a trusted CA vouches for. What is measured by name is named; the other registers of
// the boot are given by value. The evidence must have passed [Verify] up to the log; PolicyFrom
// checks no more than that its log and registers agree.
func PolicyFrom(e *Evidence) (*Policy, error) {
	v := &verifier{e: e, report: &Report{}}
	if len(e.PCRs) != PCRCount {
		return nil, fmt.Errorf("policy: evidence with %d registers, not %d", len(e.PCRs), PCRCount)
	}
	for i, value := range e.PCRs {
		if len(value) != sha256.Size {
			return nil, fmt.Errorf("policy: PCR %d: %d bytes, not %d", i, len(value), sha256.Size)
		}
	}
	if _, err := v.stepLog(); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p := &Policy{PCRs: map[uint32][]Hash{}}
	named := map[uint32]bool{}
	for _, c := range contents {
		pcr := c.register(v.firmware())
		m, err := v.find(c)
		if errors.Is(err, errNothing) && c.field == "initrd" {
			p.NoInitrd, named[pcr] = true, true
			continue
		}
		if err != nil || !c.named(p, m) {
			continue
		}
		named[pcr] = true
	}
	for pcr, value := range e.PCRs {
		if pcr := uint32(pcr); explained(pcr) && !named[pcr] && (pcr != eventlog.PCRFirmware || v.firmware()) {
			p.PCRs[pcr] = []Hash{Hash(value)}
		}
	}
	return p, nil
}

// pcrList is the policy's registers in order.
func (p *Policy) pcrList() []uint32 {
	var out []uint32
	for i := range p.PCRs {
		out = append(out, i)
	}
	slices.Sort(out)
	return out
}
