// Package policy says what an isolated module may do: which of the kernel's functions it may call, and what it may write
// beyond its own memory. What is not allowed is refused (Enforce), noted and allowed (Monitor), or learnt (Learn); what no
// profile can allow is refused in every mode but Monitor.
package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Mode is what is done about what a profile does not allow.
type Mode string

// Modes.
const (
	Monitor Mode = "monitor" // noted, and allowed
	Learn   Mode = "learn"   // allowed, and added to the profile; what is never allowed is refused
	Enforce Mode = "enforce" // refused
)

// A Profile is what one module may do.
type Profile struct {
	Module string `yaml:"module" json:"module"`
	// Calls are the functions of the kernel, and of other modules, that it may call, by name.
	Calls []string `yaml:"calls,omitempty" json:"calls,omitempty"`
	// Writes are what it may write of the kernel's data, and of other isolated modules'.
	Writes []Range `yaml:"writes,omitempty" json:"writes,omitempty"`
	// Reads are the isolated modules whose data it may read.
	Reads []string `yaml:"reads,omitempty" json:"reads,omitempty"`
}

// A Range is bytes of an object: a variable of the kernel, by its symbol; an object of the kernel's heap, by its cache; memory
// that is in no cache (pages), by the place in the page; or another isolated module's data ([name]), by the place in it.
type Range struct {
	Object string `yaml:"object" json:"object"`
	From   uint64 `yaml:"from" json:"from"`
	To     uint64 `yaml:"to" json:"to"` // the first byte that does not belong to it
}

// Bounds of a file of profiles.
const (
	maxFile     = 1 << 20
	maxProfiles = 256
	maxEntries  = 4096
	maxName     = 256
)

// ErrProfile is a file that holds no profiles.
var ErrProfile = errors.New("not a file of module profiles")

// Read reads profiles, one YAML document each.
func Read(r io.Reader) ([]Profile, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrProfile, maxFile)
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	var all []Profile
	for {
		var p Profile
		switch err := d.Decode(&p); {
		case errors.Is(err, io.EOF):
			return all, nil
		case err != nil:
			return nil, fmt.Errorf("%w: %w", ErrProfile, err)
		}
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("%w: profile %d: %w", ErrProfile, len(all)+1, err)
		}
		if len(all) == maxProfiles {
			return nil, fmt.Errorf("%w: more than %d", ErrProfile, maxProfiles)
		}
		all = append(all, p)
	}
}

func (p *Profile) check() error {
	if p.Module == "" || len(p.Module) > maxName {
		return errors.New("module: no name of a module")
	}
	if len(p.Calls) > maxEntries || len(p.Writes) > maxEntries || len(p.Reads) > maxEntries {
		return fmt.Errorf("module %s: more than %d calls, writes or reads", p.Module, maxEntries)
	}
	for _, r := range p.Reads {
		if r == "" || len(r) > maxName {
			return fmt.Errorf("module %s: reads: %.20q is no name of a module", p.Module, r)
		}
	}
	for _, c := range p.Calls {
		if c == "" || len(c) > maxName {
			return fmt.Errorf("module %s: calls: %.20q is no name of a function", p.Module, c)
		}
		if Never(c) {
			return fmt.Errorf("module %s: calls: %s is never allowed", p.Module, c)
		}
	}
	for _, w := range p.Writes {
		if NeverWritten(w.Object) {
			return fmt.Errorf("module %s: writes: %s is never allowed", p.Module, w.Object)
		}
		if w.Object == "" || len(w.Object) > maxName || w.From >= w.To {
			return fmt.Errorf("module %s: writes: %.40q from %d to %d is no range", p.Module, w.Object, w.From, w.To)
		}
	}
	return nil
}

// Write writes profiles as Read reads them.
func Write(w io.Writer, all []Profile) error {
	if len(all) == 0 { // which the encoder takes for a mistake
		return nil
	}
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	for _, p := range all {
		if err := e.Encode(p); err != nil {
			return err
		}
	}
	return e.Close()
}

// never are functions that no module may call: each gives its caller the kernel. They set credentials, run programs, change
// page tables and code, or find what is not exported.
var never = map[string]bool{}

