package ext4

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// An Xattr is an extended attribute as getxattr(2) has it: access control lists are not in the file system's own form.
type Xattr struct {
	Name  string // with its namespace: "security.ima"
	Value []byte
}

// Extended attributes: "Extended Attributes".
const (
	xattrMagic   = 0xea020000
	xattrHeader  = 32 // bytes before a block's entries
	xattrEntry   = 16 // bytes before an entry's name
	xattrSumAt   = 16
	maxEAInode   = 64 << 10 // bytes of a value in an inode of its own: the kernel's XATTR_SIZE_MAX
	maxXattrs    = 16 << 20 // bytes of all values of an inode
	indexACL     = 2
	indexDefault = 3
	indexSystem  = 7
)

var xattrPrefixes = map[byte]string{
	0: "", 1: "user.", indexACL: "system.posix_acl_access", indexDefault: "system.posix_acl_default", 4: "trusted.", 6: "security.",
	indexSystem: "system.", 8: "system.richacl", 10: "gnu.",
}

// A rawXattr is an entry as it lies there.
type rawXattr struct {
	index byte
	name  string
	value []byte
	inode uint32 // that holds the value, 0: none
	size  uint32
	off   int64 // of the entry, in the device
}

// Xattrs returns all extended attributes, sorted by name.
func (i *Inode) Xattrs() ([]Xattr, error) {
	raw, err := i.rawXattrs()
	if err != nil {
		return nil, err
	}
	var all []Xattr
	total := 0
	for _, r := range raw {
		if r.isInlineData() {
			continue
		}
		if total += int(min(r.size, maxXattrs)); total > maxXattrs {
			return nil, at(r.off, ErrEffort, "inode %d: extended attributes of more than %d bytes", i.Number, maxXattrs)
		}
		x, err := i.xattr(r)
		if err != nil {
			return nil, err
		}
		all = append(all, x)
	}
	slices.SortFunc(all, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	for k := 1; k < len(all); k++ {
		if all[k].Name == all[k-1].Name {
			return nil, at(i.offset, ErrCorrupt, "inode %d: extended attribute %.40q twice", i.Number, all[k].Name)
		}
	}
	return all, nil
}

func (r *rawXattr) isInlineData() bool { return r.index == indexSystem && r.name == "data" }

func (i *Inode) xattr(r rawXattr) (x Xattr, err error) {
	prefix, ok := xattrPrefixes[r.index]
	if !ok {
		prefix = fmt.Sprintf("unknown-%d.", r.index)
	}
	x = Xattr{Name: prefix + r.name, Value: r.value}
	if r.inode != 0 {
		if x.Value, err = i.eaValue(r); err != nil {
			return x, err
		}
	}
	if r.index == indexACL || r.index == indexDefault {
		if x.Value, ok = convertACL(x.Value); !ok {
			return x, at(r.off, ErrCorrupt, "inode %d: access control list", i.Number)
		}
	}
	return x, nil
}

// rawXattrs are the entries in the inode and in the block that it names.
func (i *Inode) rawXattrs() ([]rawXattr, error) {
	all, err := i.inodeXattrs()
	if err != nil || i.acl == 0 {
		return all, err
	}
	more, err := i.blockXattrs()
	return append(all, more...), err
}

// inodeXattrs are the entries behind the inode's fields.
func (i *Inode) inodeXattrs() ([]rawXattr, error) {
	if len(i.raw) <= 128 {
		return nil, nil
	}
	start := 128 + int(binary.LittleEndian.Uint16(i.raw[0x80:]))
	if start+4 > len(i.raw) || binary.LittleEndian.Uint32(i.raw[start:]) != xattrMagic {
		return nil, nil
	}
	return i.parseXattrs(i.raw[start+4:], 0, i.offset+int64(start)+4)
}

func (i *Inode) blockXattrs() ([]rawXattr, error) {
	f := i.fs
	off := f.sb.offset(i.acl)
	if !f.sb.valid(i.acl, 1) {
		return nil, at(i.offset+0x68, ErrCorrupt, "inode %d: extended attributes at block %d of %d", i.Number, i.acl, f.sb.blocks)
	}
	b, err := f.block(i.acl)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint32(b) != xattrMagic || le.Uint32(b[8:]) != 1 {
		return nil, at(off, ErrCorrupt, "inode %d: block of extended attributes without its magic", i.Number)
	}
	if f.sb.metadataSum() {
		var number [8]byte
		le.PutUint64(number[:], i.acl)
		sum := crc32c(crc32c(crc32c(f.sb.seed, number[:]), b[:xattrSumAt]), zeros[:])
		if crc32c(sum, b[xattrSumAt+4:]) != le.Uint32(b[xattrSumAt:]) {
			return nil, at(off, ErrChecksum, "inode %d: block of extended attributes", i.Number)
		}
	}
	return i.parseXattrs(b, xattrHeader, off)
}

// parseXattrs reads entries from pos on; their values' places count from b's beginning, which is at off.
func (i *Inode) parseXattrs(b []byte, pos int, off int64) ([]rawXattr, error) {
	le := binary.LittleEndian
	var all []rawXattr
	for pos+4 <= len(b) && le.Uint32(b[pos:]) != 0 {
		bad := at(off+int64(pos), ErrCorrupt, "inode %d: extended attribute", i.Number)
		if pos+xattrEntry > len(b) || pos+xattrEntry+int(b[pos]) > len(b) {
			return nil, bad
		}
		e := b[pos:]
		r := rawXattr{
			index: e[1], name: string(e[xattrEntry : xattrEntry+int(e[0])]),
			inode: le.Uint32(e[4:]), size: le.Uint32(e[8:]), off: off + int64(pos),
		}
		if r.inode == 0 {
			place := int(le.Uint16(e[2:]))
			if place > len(b) || uint64(r.size) > uint64(len(b)-place) {
				return nil, bad
			}
			r.value = b[place:][:r.size:r.size]
		}
		all = append(all, r)
		pos += (xattrEntry + int(e[0]) + 3) &^ 3
	}
	return all, nil
}

// eaInodes are the inodes that hold values of i's attributes.
func (i *Inode) eaInodes() ([]uint32, error) {
	if i.fs.sb.incompat&incompatEAInode == 0 {
		return nil, nil
	}
	raw, err := i.rawXattrs()
	if err != nil {
		return nil, err
	}
	var all []uint32
	for _, r := range raw {
		if r.inode != 0 {
			all = append(all, r.inode)
		}
	}
	return all, nil
}

// eaValue reads a value that has an inode of its own, and verifies it by the sum that the inode has for a time of access.
func (i *Inode) eaValue(r rawXattr) ([]byte, error) {
	if i.fs.sb.incompat&incompatEAInode == 0 {
		return nil, at(r.off, ErrCorrupt, "inode %d: extended attribute in inode %d", i.Number, r.inode)
	}
	v, err := i.fs.Inode(r.inode)
	if err != nil {
		return nil, err
	}
	if v.Flags&flagEAInode == 0 || v.Size != int64(r.size) || v.Size > maxEAInode {
		return nil, at(v.offset, ErrCorrupt, "inode %d: extended attribute of %d bytes in inode %d, which has %d", i.Number, r.size, r.inode, v.Size)
	}
	b := make([]byte, v.Size)
	file, err := v.Open()
	if err != nil {
		return nil, err
	}
	if _, err := file.ReadAt(b, 0); err != nil && v.Size > 0 {
		return nil, err
	}
	if crc32c(i.fs.sb.seed, b) != binary.LittleEndian.Uint32(v.raw[8:]) {
		return nil, at(v.offset, ErrChecksum, "inode %d: extended attribute in inode %d", i.Number, r.inode)
	}
	return b, nil
}

// inlineRest is what of an inode's contents is in its attribute.
func (i *Inode) inlineRest() ([]byte, error) {
	if i.fs.sb.incompat&incompatInlineData == 0 {
		return nil, at(i.offset+0x20, ErrCorrupt, "inode %d: inline data in a file system without", i.Number)
	}
	all, err := i.inodeXattrs()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		if r.isInlineData() && r.inode == 0 {
			return r.value, nil
		}
	}
	return nil, at(i.offset, ErrCorrupt, "inode %d: inline data without its attribute", i.Number)
}

// convertACL makes of a list as it is on disk (fs/ext4/acl.h), where only entries for a user or a group have a number,
// the one that programs see (include/uapi/linux/posix_acl_xattr.h).
func convertACL(b []byte) ([]byte, bool) {
	const (
		diskVersion, version = 1, 2
		user, group          = 0x02, 0x08
	)
	le := binary.LittleEndian
	if len(b) < 4 || le.Uint32(b) != diskVersion {
		return nil, false
	}
	out := le.AppendUint32(nil, version)
	for b = b[4:]; len(b) > 0; {
		if len(b) < 4 {
			return nil, false
		}
		tag, id := le.Uint16(b), ^uint32(0)
		out = append(out, b[:4]...)
		b = b[4:]
		if tag == user || tag == group {
			if len(b) < 4 {
				return nil, false
			}
			id = le.Uint32(b)
			b = b[4:]
		}
		out = le.AppendUint32(out, id)
	}
	return out, true
}
