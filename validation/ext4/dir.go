package ext4

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"

	"golang.org/x/sys/unix"
)

// A Dirent is one name in a directory ("Directory Entries").
type Dirent struct {
	Name  string
	Inode uint32
	// Type is what the entry says its inode is: a unix.S_IF value, or 0 where it does not say. It may lie.
	Type uint32
}

// What entries say of types, by their number.
var direntTypes = [...]uint32{0, unix.S_IFREG, unix.S_IFDIR, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFLNK}

// ReadDir yields a directory's entries in the order of its blocks, but for "." and "..". An error is one block's: what
// follows it is yielded too, so that a damaged block hides nothing but what is in it.
func (i *Inode) ReadDir() iter.Seq2[Dirent, error] {
	return func(yield func(Dirent, error) bool) {
		for d, err := range i.entries() {
			if err == nil && (d.Name == "." || d.Name == "..") {
				continue
			}
			if !yield(d, err) {
				return
			}
		}
	}
}

// entries yields all of a directory's entries.
func (i *Inode) entries() iter.Seq2[Dirent, error] {
	return func(yield func(Dirent, error) bool) {
		switch {
		case !i.IsDir():
			yield(Dirent{}, fmt.Errorf("inode %d: not a directory", i.Number))
		case i.Flags&flagInline != 0:
			i.inlineEntries(yield)
		default:
			i.blockEntries(yield)
		}
	}
}

// dirPiece is how much of a directory is read at once.
const dirPiece = 64 << 10

func (i *Inode) blockEntries(yield func(Dirent, error) bool) {
	bs := i.fs.sb.blockSize
	end := i.mapEnd()
	if end > i.fs.sb.blocks || i.Size%bs != 0 {
		yield(Dirent{}, at(i.offset+4, ErrCorrupt, "inode %d: directory of %d bytes", i.Number, i.Size))
		return
	}
	m := mapping{in: i}
	buf := make([]byte, min(int64(end)*bs, dirPiece))
	for n := uint64(0); n < end; {
		r, err := m.at(n)
		if err == nil && r.kind != Data {
			err = at(i.offset, ErrCorrupt, "inode %d: directory with a hole at its block %d", i.Number, n)
		}
		if m.loads > i.fs.sb.blocks {
			yield(Dirent{}, at(i.offset, ErrEffort, "inode %d", i.Number))
			return
		}
		if err != nil {
			if r.count == 0 { // not even its map can be read
				yield(Dirent{}, err)
				return
			}
			if !yield(Dirent{}, err) {
				return
			}
			n += r.count
			continue
		}
		count := min(r.count, end-n, uint64(len(buf))/uint64(bs))
		b, off := buf[:int64(count)*bs], i.fs.sb.offset(r.physical)
		if err := i.fs.read(b, off); err != nil {
			yield(Dirent{}, err)
			return
		}
		for k := range count {
			at := int64(k) * bs
			if !i.dirBlock(b[at:at+bs], off+at, n+k, yield) {
				return
			}
		}
		n += count
	}
}

// dirBlock yields the entries of one block, number n of the directory.
func (i *Inode) dirBlock(b []byte, off int64, n uint64, yield func(Dirent, error) bool) bool {
	if err := i.verifyDirBlock(b, off, n); err != nil {
		return yield(Dirent{}, err)
	}
	return i.parseEntries(b, off, yield)
}

// verifyDirBlock checks a block's checksum, which a hash tree's node has elsewhere than a leaf ("Directory Entries";
// "Hash Tree Directories").
func (i *Inode) verifyDirBlock(b []byte, off int64, n uint64) error {
	if !i.fs.sb.metadataSum() {
		return nil
	}
	le := binary.LittleEndian
	if i.fs.sb.compat&compatDirIndex != 0 && i.Flags&flagIndex != 0 && (n == 0 || recordLength(b) == len(b)) {
		return i.verifyHashNode(b, off, n)
	}
	tail := b[len(b)-12:]
	if le.Uint32(tail) != 0 || le.Uint16(tail[4:]) != 12 || tail[6] != 0 || tail[7] != 0xde {
		return at(off+int64(len(b)-12), ErrCorrupt, "inode %d: directory block %d without a checksum", i.Number, n)
	}
	if crc32c(i.seed, b[:len(b)-12]) != le.Uint32(tail[8:]) {
		return at(off, ErrChecksum, "inode %d: directory block %d", i.Number, n)
	}
	return nil
}

