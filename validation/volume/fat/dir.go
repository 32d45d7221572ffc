package fat

import (
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"
	"unicode/utf16"
)

// Attributes of entries (§6).
const (
	attrReadOnly  = 0x01
	attrLabel     = 0x08
	attrDirectory = 0x10
	attrLong      = 0x0f

	entryBytes = 32
	entryFree  = 0xe5
	maxDir     = 2 << 20 // bytes of a directory
	longUnits  = 13      // UTF-16 units in an entry of a long name
	maxLong    = 20      // of such entries
)

// A File is a file or a directory.
type File struct {
	Name     string
	Dir      bool
	ReadOnly bool
	Size     int64 // in bytes; of a directory 0
	Mtime    time.Time
	Inode    uint64 // tells it from others: where its entry is; the root's is 1

	fs      *FS
	cluster uint32  // the first one, 0: none
	entries []Range // where its entries are, those of its long name too
}

// A Range is a range of bytes of the device.
type Range struct{ Offset, Length int64 }

// Root is the root directory.
func (f *FS) Root() *File {
	return &File{Name: "/", Dir: true, Inode: 1, fs: f, cluster: f.rootCluster}
}

// areas yields where a directory's entries are.
func (d *File) areas() iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		if d.cluster == 0 {
			if d.Inode == 1 {
				yield(Range{d.fs.root, d.fs.rootBytes}, nil)
			}
			return
		}
		total := int64(0)
		for c := d.cluster; c != 0; {
			if total += d.fs.cluster; total > maxDir {
				yield(Range{}, at(d.fs.offset(c), ErrCorrupt, "%s: directory of more than %d bytes", d.Name, maxDir))
				return
			}
			if !yield(Range{d.fs.offset(c), d.fs.cluster}, nil) {
				return
			}
			next, err := d.fs.next(c)
			if err != nil {
				yield(Range{}, fmt.Errorf("%s: %w", d.Name, err))
				return
			}
			c = next
		}
	}
}

// ReadDir yields what is in a directory, but for "." and "..". An error is one entry's, or ends it.
func (d *File) ReadDir() iter.Seq2[*File, error] {
	return func(yield func(*File, error) bool) {
		if !d.Dir {
			yield(nil, fmt.Errorf("%s: not a directory", d.Name))
			return
		}
		p := parser{dir: d}
		for area, err := range d.areas() {
			if err != nil {
				yield(nil, err)
				return
			}
			b := make([]byte, area.Length)
			if err := readFull(d.fs.r, b, area.Offset); err != nil {
				yield(nil, err)
				return
			}
			for pos := int64(0); pos+entryBytes <= int64(len(b)); pos += entryBytes {
				file, err := p.entry(b[pos:][:entryBytes], area.Offset+pos)
				if (file != nil || err != nil) && !yield(file, err) {
					return
				}
			}
		}
	}
}

// A parser puts long names together, which come in entries of their own before the file's (§7).
type parser struct {
	dir   *File
	long  []uint16
	left  int // entries that must follow yet
	sum   byte
	where []Range
}

// entry takes one entry; nil: it is no file's.
func (p *parser) entry(e []byte, off int64) (*File, error) {
	attr := e[11] & 0x3f
	switch {
	case e[0] == 0 || e[0] == entryFree: // as for Linux the first free one is not the end
		p.long, p.where = nil, nil
		return nil, nil
	case attr == attrLong:
		p.part(e, off)
		return nil, nil
	case attr&attrLabel != 0:
		p.long, p.where = nil, nil
		return nil, nil
	}
	f := p.file(e, off, attr)
	p.long, p.where = nil, nil
	if f.Name == "." || f.Name == ".." {
		return nil, nil
	}
	if f.Name == "" || strings.ContainsAny(f.Name, "/\x00") {
		return nil, at(off, ErrCorrupt, "%s: name %.40q", p.dir.Name, f.Name)
	}
	if f.cluster != 0 && (f.cluster < 2 || f.cluster >= f.fs.clusters) {
		return nil, at(off, ErrCorrupt, "%s: in cluster %d of %d", f.Name, f.cluster, f.fs.clusters)
	}
	if f.Size > int64(f.fs.clusters)*f.fs.cluster || f.Size > 0 && f.cluster == 0 {
		return nil, at(off, ErrCorrupt, "%s: %d bytes from cluster %d on", f.Name, f.Size, f.cluster)
	}
	return f, nil
}

