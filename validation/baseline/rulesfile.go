package baseline

import (
	"bytes"
	_ "embed" // the default rules
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.yaml.in/yaml/v3"
)

//go:embed debian.yaml
var debian []byte

var defaultRules = sync.OnceValue(func() *Rules {
	r, err := ParseRules(debian)
	if err != nil {
		panic("debian.yaml: " + err.Error()) // the tests read it
	}
	return r
})

// DefaultRules are those for a Debian guest: debian.yaml. They name no volumes, so that they are right for one file system
// and for a boot partition, an EFI system partition, /usr or /home beside it.
func DefaultRules() *Rules { return defaultRules() }

// DefaultRulesFile is the text of [DefaultRules], with its comments: what an operator begins with.
func DefaultRulesFile() []byte { return bytes.Clone(debian) }

// A RulesError is a mistake in a rules file: where, what, and how to mend it.
type RulesError struct {
	Line  int    // 1-based
	Field string // dotted path, such as rules.0.include
	Text  string
}

func (e *RulesError) Error() string { return fmt.Sprintf("line %d: %s: %s", e.Line, e.Field, e.Text) }

// ParseRules reads rules as YAML:
//
//	rules:
//	  - name: programs
//	    include: [/usr/bin, "/lib*"]
//	    exclude: [/usr/bin/vendor-*]
//	    volumes: [disk0p1]       # default: all
//	    having: [setuid, setgid, capability, device] # default: any file
//	    check: [content, metadata, xattrs]           # default: all of them
//	    severity: critical       # or warning, info
//	  - name: caches
//	    include: ["/**/cache"]
//	    ignore: true             # in no baseline
//
// What it does not know is refused. Errors are *RulesError.
func ParseRules(b []byte) (*Rules, error) {
	if len(b) > MaxRulesFile {
		return nil, &RulesError{1, "document", fmt.Sprintf("%d bytes: the most is %d", len(b), MaxRulesFile)}
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	var doc, more yaml.Node
	if err := d.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return nil, yamlError(err)
	}
	switch err := d.Decode(&more); {
	case err == nil:
		return nil, &RulesError{max(1, more.Line), "document", "a second document: put all rules into one"}
	case !errors.Is(err, io.EOF):
		return nil, yamlError(err)
	}
	if len(doc.Content) == 0 {
		return nil, &RulesError{1, "document", "empty: give rules"}
	}
	var p rulesParser
	err := eachField(doc.Content[0], "", func(field string, key, value *yaml.Node) error {
		if field != "rules" {
			return &RulesError{key.Line, field, "no such field: use rules"}
		}
		return p.rulesList(value)
	})
	if err == nil && len(p.rules) == 0 {
		err = &RulesError{doc.Content[0].Line, "rules", "none are given: a baseline would be of nothing"}
	}
	if err != nil {
		return nil, err
	}
	r := compile(p.rules)
	if len(r.canonical) > MaxRulesFile {
		return nil, &RulesError{1, "document", fmt.Sprintf("%d bytes in the canonical form: the most is %d", len(r.canonical), MaxRulesFile)}
	}
	return r, nil
}

var yamlLine = regexp.MustCompile(`line (\d+): (.*)`)

func yamlError(err error) error {
	m := yamlLine.FindStringSubmatch(err.Error())
	if m == nil {
		return &RulesError{1, "document", strings.TrimPrefix(err.Error(), "yaml: ")}
	}
	n, _ := strconv.Atoi(m[1]) // digits: the expression says so
	return &RulesError{n, "document", m[2]}
}

// eachField calls f for the fields of a mapping, each of which may stand there once.
func eachField(n *yaml.Node, under string, f func(field string, key, value *yaml.Node) error) error {
	if n.Kind != yaml.MappingNode || n.Anchor != "" {
		return &RulesError{n.Line, strings.TrimSuffix("document."+under, "."), "not a mapping: use field: value"}
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name, err := text(under+"…", key)
		if err != nil {
			return err
		}
		if seen[name] {
			return &RulesError{key.Line, under + name, "given twice"}
		}
		seen[name] = true
		if err := f(under+name, key, value); err != nil {
			return err
		}
	}
	return nil
}

