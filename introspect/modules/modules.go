// Package modules lists the modules of a running Linux kernel, from its memory, and what is executable where modules are
// and is none of theirs.
//
// The list is the guest's, which may have made it wrong: it is followed from module to module at most so far as a
// kernel could have modules, and a pointer that leads nowhere, or back, is an error with its address. A module
// that was taken out of the list is not in it, but its code is still mapped: Unlisted finds that.
package modules

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/types"
)

// A Module is one that is in the kernel's list.
type Module struct {
	Name    string `json:"name"`
	Address uint64 `json:"address"` // of its struct module
	Text    uint64 `json:"text"`    // where its code begins
	Size    uint64 `json:"size"`    // of its code, in bytes
	State   string `json:"state"`
	Signed  *bool  `json:"signed,omitempty"` // as the guest's kernel noted; nil: it has no signatures

	init region // code that is left when it is live
}

type region struct{ at, size uint64 }

// Most is how many modules a kernel may have here.
const Most = 1 << 12

// ErrList is a list that no kernel has.
var ErrList = errors.New("the guest's list of modules is damaged")

// states are enum module_state's.
var states = []string{"live", "coming", "going", "unformed"}

// A layout is where things are in struct module.
type layout struct{ list, name, state, text, size, initText, initSize, signed types.Field }

const (
	pointer = 8
	maxName = 256

	initText = 4 // MOD_INIT_TEXT of enum mod_mem_type; MOD_TEXT is the first
)

// layoutOf finds it, as it is from 6.4 on (an array of memories) and before.
func layoutOf(k *kernel.Kernel) (l layout, err error) {
	err = k.Places("module", map[string]*types.Field{"list.next": &l.list, "name": &l.name, "state": &l.state})
	if mem, merr := k.Field("module", "mem"); merr == nil {
		err = errors.Join(err, k.Places("module_memory", map[string]*types.Field{"base": &l.text, "size": &l.size}))
		one, oerr := k.Field("module_memory", "")
		err = errors.Join(err, oerr)
		if mem.Size < (initText+1)*one.Size {
			err = errors.Join(err, fmt.Errorf("struct module: mem: %d bytes of memories of %d", mem.Size, one.Size))
		}
		l.text.Offset += mem.Offset
		l.size.Offset += mem.Offset
		l.initText, l.initSize = l.text, l.size
		l.initText.Offset += initText * one.Size
		l.initSize.Offset += initText * one.Size
	} else {
		err = errors.Join(err, k.Places("module", map[string]*types.Field{
			"core_layout.base": &l.text, "core_layout.text_size": &l.size,
			"init_layout.base": &l.initText, "init_layout.text_size": &l.initSize,
		}))
	}
	l.signed, _ = k.Field("module", "sig_ok")
	if err == nil && (l.list.Size != pointer || l.text.Size != pointer || l.size.Size != 4 || l.state.Size != 4 || l.name.Size > maxName) {
		err = fmt.Errorf("struct module: %+v", l)
	}
	return l, err
}

