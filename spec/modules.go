package spec

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Modules says what becomes of the modules that a guest's kernel loads: in a guest without this section they are the
// kernel's, as on any machine.
type Modules struct {
	Default Verdict    `yaml:"default,omitempty" json:"default,omitempty" jsonschema:"enum=isolate,enum=trust,enum=refuse,default=isolate,description=what becomes of a module that is not trusted"`
	Trusted []string   `yaml:"trusted,omitempty" json:"trusted,omitempty" jsonschema:"maxItems=64,description=modules that are not isolated\\, by name\\, if the guest's kernel finds their signature valid"`
	Profile string     `yaml:"profile,omitempty" json:"profile,omitempty" jsonschema:"description=path of the profiles of isolated modules\\, as redoubt modules --learned prints them; a module without one may do nothing but what every module may"`
	Mode    ModuleMode `yaml:"mode,omitempty" json:"mode,omitempty" jsonschema:"enum=monitor,enum=learn,enum=enforce,default=enforce,description=what is done about what a profile does not allow: noted\\, learnt or refused"`
	// Response is what follows a refusal beside it: nothing more, or the guest stands still until `redoubt resume`.
	Response ModuleResponse `yaml:"response,omitempty" json:"response,omitempty" jsonschema:"enum=refuse,enum=pause,description=what follows what was refused: nothing more (refuse\\, the default)\\, or the guest is paused until redoubt resume"`
}

// ModuleResponse is what follows what an isolated module was refused.
type ModuleResponse string

const (
	RefuseOnly       ModuleResponse = "refuse"
	PauseWhenRefused ModuleResponse = "pause"
)

// Verdict is what becomes of a module.
type Verdict string

const (
	Isolate Verdict = "isolate" // it runs in a view of memory of its own
	Trust   Verdict = "trust"   // it is a part of the kernel
	Refuse  Verdict = "refuse"  // it is not loaded
)

// ModuleMode is what is done about what an isolated module's profile does not allow.
type ModuleMode string

const (
	Monitor ModuleMode = "monitor" // noted, and allowed
	Learn   ModuleMode = "learn"   // allowed, and added to the profile
	Enforce ModuleMode = "enforce" // refused
)

// MaxTrusted bounds the modules that a guest may be said to trust: all are in its measurements.
const MaxTrusted = 64

// moduleForm is a module's name: the kernel has 56 bytes for it (MODULE_NAME_LEN) with its NUL.
var moduleForm = regexp.MustCompile(`^[a-zA-Z0-9_]{1,55}$`)

// complete fills in the defaults and checks; the rest of g was checked already.
func (m *Modules) complete(g *Guest, bad func(field, format string, args ...any) error) error {
	if m == nil {
		return nil
	}
	if m.Default == "" {
		m.Default = Isolate
	}
	if m.Mode == "" {
		m.Mode = Enforce
	}
	switch {
	case m.Default != Isolate && m.Default != Trust && m.Default != Refuse:
		return bad("modules.default", "%q: use isolate, trust or refuse", m.Default)
	case m.Mode != Monitor && m.Mode != Learn && m.Mode != Enforce:
		return bad("modules.mode", "%q: use monitor, learn or enforce", m.Mode)
	case m.Response != "" && m.Response != RefuseOnly && m.Response != PauseWhenRefused:
		return bad("modules.response", "%q: use refuse or pause", m.Response)
	case m.Response == PauseWhenRefused && m.Mode == Monitor:
		return bad("modules.response", "pause: modules.mode is monitor, which refuses next to nothing: use enforce")
	case len(m.Trusted) > MaxTrusted:
		return bad("modules.trusted", "%d: the most is %d", len(m.Trusted), MaxTrusted)
	case len(m.Trusted) > 0 && m.Default == Trust:
		return bad("modules.trusted", "modules.default is trust, which trusts all: leave one of them out")
	case strings.ContainsAny(m.Profile, "\x00\n"):
		return bad("modules.profile", "%q: no such characters in a path", m.Profile)
	case g.Emulator == QEMU:
		return bad("emulator", "qemu isolates no modules, only the native monitor does: use native or auto, or leave modules out")
	case g.TPM.Disabled:
		return bad("tpm.disabled", "modules are isolated from the guest's first access to its TPM on: give it a TPM, or leave modules out")
	case g.Boot.Firmware != "":
		return bad("boot.firmware", "modules are isolated by the kernel that the host knows: use boot.kernel, or leave modules out")
	}
	for i, name := range m.Trusted {
		// As modprobe does: a module is called with underscores whatever its file is.
		name = strings.ReplaceAll(name, "-", "_")
		switch {
		case !moduleForm.MatchString(name):
			return bad(fmt.Sprintf("modules.trusted[%d]", i), "%q: use a module's name as lsmod prints it", name)
		case slices.Contains(m.Trusted[:i], name):
			return bad(fmt.Sprintf("modules.trusted[%d]", i), "%s stands there twice", name)
		}
		m.Trusted[i] = name
	}
	slices.Sort(m.Trusted) // the same list is measured alike
	return nil
}

// Policy is m without the place where its profiles lie, which is the operator's: what the guest's emulator is told, and what
// is measured; nil for nil.
func (m *Modules) Policy() *Modules {
	if m == nil {
		return nil
	}
	p := *m
	p.Profile = ""
	return &p
}