type rulesParser struct {
	rules    []Rule
	patterns int
}

func (p *rulesParser) rulesList(n *yaml.Node) error {
	if n.Kind != yaml.SequenceNode || n.Anchor != "" {
		return &RulesError{n.Line, "rules", "not a list: begin each rule with a dash"}
	}
	if len(n.Content) > MaxRules {
		return &RulesError{n.Content[MaxRules].Line, "rules", fmt.Sprintf("%d rules: the most is %d", len(n.Content), MaxRules)}
	}
	for i, node := range n.Content {
		if err := p.rule(i, node); err != nil {
			return err
		}
	}
	return nil
}

func (p *rulesParser) rule(i int, n *yaml.Node) error {
	var r Rule
	given := map[string]bool{}
	under := fmt.Sprintf("rules.%d.", i)
	err := eachField(n, under, func(field string, key, value *yaml.Node) error {
		name := strings.TrimPrefix(field, under)
		given[name] = true
		return p.field(&r, name, field, key, value)
	})
	if err != nil {
		return err
	}
	wrong := func(field, text string) error { return &RulesError{n.Line, under + field, text} }
	switch {
	case r.Name == "":
		return wrong("name", "it has none: findings are told by it")
	case len(r.Include) == 0:
		return wrong("include", "it has none: give paths")
	case slices.ContainsFunc(p.rules, func(o Rule) bool { return o.Name == r.Name }):
		return wrong("name", fmt.Sprintf("%s: another rule has it", r.Name))
	case r.Ignore && (given["having"] || given["check"] || given["severity"]):
		return wrong("ignore", "what is ignored has no having, check and severity: leave them out")
	case !r.Ignore && !given["severity"]:
		return wrong("severity", "it has none: use info, warning or critical")
	}
	if !r.Ignore && !given["check"] {
		r.Check = checkAll
	}
	p.rules = append(p.rules, r)
	return nil
}

func (p *rulesParser) field(r *Rule, name, field string, key, value *yaml.Node) error {
	var err error
	switch name {
	case "name":
		r.Name, err = named(field, value, ruleName.MatchString, "lower-case letters, digits and dashes")
	case "include":
		r.Include, err = p.patternList(field, value)
	case "exclude":
		r.Exclude, err = p.patternList(field, value)
	case "volumes":
		r.Volumes, err = list(field, value, maxVolumes, func(n *yaml.Node) (string, error) {
			return named(field, n, isVolume, "a volume is named such as disk0p1")
		})
	case "having":
		r.Having, err = words[Trait](field, value, traitNames)
	case "check":
		r.Check, err = words[Want](field, value, checkNames)
	case "severity":
		var s string
		if s, err = text(field, value); err == nil {
			if bad := r.Severity.UnmarshalText([]byte(s)); bad != nil {
				err = &RulesError{value.Line, field, bad.Error()}
			}
		}
	case "ignore":
		var s string
		if s, err = text(field, value); err == nil && s != "true" {
			err = &RulesError{value.Line, field, "use true, or leave it out"}
		}
		r.Ignore = true
	default:
		err = &RulesError{key.Line, field, "no such field: use name, include, exclude, volumes, having, check, severity or ignore"}
	}
	return err
}

func (p *rulesParser) patternList(field string, n *yaml.Node) ([]string, error) {
	all, err := list(field, n, maxPatterns-p.patterns, func(n *yaml.Node) (string, error) {
		s, err := text(field, n)
		if err == nil {
			if bad := checkPattern(s); bad != nil {
				err = &RulesError{n.Line, field, bad.Error()}
			}
		}
		return s, err
	})
	p.patterns += len(all)
	return all, err
}

