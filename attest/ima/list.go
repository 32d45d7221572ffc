// Package ima reads the list of what a Linux kernel has measured since it booted (IMA), says what it extends PCR 10 to, and
// holds it against what is allowed.
//
// The list is the guest's word. Only what a quote of PCR 10 vouches for counts: entries up to which the list, replayed,
// gives the quoted value.
//
// Source: Linux, security/integrity/ima (ima_fs.c, ima_crypto.c, ima_template.c, ima_queue.c) and
// Documentation/security/IMA-templates.rst.
package ima

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // the list's own digests
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// PCR is the register that the list extends.
const PCR = 10

// Bounds of a list.
const (
	MaxList     = 16 << 20 // bytes
	maxTemplate = 32       // bytes of a template's name
	MaxData     = 64 << 10 // bytes of an entry's data: a path of 4,096, a signature of some hundred
)

// Names of the first entry, which stands for PCRs 0 to 9: the second is of kernels that look for their TPM again, later
// (CONFIG_IMA_INIT_LATE_SYNC).
var aggregates = []string{"boot_aggregate", "boot_aggregate_late"}

// legacy is the template that writes its fields in a way of its own.
const legacy = "ima"

const legacyName = 256 // the most bytes of a path in it; hashed with zeros up to one more

// An Entry is one measurement.
type Entry struct {
	PCR      uint32
	SHA1     [sha1.Size]byte // of its data, as the list says; zeros: what was measured was open for writing (a violation)
	Template string
	Data     []byte // the fields, each after its length in 4 bytes
}

// Violation reports whether the kernel could not say what was read.
func (e *Entry) Violation() bool { return e.SHA1 == [sha1.Size]byte{} }

// A List is what a guest's kernel has measured since it booted, as evidence carries it.
type List struct {
	After int    `json:"after,omitempty"` // so many of the first entries are left out
	List  []byte `json:"list,omitempty"`  // as the kernel's binary_runtime_measurements
	// Missing is why there is no list, where that is no fault of the guest's; Error, why there is none or a part where there
	// should be one.
	Missing string `json:"missing,omitempty"`
	Error   string `json:"error,omitempty"`
}

// Append writes an entry as /sys/kernel/security/ima/binary_runtime_measurements has it.
func (e *Entry) Append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, e.PCR)
	b = append(b, e.SHA1[:]...)
	b = le.AppendUint32(b, uint32(len(e.Template)))
	b = append(b, e.Template...)
	if e.Template != legacy {
		b = le.AppendUint32(b, uint32(len(e.Data)))
		return append(b, e.Data...)
	}
	if len(e.Data) < 4 {
		return b
	}
	return append(b, e.Data[4:]...) // the digest's length is not written
}

// ErrDamaged is a list that no kernel writes.
var ErrDamaged = errors.New("the IMA list is damaged")

// Parse reads a list. After an error the entries before it are returned.
func Parse(b []byte) ([]Entry, error) {
	if len(b) > MaxList {
		return nil, fmt.Errorf("an IMA list of %d bytes: the most is %d", len(b), MaxList)
	}
	var all []Entry
	for r := (reader{b: b}); r.at < len(b); {
		from := r.at
		e, ok := r.entry()
		if !ok {
			return all, fmt.Errorf("%w: entry %d, at offset %d", ErrDamaged, len(all)+1, from)
		}
		all = append(all, e)
	}
	return all, nil
}

type reader struct {
	b  []byte
	at int
}

func (r *reader) take(n int) ([]byte, bool) {
	if n < 0 || n > len(r.b)-r.at {
		return nil, false
	}
	r.at += n
	return r.b[r.at-n : r.at : r.at], true
}

func (r *reader) number(most int) (int, bool) {
	b, ok := r.take(4)
	if !ok || binary.LittleEndian.Uint32(b) > uint32(most) {
		return 0, false
	}
	return int(binary.LittleEndian.Uint32(b)), true
}

