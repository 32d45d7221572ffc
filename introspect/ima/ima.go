// Package ima reads the list of what a running Linux kernel has measured (IMA) from its memory, in the form in which the
// kernel itself gives it (/sys/kernel/security/ima/binary_runtime_measurements).
//
// The list is the guest's, which may have made it wrong: it is followed at most so far as is asked for, every length is
// bounded, and a pointer that leads nowhere, or back, is an error with its address. What the list is worth says the TPM
// (package attest/ima).
package ima

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	list "redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/introspect/kernel"
	"redoubt.dev/redoubt/introspect/types"
)

// Most is how many entries a list may have here.
const Most = 1 << 18

// Why there is no list.
var (
	ErrNone = errors.New("the guest's kernel has no IMA")
	ErrList = errors.New("the guest's IMA list is damaged")
)

const (
	pointer      = 8
	maxFields    = 16
	maxBanks     = 16
	maxTemplates = 64
	maxName      = 32 // of a template
	maxHead      = 256
)

type layout struct {
	later, entry                   types.Field // of ima_queue_entry
	pcr, digests, desc, size, data types.Field // of ima_template_entry
	name, fields                   types.Field // of ima_template_desc
	value, length, field           types.Field // of ima_field_data
	digest, bank                   types.Field // of tpm_digest
}

func layoutOf(k *kernel.Kernel) (l layout, err error) {
	err = errors.Join(
		k.Places("ima_queue_entry", map[string]*types.Field{"later.next": &l.later, "entry": &l.entry}),
		k.Places("ima_template_entry", map[string]*types.Field{"pcr": &l.pcr, "digests": &l.digests, "template_desc": &l.desc, "template_data_len": &l.size, "template_data": &l.data}),
		k.Places("ima_template_desc", map[string]*types.Field{"name": &l.name, "num_fields": &l.fields}),
		k.Places("ima_field_data", map[string]*types.Field{"data": &l.value, "len": &l.length, "": &l.field}),
		k.Places("tpm_digest", map[string]*types.Field{"digest": &l.digest, "": &l.bank}))
	if err != nil {
		return l, err
	}
	for _, f := range []types.Field{l.later, l.entry, l.digests, l.desc, l.name, l.value} {
		if f.Size != pointer {
			return l, fmt.Errorf("structures of IMA: %+v", l)
		}
	}
	for _, f := range []types.Field{l.pcr, l.size, l.fields, l.length} {
		if f.Size != 4 {
			return l, fmt.Errorf("structures of IMA: %+v", l)
		}
	}
	// What is read at once: an entry up to its fields, and each of those.
	for _, f := range []types.Field{l.pcr, l.size, l.digests, l.desc} {
		if f.Offset+f.Size > l.data.Offset || l.data.Offset > maxHead {
			return l, fmt.Errorf("structures of IMA: %+v", l)
		}
	}
	for _, f := range []types.Field{l.value, l.length} {
		if f.Offset+f.Size > l.field.Size || l.field.Size > maxHead {
			return l, fmt.Errorf("structures of IMA: %+v", l)
		}
	}
	return l, nil
}

// A reader reads one list.
type reader struct {
	k         *kernel.Kernel
	l         layout
	sha1      uint64 // offset of the SHA-1 among an entry's digests
	templates map[uint64]template

	head, fields, data []byte // room for an entry
	digest             [20]byte
}

type template struct {
	name   string
	fields uint64
}