func (i *Inode) verifyHashNode(b []byte, off int64, n uint64) error {
	le := binary.LittleEndian
	entries := 8
	if n == 0 {
		entries = 0x18 + int(b[0x1d])
	}
	bad := at(off, ErrCorrupt, "inode %d: hash tree's node in directory block %d", i.Number, n)
	if entries+8 > len(b) || entries < 8 {
		return bad
	}
	limit, count := int(le.Uint16(b[entries:])), int(le.Uint16(b[entries+2:]))
	tail := entries + 8*limit
	if count > limit || tail+8 > len(b) {
		return bad
	}
	sum := crc32c(i.seed, b[:entries+8*count])
	if crc32c(crc32c(sum, b[tail:tail+4]), zeros[:]) != le.Uint32(b[tail+4:]) {
		return at(off, ErrChecksum, "inode %d: hash tree's node in directory block %d", i.Number, n)
	}
	return nil
}

// recordLength is the length of the entry that b begins with; longer ones than 64 KiB less 4 are written otherwise.
func recordLength(b []byte) int {
	v := int(binary.LittleEndian.Uint16(b[4:]))
	if v == 0xffff || v == 0 {
		return 64 << 10
	}
	return v&^3 | v&3<<16
}

// parseEntries yields the entries that fill b exactly; a hash tree's nodes look as if they held none.
func (i *Inode) parseEntries(b []byte, off int64, yield func(Dirent, error) bool) bool {
	le := binary.LittleEndian
	for pos := 0; pos < len(b); {
		e := b[pos:]
		bad := func(what string) error {
			return at(off+int64(pos), ErrCorrupt, "inode %d: directory entry %s", i.Number, what)
		}
		if len(e) < 8 {
			return yield(Dirent{}, bad("cut short"))
		}
		length, name := recordLength(e), int(e[6])
		if length < 12 || length > len(e) || length%4 != 0 || 8+name > length {
			return yield(Dirent{}, bad(fmt.Sprintf("of %d bytes with a name of %d", length, name)))
		}
		if n := le.Uint32(e); n != 0 {
			d, what := i.entry(n, e[8:8+name], e[7])
			var err error
			if what != "" {
				err = bad(what)
			}
			if !yield(d, err) {
				return false
			}
		}
		pos += length
	}
	return true
}

// entry makes an entry, or says what is wrong with it.
func (i *Inode) entry(n uint32, name []byte, kind byte) (d Dirent, what string) {
	switch {
	case n > i.fs.sb.inodes:
		return d, fmt.Sprintf("%.40q for inode %d of %d", name, n, i.fs.sb.inodes)
	case len(name) == 0 || bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0:
		return d, fmt.Sprintf("for inode %d with name %.40q", n, name)
	}
	d = Dirent{Name: string(name), Inode: n}
	if kind := int(kind); kind < len(direntTypes) && i.fs.sb.incompat&0x2 != 0 {
		d.Type = direntTypes[kind]
	}
	return d, ""
}

// Inline data: "Inline Data".

// inlineData is what an inode with inline data holds, at most Size bytes of it.
func (i *Inode) inlineData() ([]byte, error) {
	more, err := i.inlineRest()
	if err != nil {
		return nil, err
	}
	b := append(append(make([]byte, 0, 60+len(more)), i.blockField()...), more...)
	return b[:min(i.Size, int64(len(b)))], nil
}

// inlineEntries yields the entries of a directory in its inode: the parent's number, entries, and more of them in the
// attribute.
func (i *Inode) inlineEntries(yield func(Dirent, error) bool) {
	more, err := i.inlineRest()
	if err != nil {
		yield(Dirent{}, err)
		return
	}
	b := i.blockField()
	parent := binary.LittleEndian.Uint32(b)
	if !yield(Dirent{".", i.Number, unix.S_IFDIR}, nil) {
		return
	}
	if parent == 0 || parent > i.fs.sb.inodes {
		err = at(i.offset+blockFieldAt, ErrCorrupt, "inode %d: parent in inode %d of %d", i.Number, parent, i.fs.sb.inodes)
	}
	if !yield(Dirent{"..", parent, unix.S_IFDIR}, err) {
		return
	}
	if i.parseEntries(b[4:], i.offset+blockFieldAt+4, yield) {
		i.parseEntries(more, i.offset, yield)
	}
}
