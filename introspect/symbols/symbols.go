// Package symbols reads the symbols that a Linux kernel carries for itself (kallsyms) from its unpacked image, which
// need not have any other: of 6.1 and later, in the layouts before and from 6.4.
//
// The image may say anything: it is a guest's. Every place is checked before it is read, and what is
// found must agree with itself in all its parts, which leaves no room for chance. Time and memory are bounded by
// the image's size: one that is made to look like many tables is given up.
//
// Source: Linux, scripts/kallsyms.c (write_src) and kernel/kallsyms.c.
package symbols

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// A Symbol is a name at an address, as the kernel was linked.
type Symbol struct {
	Name    string
	Kind    byte // as nm(1) tells it: T and t are code
	Address uint64
}

// A Table is a kernel's symbols, by address.
type Table struct {
	all    []Symbol
	byName map[string]int
}

// Why there is no table.
var (
	ErrNone   = errors.New("no kallsyms tables are in the kernel's image")
	ErrEffort = errors.New("the kernel's image looks like too many kallsyms tables")
)

// effort is how often each byte of an image may be looked at, about.
const effort = 16

const (
	tokens      = 256
	indexBytes  = 2 * tokens
	markerEvery = 256
	maxToken    = 64
	maxName     = 1 << 10 // bytes of a name; the kernel's KSYM_NAME_LEN is 512
	leastCount  = 16
	mostCount   = 1 << 21
	firstText   = 0xffffffff80000000 // of the kernel's own addresses
)

func align8(n int) int { return (n + 7) &^ 7 }

// Find reads the table of an unpacked kernel image.
func Find(image []byte) (*Table, error) {
	left := effort * len(image)
	for at := 0; at+indexBytes <= len(image); at += 8 {
		if !likely(image[at : at+8]) {
			continue
		}
		table, ok := tokenTable(image, at)
		if !ok {
			continue
		}
		names, ok := findNames(image, table, &left)
		if left < 0 {
			return nil, ErrEffort
		}
		if !ok {
			continue
		}
		addresses, ok := findAddresses(image, names, at)
		if !ok {
			continue
		}
		return newTable(image, names, table, addresses)
	}
	return nil, ErrNone
}

// likely reports whether an index of tokens may begin so: most places are told from one by their first bytes.
func likely(b []byte) bool {
	last := -2
	for i := 0; i < len(b); i += 2 {
		v := int(binary.LittleEndian.Uint16(b[i:]))
		if i == 0 && v != 0 || v < last+2 || v > last+maxToken+3 {
			return false
		}
		last = v
	}
	return true
}

// A vocabulary is the tokens that names are written in.
type vocabulary struct {
	start  int // of kallsyms_token_table in the image
	tokens [tokens]string
}

// tokenTable reads the tokens of which the index (kallsyms_token_index) is at a place, if it is one.
func tokenTable(image []byte, at int) (v vocabulary, ok bool) {
	var index [tokens]int
	for i := range index {
		index[i] = int(binary.LittleEndian.Uint16(image[at+2*i:]))
		if i == 0 && index[i] != 0 || i > 0 && (index[i] < index[i-1]+2 || index[i] > index[i-1]+maxToken+1) {
			return v, false
		}
	}
	// The table ends, but for padding, where the index begins: its last token's length says where.
	for length := index[tokens-1] + 2; length <= index[tokens-1]+maxToken+1; length++ {
		start := at - align8(length)
		if start < 0 {
			break
		}
		if v, ok := readTokens(image, start, length, index); ok && zeros(image[start+length:at]) {
			return v, true
		}
	}
	return v, false
}

func readTokens(image []byte, start, length int, index [tokens]int) (v vocabulary, ok bool) {
	v.start = start
	for i := range index {
		end := length
		if i+1 < tokens {
			end = index[i+1]
		}
		text := image[start+index[i] : start+end]
		last := len(text) - 1
		if text[last] != 0 || slices.Contains(text[:last], 0) {
			return v, false
		}
		v.tokens[i] = string(text[:last])
	}
	return v, true
}

func zeros(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }

// names are where the compressed names lie (kallsyms_names).
type names struct {
	count int // kallsyms_num_syms, 8 bytes before them
	start int
}

// findNames looks for the names before the tokens: the number of them that is written there leads from name to
// name to the markers, which must say the same, and they to the tokens. What it looks at is taken from left.
func findNames(image []byte, v vocabulary, left *int) (n names, ok bool) {
	for at := v.start - 8; at >= 0 && *left >= 0; at -= 8 {
		*left -= 8
		count := binary.LittleEndian.Uint64(image[at:])
		if count < leastCount || count > mostCount {
			continue
		}
		n := names{int(count), at + 8}
		if n.leadTo(image, v.start, left) {
			return n, true
		}
	}
	return n, false
}