func init() {
	for _, n := range strings.Fields(`
		commit_creds prepare_kernel_cred override_creds revert_creds set_security_override
		call_usermodehelper call_usermodehelper_exec call_usermodehelper_setup kernel_execve
		apply_to_page_range apply_to_existing_page_range vmap vmap_pfn map_kernel_range remap_vmalloc_range
		set_memory_x set_memory_nx set_memory_ro set_memory_rw set_memory_x_np set_pages_rw set_pages_array_wb
		set_direct_map_invalid_noflush set_direct_map_default_noflush _set_memory_uc _set_memory_wb
		text_poke text_poke_bp text_poke_copy text_poke_set poke_kernel
		kallsyms_lookup_name kallsyms_on_each_symbol __symbol_get find_symbol module_memfree module_alloc execmem_alloc execmem_free
		free_module do_init_module load_module register_kprobe register_kprobes register_kretprobe enable_kprobe
		register_ftrace_function ftrace_set_filter ftrace_set_filter_ip register_fprobe klp_enable_patch
		stop_machine stop_machine_cpuslocked kernel_kexec kernel_restart emergency_restart
		native_write_cr4 native_write_cr0 load_direct_gdt load_fixmap_gdt load_current_idt idt_install_sysvec
		copy_to_kernel_nofault probe_kernel_write __probe_kernel_write access_process_vm
		wrmsr_safe_regs native_write_msr_safe wrmsr_on_cpu wrmsrl_on_cpu wrmsr_safe_on_cpu wrmsrl_safe_on_cpu
		security_task_fix_setuid filp_open kernel_write`) {
		never[n] = true
	}
}

// Never says whether a function may be called by no module.
func Never(function string) bool { return never[function] }

// NeverWritten says whether an object of the kernel may be written by no module: credentials, what it runs as root, its list of
// modules, the processor's tables and stacks.
func NeverWritten(object string) bool {
	switch object {
	case "cred", "cred_jar", "init_cred", "modules", "modprobe_path", "core_pattern", "uevent_helper", "poweroff_cmd", "reboot_cmd",
		"selinux_state", "security_hook_heads", "kptr_restrict", "modules_disabled", "idt_table", "init_top_pgt", "cpu_tss_rw", "gdt_page", "irq_stack_backing_store", "exception_stacks", "entry_stack_storage":
		return true
	}
	return false
}

// Trampoline is what code is called that the kernel has made for a place in a module's code (ftrace).
const Trampoline = "(trampoline)"

// Always are functions that a compiler calls of itself, and the trampolines of the kernel's own that do nothing for
// their caller but return to it.
func Always(function string) bool {
	switch function {
	case "__fentry__", "ftrace_caller", "ftrace_regs_caller", "__stack_chk_fail", "__x86_return_thunk", "__fortify_panic", Trampoline:
		return true
	}
	return strings.HasPrefix(function, "__SCT__") || strings.HasPrefix(function, "__x86_indirect_thunk_")
}

// Allows says whether a function may be called.
func (p *Profile) Allows(function string) bool {
	return !Never(function) && (Always(function) || slices.Contains(p.Calls, function))
}

// Writable says whether n bytes of an object may be written, from the byte off.
func (p *Profile) Writable(object string, off, n uint64) bool {
	for _, w := range p.Writes {
		if w.Object == object && off >= w.From && n <= w.To && off <= w.To-n {
			return true
		}
	}
	return false
}

// Readable says whether another module's data may be read.
func (p *Profile) Readable(module string) bool { return slices.Contains(p.Reads, module) }

// LearnRead adds a module.
func (p *Profile) LearnRead(module string) {
	if !p.Readable(module) && len(p.Reads) < maxEntries {
		p.Reads = append(p.Reads, module)
	}
}

// LearnCall adds a function, unless no module may call it.
func (p *Profile) LearnCall(function string) {
	if i, ok := slices.BinarySearch(p.Calls, function); !ok && !Never(function) && !Always(function) && len(p.Calls) < maxEntries {
		p.Calls = slices.Insert(p.Calls, i, function)
	}
}

// LearnWrite adds bytes of an object.
func (p *Profile) LearnWrite(object string, off, n uint64) {
	for i := range p.Writes {
		w := &p.Writes[i]
		if w.Object == object && off <= w.To && off+n >= w.From {
			w.From, w.To = min(w.From, off), max(w.To, off+n)
			return
		}
	}
	if len(p.Writes) < maxEntries {
		p.Writes = append(p.Writes, Range{object, off, off + n})
	}
}
