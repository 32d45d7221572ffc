// Package modules lists the modules of a running Linux kernel, from its memory.
//
// The list is the guest's, which may have made it wrong: it is followed from module to module at most so far as a
// kernel could have modules, and a pointer that leads nowhere, or back, is an error with its address. A module
// that is not in the list is not found; that is for who compares it with what is mapped executable.
package modules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/types"
)

// A Module is one that is in the kernel's list.
type Module struct {
	Name    string
	Address uint64 // of its struct module
	Text    uint64 // where its code begins
	Size    uint64 // of its code, in bytes
}

// Most is how many modules a kernel may have here.
const Most = 1 << 12

const pointer = 8

// ErrList is a list that no kernel has.
var ErrList = errors.New("the guest's list of modules is damaged")

// A layout is where things are in struct module.
type layout struct{ list, name, text, size types.Field }

// layoutOf finds it, as it is from 6.4 on (the first of an array of memories is the code's) and before.
func layoutOf(t *types.Types) (l layout, err error) {
	field := func(to *types.Field, s, path string) {
		f, ferr := t.Field(s, path)
		*to, err = f, errors.Join(err, ferr)
	}
	field(&l.list, "module", "list.next")
	field(&l.name, "module", "name")
	if mem, merr := t.Field("module", "mem"); merr == nil {
		field(&l.text, "module_memory", "base")
		field(&l.size, "module_memory", "size")
		l.text.Offset += mem.Offset
		l.size.Offset += mem.Offset
	} else {
		field(&l.text, "module", "core_layout.base")
		field(&l.size, "module", "core_layout.text_size")
	}
	if err == nil && (l.list.Size != pointer || l.text.Size != pointer || l.size.Size != 4 || l.name.Size > 256) {
		err = fmt.Errorf("struct module: %+v", l)
	}
	return l, err
}

// List lists the modules, the last loaded first.
func List(k *kernel.Kernel, t *types.Types) ([]Module, error) {
	l, err := layoutOf(t)
	if err != nil {
		return nil, err
	}
	head, err := k.Address("modules")
	if err != nil {
		return nil, err
	}
	next, err := word(k, head)
	if err != nil {
		return nil, err
	}
	var all []Module
	for next != head {
		if len(all) == Most {
			return all, fmt.Errorf("%w: more than %d, or it leads back to itself", ErrList, Most)
		}
		m := Module{Address: next - l.list.Offset}
		if m.Name, err = text(k, m.Address+l.name.Offset, l.name.Size); err == nil {
			if m.Text, err = word(k, m.Address+l.text.Offset); err == nil {
				var size [4]byte
				_, err = k.ReadAt(size[:], int64(m.Address+l.size.Offset))
				m.Size = uint64(binary.LittleEndian.Uint32(size[:]))
			}
		}
		if err == nil {
			next, err = word(k, next)
		}
		if err != nil {
			return all, fmt.Errorf("%w: module %d, at %#x: %w", ErrList, len(all), m.Address, err)
		}
		all = append(all, m)
	}
	return all, nil
}

func word(k *kernel.Kernel, at uint64) (uint64, error) {
	var b [pointer]byte
	_, err := k.ReadAt(b[:], int64(at))
	return binary.LittleEndian.Uint64(b[:]), err
}

// text reads a name that ends with a zero within its size.
func text(k *kernel.Kernel, at, size uint64) (string, error) {
	b := make([]byte, size)
	if _, err := k.ReadAt(b, int64(at)); err != nil {
		return "", err
	}
	end := bytes.IndexByte(b, 0)
	if end <= 0 {
		return "", errors.New("a name that is empty or does not end")
	}
	return string(b[:end]), nil
}
