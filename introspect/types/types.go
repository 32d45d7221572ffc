// Package types reads how a Linux kernel lays out its structures, from the BTF that its image carries.
package types

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// Types are a kernel's.
type Types struct{ spec *btf.Spec }

// Find reads the types from a kernel's BTF, the section .BTF of its image.
func Find(blob []byte) (*Types, error) {
	if len(blob) == 0 {
		return nil, errors.New("the kernel's image has no types (CONFIG_DEBUG_INFO_BTF)")
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(blob))
	if err != nil {
		return nil, fmt.Errorf("the kernel's types: %w", err)
	}
	return &Types{spec}, nil
}

// A Field is where a member of a structure lies, in bytes from the structure's start, and how long it is.
type Field struct{ Offset, Size uint64 }

// ErrNoField says that a structure has no such member.
var ErrNoField = errors.New("no such member")

// Field finds a member of a structure, such as "list.next": of members, too, and through those that have no name.
func (t *Types) Field(structure, path string) (Field, error) {
	var s *btf.Struct
	if err := t.spec.TypeByName(structure, &s); err != nil {
		return Field{}, fmt.Errorf("struct %s: %w", structure, err)
	}
	var at uint64
	var now btf.Type = s
	for name := range strings.SplitSeq(path, ".") {
		m, offset, ok := member(now, name, 0)
		if !ok {
			return Field{}, fmt.Errorf("struct %s: %s: %w", structure, path, ErrNoField)
		}
		at += uint64(offset)
		now = btf.UnderlyingType(m.Type)
	}
	size, err := btf.Sizeof(now)
	if err != nil || size < 0 {
		return Field{}, fmt.Errorf("struct %s: %s: no size: %w", structure, path, err)
	}
	return Field{at, uint64(size)}, nil
}

// Size is how long a structure is, in bytes.
func (t *Types) Size(structure string) (uint64, error) {
	var s *btf.Struct
	if err := t.spec.TypeByName(structure, &s); err != nil {
		return 0, fmt.Errorf("struct %s: %w", structure, err)
	}
	return uint64(s.Size), nil
}

// maxDepth bounds how deep members without a name may lie in one another.
const maxDepth = 16

// member finds one by name, also in members without one.
func member(t btf.Type, name string, depth int) (m btf.Member, offset uint32, ok bool) {
	var all []btf.Member
	switch t := t.(type) {
	case *btf.Struct:
		all = t.Members
	case *btf.Union:
		all = t.Members
	}
	for _, m := range all {
		if name != "" && m.Name == name && m.BitfieldSize == 0 {
			return m, m.Offset.Bytes(), true
		}
		if m.Name != "" || depth == maxDepth {
			continue
		}
		if inner, offset, ok := member(btf.UnderlyingType(m.Type), name, depth+1); ok {
			return inner, m.Offset.Bytes() + offset, true
		}
	}
	return btf.Member{}, 0, false
}