// list reads a list of 1 to most texts, and sorts it.
func list(field string, n *yaml.Node, most int, item func(*yaml.Node) (string, error)) ([]string, error) {
	if n.Kind != yaml.SequenceNode || n.Anchor != "" {
		return nil, &RulesError{n.Line, field, "not a list: write [one, two], or a line with a dash for each"}
	}
	if len(n.Content) == 0 || len(n.Content) > most {
		return nil, &RulesError{n.Line, field, fmt.Sprintf("%d values: give 1 to %d", len(n.Content), most)}
	}
	all := make([]string, 0, len(n.Content))
	for _, c := range n.Content {
		s, err := item(c)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	slices.Sort(all)
	for i, s := range all {
		if i > 0 && all[i-1] == s {
			return nil, &RulesError{n.Line, field, fmt.Sprintf("%q is given twice", s)}
		}
	}
	return all, nil
}

// text reads one plain or quoted text.
func text(field string, n *yaml.Node) (string, error) {
	if n.Kind != yaml.ScalarNode || n.Anchor != "" || n.Tag == "!!null" || n.Tag == "!!binary" || !strings.HasPrefix(n.Tag, "!!") {
		return "", &RulesError{n.Line, field, "not a plain text: anchors, aliases, tags and nothing are none"}
	}
	return n.Value, nil
}

var ruleName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,` + strconv.Itoa(maxRuleName-1) + `}$`)

func named(field string, n *yaml.Node, right func(string) bool, mend string) (string, error) {
	s, err := text(field, n)
	if err == nil && !right(s) {
		err = &RulesError{n.Line, field, fmt.Sprintf("%.80q is no name: %s", s, mend)}
	}
	return s, err
}

// words are the names of a set's members, in the order that the canonical form has.
var (
	traitNames = []string{"setuid", "setgid", "capability", "device"}
	checkNames = []string{"", "metadata", "content", "xattrs"} // by the bits of Want
)

func words[T ~uint8](field string, n *yaml.Node, names []string) (T, error) {
	var set T
	_, err := list(field, n, len(names), func(n *yaml.Node) (string, error) {
		s, err := text(field, n)
		if err != nil {
			return "", err
		}
		i := slices.Index(names, s)
		if i < 0 || s == "" {
			return "", &RulesError{n.Line, field, fmt.Sprintf("no such value %.40q: use %s", s, strings.Trim(strings.Join(names, ", "), ", "))}
		}
		set |= 1 << i
		return s, nil
	})
	return set, err
}

// encodeRules writes the canonical form. It is written here, and not by the library, whose next version may write otherwise:
// signatures are of it.
func encodeRules(rules []Rule) []byte {
	b := []byte("rules:\n")
	for _, r := range rules {
		b = fmt.Appendf(b, "  - name: %s\n", quote(r.Name))
		b = appendList(b, "include", r.Include)
		b = appendList(b, "exclude", r.Exclude)
		b = appendList(b, "volumes", r.Volumes)
		if r.Ignore {
			b = append(b, "    ignore: true\n"...)
			continue
		}
		b = appendWords(b, "having", uint8(r.Having), traitNames)
		b = appendWords(b, "check", uint8(r.Check), checkNames)
		b = fmt.Appendf(b, "    severity: %s\n", r.Severity)
	}
	return b
}

func appendList(b []byte, name string, all []string) []byte {
	if len(all) == 0 {
		return b
	}
	b = fmt.Appendf(b, "    %s:\n", name)
	for _, s := range all {
		b = fmt.Appendf(b, "      - %s\n", quote(s))
	}
	return b
}

func appendWords(b []byte, name string, set uint8, names []string) []byte {
	var all []string
	for i, n := range names {
		if set&(1<<i) != 0 {
			all = append(all, n)
		}
	}
	if len(all) == 0 {
		return b
	}
	return fmt.Appendf(b, "    %s: [%s]\n", name, strings.Join(all, ", "))
}

// quote makes a YAML text of one that can be printed, so that it is nothing else, such as a number.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