// part takes a part of a long name: the last comes first.
func (p *parser) part(e []byte, off int64) {
	n := int(e[0] & 0x1f)
	if e[0]&0x40 != 0 && n > 0 && n <= maxLong {
		p.long, p.left, p.sum, p.where = make([]uint16, n*longUnits), n, e[13], nil
	}
	if p.long == nil || n != p.left || n == 0 || e[13] != p.sum {
		p.long, p.where = nil, nil
		return
	}
	p.left--
	p.where = append(p.where, Range{off, entryBytes})
	units := p.long[p.left*longUnits:]
	for i := range longUnits {
		k := 1 + 2*i
		switch {
		case i >= 11:
			k = 28 + 2*(i-11)
		case i >= 5:
			k = 14 + 2*(i-5)
		}
		units[i] = binary.LittleEndian.Uint16(e[k:])
	}
}

func (p *parser) file(e []byte, off int64, attr byte) *File {
	le := binary.LittleEndian
	f := &File{
		Name: p.longName(e), Dir: attr&attrDirectory != 0, ReadOnly: attr&attrReadOnly != 0, Inode: uint64(off) / entryBytes,
		Mtime: stamp(le.Uint16(e[24:]), le.Uint16(e[22:])), fs: p.dir.fs, cluster: uint32(le.Uint16(e[26:])),
		entries: append(p.where, Range{off, entryBytes}),
	}
	if f.fs.bits == 32 {
		f.cluster |= uint32(le.Uint16(e[20:])) << 16
	}
	if !f.Dir {
		f.Size = int64(le.Uint32(e[28:]))
	}
	if f.Name == "" {
		f.Name = shortName(e)
	}
	return f
}

// longName is the name of the entries before this one, if they belong to it.
func (p *parser) longName(e []byte) string {
	if p.long == nil || p.left != 0 || nameSum(e) != p.sum {
		return ""
	}
	if i := slices.Index(p.long, 0); i >= 0 {
		p.long = p.long[:i]
	}
	return string(utf16.Decode(p.long))
}

// nameSum is what each part of a long name says of the entry that it belongs to (§7.2).
func nameSum(e []byte) (sum byte) {
	for _, c := range e[:11] {
		sum = sum>>1 | sum<<7 + c
	}
	return sum
}

// shortName is a name of 8 and 3 letters; two bits say that they are small ones.
func shortName(e []byte) string {
	const smallBase, smallExt = 0x08, 0x10
	raw := slices.Clone(e[:11])
	if raw[0] == 0x05 {
		raw[0] = entryFree
	}
	name, ext := letters(raw[:8]), letters(raw[8:])
	if e[12]&smallBase != 0 {
		name = strings.ToLower(name)
	}
	if e[12]&smallExt != 0 {
		ext = strings.ToLower(ext)
	}
	if ext != "" {
		name += "." + ext
	}
	return name
}

// Code page 437 from 128 on.
var codePage = []rune("ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u00a0")

func letters(b []byte) string {
	var s strings.Builder
	for _, c := range b {
		if c >= 128 {
			s.WriteRune(codePage[c-128])
		} else {
			s.WriteByte(c)
		}
	}
	return strings.TrimRight(s.String(), " ")
}

// stamp is a date and a time of two seconds (§6.2).
func stamp(d, t uint16) time.Time {
	return time.Date(1980+int(d>>9), time.Month(d>>5&15), int(d&31), int(t>>11), int(t>>5&63), int(t&31)*2, 0, time.UTC)
}