// leadTo reports whether the names, and the markers behind them, end where the tokens begin.
func (n names) leadTo(image []byte, end int, left *int) bool {
	markers := make([]uint32, 0, n.count/markerEvery+1)
	at := n.start
	for i := range n.count {
		if i%markerEvery == 0 {
			markers = append(markers, uint32(at-n.start))
		}
		length, head := nameLength(image[at:end])
		if length == 0 || at+head+length > end {
			return false
		}
		at += head + length
		if *left -= head + length; *left < 0 {
			return false
		}
	}
	marker := align8(at)
	if marker > end || !zeros(image[at:marker]) || marker+4*len(markers) > end {
		return false
	}
	for i, want := range markers {
		if binary.LittleEndian.Uint32(image[marker+4*i:]) != want {
			return false
		}
	}
	behind := align8(marker + 4*len(markers))
	return behind == end || align8(behind+3*n.count) == end // 6.2 and 6.3: kallsyms_seqs_of_names
}

// nameLength is how many tokens a name has, and how many bytes say so; 0: none.
func nameLength(b []byte) (length, head int) {
	if len(b) == 0 {
		return 0, 0
	}
	if b[0]&0x80 == 0 {
		return int(b[0]), 1
	}
	if len(b) < 2 {
		return 0, 0
	}
	return int(b[0]&0x7f) | int(b[1])<<7, 2
}

// findAddresses reads the addresses: behind the tokens' index from 6.4 on, before the number of names until then.
func findAddresses(image []byte, n names, index int) ([]uint64, bool) {
	size := align8(4 * n.count)
	behind := align8(index + indexBytes)
	if a, ok := readAddresses(image, n.count, behind, behind+size); ok {
		return a, true
	}
	before := n.start - 16 // of the number, and of the base
	return readAddresses(image, n.count, before-size, before)
}

// readAddresses reads kallsyms_offsets relative to kallsyms_relative_base. An offset that is not negative is an
// address itself (of a per-CPU variable), unless none is negative: then all are relative.
func readAddresses(image []byte, count, offsets, base int) ([]uint64, bool) {
	if offsets < 0 || base+8 > len(image) {
		return nil, false
	}
	from := binary.LittleEndian.Uint64(image[base:])
	if from < firstText {
		return nil, false
	}
	out := make([]uint64, count)
	negative := false
	for i := range out {
		out[i] = uint64(int64(int32(binary.LittleEndian.Uint32(image[offsets+4*i:]))))
		negative = negative || int64(out[i]) < 0
	}
	for i, o := range out {
		switch {
		case !negative:
			out[i] = from + o
		case int64(o) < 0:
			out[i] = from - 1 - o
		}
	}
	return out, slices.IsSorted(out)
}

func newTable(image []byte, n names, v vocabulary, addresses []uint64) (*Table, error) {
	t := &Table{all: make([]Symbol, n.count), byName: make(map[string]int, n.count)}
	var name strings.Builder
	at := n.start
	for i := range t.all {
		length, head := nameLength(image[at:])
		name.Reset()
		for _, token := range image[at+head : at+head+length] {
			if name.Len() > maxName {
				return nil, fmt.Errorf("kallsyms: symbol %d, at %#x of the image: a name of more than %d bytes", i, at, maxName)
			}
			name.WriteString(v.tokens[token])
		}
		at += head + length
		s := name.String()
		if len(s) < 2 {
			return nil, fmt.Errorf("kallsyms: symbol %d has no name", i)
		}
		t.all[i] = Symbol{Name: s[1:], Kind: s[0], Address: addresses[i]}
		if _, twice := t.byName[s[1:]]; !twice {
			t.byName[s[1:]] = i
		}
	}
	return t, nil
}

// Len is how many there are.
func (t *Table) Len() int { return len(t.all) }

// Lookup finds a name; of several the lowest address.
func (t *Table) Lookup(name string) (Symbol, bool) {
	i, ok := t.byName[name]
	if !ok {
		return Symbol{}, false
	}
	return t.all[i], true
}

// At is the last symbol that is not above an address.
func (t *Table) At(address uint64) (Symbol, bool) {
	i, _ := slices.BinarySearchFunc(t.all, address, func(s Symbol, a uint64) int {
		if s.Address <= a {
			return -1
		}
		return 1
	})
	if i == 0 {
		return Symbol{}, false
	}
	return t.all[i-1], true
}

// After is the lowest address of a symbol above an address.
func (t *Table) After(address uint64) (uint64, bool) {
	i, _ := slices.BinarySearchFunc(t.all, address, func(s Symbol, a uint64) int {
		if s.Address <= a {
			return -1
		}
		return 1
	})
	if i == len(t.all) {
		return 0, false
	}
	return t.all[i].Address, true
}

// All gives all symbols, by address.
func (t *Table) All() iter.Seq[Symbol] { return slices.Values(t.all) }