// Read appends the entries behind the first skip ones to b, which holds at most MaxList bytes then, and says how many entries
// there are. After an error, what was read is what is before it.
func Read(k *kernel.Kernel, skip int, b []byte) (all []byte, count int, err error) {
	head, err := k.Address("ima_measurements")
	if err != nil {
		return b, 0, ErrNone
	}
	r := reader{k: k, templates: map[uint64]template{}}
	if r.l, err = layoutOf(k); err != nil {
		return b, 0, err
	}
	at, err := k.Address("ima_sha1_idx")
	if err != nil {
		return b, 0, err
	}
	index, err := k.Half(at)
	if err == nil && index >= maxBanks {
		err = fmt.Errorf("number %d of the digests", index)
	}
	if err != nil {
		return b, 0, fmt.Errorf("%w: its SHA-1: %w", ErrList, err)
	}
	r.head, r.fields = make([]byte, r.l.data.Offset), make([]byte, maxFields*r.l.field.Size)
	r.sha1 = uint64(index)*r.l.bank.Size + r.l.digest.Offset
	err = k.Items(head, Most, func(link uint64) error {
		count++
		if count <= skip {
			return nil
		}
		e, err := r.entry(link - r.l.later.Offset)
		if err != nil {
			count--
			return err
		}
		if next := e.Append(b); len(next) <= list.MaxList {
			b = next
			return nil
		}
		return fmt.Errorf("a list of more than %d bytes", list.MaxList)
	})
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrList, err)
	}
	return b, count, err
}

// entry reads an entry, which is good until the next one is read.
func (r *reader) entry(at uint64) (e list.Entry, err error) {
	entry, err := r.k.Word(at + r.l.entry.Offset)
	if err != nil {
		return e, err
	}
	// Up to the fields, read at once; those follow.
	head := r.head
	if _, err := r.k.ReadAt(head, int64(entry)); err != nil {
		return e, err
	}
	le := binary.LittleEndian
	e.PCR = le.Uint32(head[r.l.pcr.Offset:])
	size := le.Uint32(head[r.l.size.Offset:])
	if _, err := r.k.ReadAt(r.digest[:], int64(le.Uint64(head[r.l.digests.Offset:])+r.sha1)); err != nil {
		return e, fmt.Errorf("its digest: %w", err)
	}
	e.SHA1 = r.digest
	t, err := r.template(le.Uint64(head[r.l.desc.Offset:]))
	if err != nil {
		return e, err
	}
	e.Template, e.Data = t.name, r.data[:0]
	fields := r.fields[:t.fields*r.l.field.Size]
	if _, err := r.k.ReadAt(fields, int64(entry+r.l.data.Offset)); err != nil {
		return e, fmt.Errorf("its fields: %w", err)
	}
	for i := range t.fields {
		field := fields[i*r.l.field.Size:]
		value, length := le.Uint64(field[r.l.value.Offset:]), le.Uint32(field[r.l.length.Offset:])
		if uint64(len(e.Data))+4+uint64(length) > list.MaxData {
			return e, fmt.Errorf("field %d: %d bytes", i, length)
		}
		e.Data = le.AppendUint32(e.Data, length)
		from := len(e.Data)
		e.Data = slices.Grow(e.Data, int(length))[:from+int(length)]
		r.data = e.Data
		if _, err := r.k.ReadAt(e.Data[from:], int64(value)); err != nil {
			return e, fmt.Errorf("field %d: %w", i, err)
		}
	}
	if t.name != "ima" && uint32(len(e.Data)) != size { // that one's length is counted in another way
		return e, fmt.Errorf("%d bytes of fields, %d are said", len(e.Data), size)
	}
	return e, nil
}

// template reads what an entry is written as.
func (r *reader) template(at uint64) (t template, err error) {
	if t, ok := r.templates[at]; ok {
		return t, nil
	}
	if len(r.templates) == maxTemplates {
		return t, fmt.Errorf("more than %d templates", maxTemplates)
	}
	name, err := r.k.Word(at + r.l.name.Offset)
	if err != nil {
		return t, fmt.Errorf("template: %w", err)
	}
	fields, err := r.k.Half(at + r.l.fields.Offset)
	if err == nil {
		t.name, err = r.k.Text(name, maxName)
	}
	if err != nil || t.name == "" || fields == 0 || fields > maxFields {
		return t, fmt.Errorf("template %q with %d fields: %w", t.name, fields, errors.Join(err, errTemplate))
	}
	t.fields = uint64(fields)
	r.templates[at] = t
	return t, nil
}

var errTemplate = errors.New("not one of the kernel's")