func (r *reader) entry() (e Entry, ok bool) {
	head, ok := r.take(4 + sha1.Size)
	if !ok {
		return e, false
	}
	e.PCR = binary.LittleEndian.Uint32(head)
	copy(e.SHA1[:], head[4:])
	n, ok := r.number(maxTemplate)
	if !ok || n == 0 {
		return e, false
	}
	name, ok := r.take(n)
	if !ok {
		return e, false
	}
	e.Template = string(name)
	if e.Template != legacy {
		if n, ok = r.number(MaxData); ok {
			e.Data, ok = r.take(n)
		}
		return e, ok
	}
	start := r.at
	if _, ok = r.take(sha1.Size); !ok {
		return e, false
	}
	if n, ok = r.number(legacyName); ok {
		_, ok = r.take(n)
	}
	e.Data = append(binary.LittleEndian.AppendUint32(nil, sha1.Size), r.b[start:r.at]...)
	return e, ok
}

// Booted are the lists, of one entry, of a kernel that has measured no more than its boot: the entry stands for registers
// whose SHA-256 is sum, by each of the kernel's names for it and each of its templates.
func Booted(sum []byte) (all []Entry) {
	for _, name := range aggregates {
		for _, t := range []struct{ template, kind, more string }{
			{"ima-sig", "", "\x00\x00\x00\x00"}, {"ima-ng", "", ""}, {"ima-sigv2", "ima:", "\x00\x00\x00\x00"}, {"ima-ngv2", "ima:", ""},
		} {
			e := Entry{PCR: PCR, Template: t.template}
			for _, f := range []string{t.kind + "sha256:\x00" + string(sum), name + "\x00"} {
				e.Data = append(binary.LittleEndian.AppendUint32(e.Data, uint32(len(f))), f...)
			}
			e.Data = append(e.Data, t.more...) // a signature that is not there
			e.SHA1 = sha1.Sum(e.Data)          //nolint:gosec // the format's
			all = append(all, e)
		}
	}
	return all
}

// fields splits the data.
func (e *Entry) fields() (all [][]byte, ok bool) {
	for r := (reader{b: e.Data}); r.at < len(e.Data); {
		n, ok := r.number(MaxData)
		if !ok {
			return nil, false
		}
		f, ok := r.take(n)
		if !ok {
			return nil, false
		}
		all = append(all, f)
	}
	return all, true
}

// hashed is what the entry's digests are of.
func (e *Entry) hashed() []byte {
	if e.Template != legacy {
		return e.Data
	}
	f, ok := e.fields()
	if !ok || len(f) != 2 || len(f[1]) > legacyName {
		return e.Data
	}
	return append(bytes.Clone(f[0]), append(bytes.Clone(f[1]), make([]byte, legacyName+1-len(f[1]))...)...)
}

// Sound reports whether the entry's own SHA-1 is that of its data. That of a violation, zeros, is of nothing.
func (e *Entry) Sound() bool { return e.Violation() || sha1.Sum(e.hashed()) == e.SHA1 } //nolint:gosec // the format's

// A File is what an entry says was measured: a file by its path, or what the kernel measures by a name (boot_aggregate,
// kexec-cmdline).
type File struct {
	Algorithm string // of Digest, such as sha256
	Digest    []byte
	Path      string
}

// File reads the first two fields, which are digest and name in all templates of the kernel's.
func (e *Entry) File() (f File, err error) {
	all, ok := e.fields()
	if !ok || len(all) < 2 {
		return f, fmt.Errorf("%w: template %q with %d fields", ErrDamaged, e.Template, len(all))
	}
	f.Algorithm, f.Digest = "sha1", all[0]
	if e.Template != legacy {
		// ALGORITHM:\0DIGEST, from 6.6 on also TYPE:ALGORITHM:\0DIGEST.
		name, digest, found := bytes.Cut(all[0], []byte(":\x00"))
		if !found || len(name) > maxTemplate {
			return f, fmt.Errorf("%w: template %q: a digest without its algorithm", ErrDamaged, e.Template)
		}
		f.Algorithm, f.Digest = string(name), digest
		if i := strings.LastIndexByte(f.Algorithm, ':'); i >= 0 {
			f.Algorithm = f.Algorithm[i+1:]
		}
	}
	f.Path = string(bytes.TrimSuffix(all[1], []byte{0}))
	return f, nil
}

// String shows a file as sha256sum(1) does, with its algorithm.
func (f File) String() string { return fmt.Sprintf("%s:%x  %s", f.Algorithm, f.Digest, f.Path) }

// Aggregate reports whether the name is that of what stands for the registers of the boot, if it is the first of its list.
func (f File) Aggregate() bool { return f.Path == aggregates[0] || f.Path == aggregates[1] }