// List lists the modules, the last loaded first. After an error it is those before it.
func List(k *kernel.Kernel) ([]Module, error) {
	l, err := layoutOf(k)
	if err != nil {
		return nil, err
	}
	head, err := k.Address("modules")
	if err != nil {
		return nil, err
	}
	all := []Module{}
	err = k.Items(head, Most, func(link uint64) error {
		m, err := l.read(k, link-l.list.Offset)
		if err == nil {
			all = append(all, m)
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrList, err)
	}
	return all, err
}

func (l *layout) read(k *kernel.Kernel, at uint64) (m Module, err error) {
	m.Address = at
	m.Name, err = k.Text(at+l.name.Offset, l.name.Size)
	if err == nil && m.Name == "" {
		err = errors.New("a module without a name")
	}
	word := func(f types.Field) uint64 {
		v, werr := k.Word(at + f.Offset)
		err = errors.Join(err, werr)
		return v
	}
	half := func(f types.Field) uint32 {
		v, herr := k.Half(at + f.Offset)
		err = errors.Join(err, herr)
		return v
	}
	m.Text, m.Size = word(l.text), uint64(half(l.size))
	m.init = region{word(l.initText), uint64(half(l.initSize))}
	state := half(l.state)
	if err != nil {
		return m, err
	}
	m.State = fmt.Sprintf("state %d", state)
	if int(state) < len(states) {
		m.State = states[state]
	}
	if l.signed.Size == 1 {
		var b [1]byte
		if _, err := k.ReadAt(b[:], int64(at+l.signed.Offset)); err != nil {
			return m, err
		}
		signed := b[0] != 0
		m.Signed = &signed
	}
	return m, nil
}

// Where modules, and what else the kernel makes code for, are mapped: above the kernel, below the fixed mappings.
const (
	firstModule = 0xffffffffc0000000
	lastModule  = 0xfffffffffeffffff
	mostTables  = 512 + 8
	pageSize    = 4 << 10
)

// BPF is what the kernel keeps its BPF programs in: some are there from its start.
const BPF = "BPF programs"

// A Code is memory that is executable.
type Code struct {
	Address uint64 `json:"address"`
	Size    uint64 `json:"size"`
	Holds   string `json:"holds,omitempty"` // as the guest's kernel notes: BPF, or "" where it notes nothing
}

// Unlisted is what is executable where modules are and is the code of none of those: of a module that was taken out of the
// list, but also what the kernel itself makes there (BPF programs, trampolines of ftrace and kprobes).
func Unlisted(k *kernel.Kernel, all []Module) ([]Code, error) {
	var known []region
	for _, m := range all {
		for _, r := range []region{{m.Text, m.Size}, m.init} {
			end := r.at + r.size + pageSize - 1
			if r.size > 0 && end > r.at {
				known = append(known, region{r.at &^ (pageSize - 1), end&^(pageSize-1) - r.at&^(pageSize-1)})
			}
		}
	}
	slices.SortFunc(known, func(a, b region) int { return cmp.Compare(a.at, b.at) })
	packs := packs(k)
	out := []Code{}
	add := func(from, to uint64) {
		if last := len(out) - 1; last >= 0 && out[last].Address+out[last].Size == from && packs[from] == "" {
			out[last].Size += to - from
		} else if from < to {
			out = append(out, Code{from, to - from, packs[from]})
		}
	}
	i := 0
	for m, err := range k.Space.Mappings(firstModule, lastModule, mostTables) {
		if err != nil {
			return out, fmt.Errorf("the guest's mappings of modules: %w", err)
		}
		if !m.Executable {
			continue
		}
		at, end := m.Virtual, m.Virtual+m.Size
		for i < len(known) && known[i].at+known[i].size <= at {
			i++
		}
		for j := i; j < len(known) && known[j].at < end && at < end; j++ {
			if known[j].at > at {
				add(at, known[j].at)
			}
			at = max(at, known[j].at+known[j].size)
		}
		if at < end {
			add(at, end)
		}
	}
	return out, nil
}

// maxPacks bounds the kernel's packs of BPF programs.
const maxPacks = 1 << 10

// packs are where the kernel's packs of BPF programs begin; a damaged list of them names fewer.
func packs(k *kernel.Kernel) map[uint64]string {
	all := map[uint64]string{}
	head, err := k.Address("pack_list")
	if err != nil {
		return all
	}
	var list, ptr types.Field
	if k.Places("bpf_prog_pack", map[string]*types.Field{"list.next": &list, "ptr": &ptr}) != nil {
		return all
	}
	_ = k.Items(head, maxPacks, func(link uint64) error {
		at, err := k.Word(link - list.Offset + ptr.Offset)
		if err == nil {
			all[at] = BPF
		}
		return err
	})
	return all
}
