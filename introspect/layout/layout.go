// Package layout is what the readers of a kernel's memory need to know of the kernel: where its symbols and the members
// of its structures are. It is made from the kernel's image, which takes a second or two, once, and is small: who reads
// a guest again needs no image.
package layout

import (
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/image"
	"redoubt.dev/redoubt/introspect/symbols"
	"redoubt.dev/redoubt/introspect/types"
)

// A Layout is one kernel's. Addresses are those it was linked for.
type Layout struct {
	Banner  []byte                 `json:"banner"` // what linux_banner holds, with the zero that ends it
	Symbols map[string]uint64      `json:"symbols"`
	Fields  map[string]types.Field `json:"fields,omitempty"` // by structure.member
	NoTypes string                 `json:"noTypes,omitempty"`
}

// names are the symbols that readers ask for, where the kernel has them.
var names = []string{
	"_text", "_stext", "_etext", "linux_banner", "init_top_pgt", "__pgtable_l5_enabled",
	"modules", "pack_list", "init_task", "ima_measurements", "ima_sha1_idx",
	"sys_call_table", "idt_table", "__entry_text_start", "__entry_text_end",
}

// fields are the members that readers ask for, where the kernel has them, by structure.
var fields = map[string][]string{
	"module": {
		"list.next", "name", "state", "sig_ok", "mem",
		"core_layout.base", "core_layout.text_size", "core_layout.size", "init_layout.base", "init_layout.text_size", "init_layout.size",
	},
	"module_memory":      {"base", "size"},
	"bpf_prog_pack":      {"list.next", "ptr"},
	"task_struct":        {"tasks.next", "tgid", "comm", "flags", "real_parent", "cred", "exit_state"},
	"cred":               {"uid.val"},
	"ima_queue_entry":    {"later.next", "entry"},
	"ima_template_entry": {"pcr", "digests", "template_desc", "template_data_len", "template_data"},
	"ima_template_desc":  {"name", "num_fields"},
	"ima_field_data":     {"data", "len"},
	"tpm_digest":         {"alg_id", "digest"},
}

// Of reads a kernel's image, whose symbols are t.
func Of(i *image.Image, t *symbols.Table) (*Layout, error) {
	l := &Layout{Symbols: map[string]uint64{}, Fields: map[string]types.Field{}}
	for _, n := range names {
		if s, ok := t.Lookup(n); ok {
			l.Symbols[n] = s.Address
		}
	}
	at, err := l.Symbol("linux_banner")
	if err != nil {
		return nil, err
	}
	if l.Banner, err = i.Text(at); err != nil {
		return nil, err
	}
	if err := l.types(i); err != nil {
		l.NoTypes = err.Error()
	}
	return l, nil
}

// types finds the members of structures.
func (l *Layout) types(i *image.Image) error {
	_, btf := i.Section(".BTF")
	all, err := types.Find(btf)
	if err != nil {
		return err
	}
	for s, members := range fields {
		for _, m := range members {
			if f, err := all.Field(s, m); err == nil {
				l.Fields[s+"."+m] = f
			}
		}
		if size, err := all.Size(s); err == nil {
			l.Fields[s] = types.Field{Size: size}
		}
	}
	return nil
}

// Read reads an unpacked kernel's symbols and layout.
func Read(i *image.Image) (*Layout, *symbols.Table, error) {
	t, err := symbols.Find(i.ELF)
	if err != nil {
		return nil, nil, err
	}
	l, err := Of(i, t)
	return l, t, err
}

// Bounds of a layout.
const (
	maxBanner = 1 << 10
	maxOffset = 1 << 20
	maxPlaces = 256
)

// Check refuses a layout that no kernel has. It is for one that was not made here.
func (l *Layout) Check() error {
	if len(l.Banner) < 2 || len(l.Banner) > maxBanner || len(l.Symbols) > maxPlaces || len(l.Fields) > maxPlaces {
		return errors.New("the kernel's layout: not one that was made from an image")
	}
	for n, f := range l.Fields {
		if f.Offset > maxOffset || f.Size > maxOffset {
			return fmt.Errorf("the kernel's layout: %s is %+v", n, f)
		}
	}
	return nil
}

// Symbol is where a symbol was linked.
func (l *Layout) Symbol(name string) (uint64, error) {
	a, ok := l.Symbols[name]
	if !ok {
		return 0, fmt.Errorf("the kernel's image has no symbol %s", name)
	}
	return a, nil
}

// Field is where a member is, such as "module", "list.next"; without one, the structure as a whole.
func (l *Layout) Field(structure, member string) (types.Field, error) {
	name := structure
	if member != "" {
		name += "." + member
	}
	f, ok := l.Fields[name]
	switch {
	case ok:
		return f, nil
	case l.NoTypes != "":
		return f, errors.New(l.NoTypes)
	}
	return f, fmt.Errorf("struct %s: %s: %w", structure, member, types.ErrNoField)
}

// Places finds several members of a structure at once: each key's goes to its value.
func (l *Layout) Places(structure string, members map[string]*types.Field) (err error) {
	if l.NoTypes != "" {
		return errors.New(l.NoTypes)
	}
	for m, to := range members {
		f, ferr := l.Field(structure, m)
		*to, err = f, errors.Join(err, ferr)
	}
	return err
}
