package baseline

import (
	"cmp"
	"crypto/sha256"
)

// A Digest is the SHA-256 of a file's contents.
type Digest [sha256.Size]byte

// A Name is where a file is found.
type Name struct {
	Volume string // "disk0" for a bare file system, "disk0p2" for a partition of the first disk
	Path   string // from the volume's root, beginning with a slash, clean
}

// String is the name as findings and listings have it, such as disk0p1:/etc/passwd.
func (n Name) String() string { return n.Volume + ":" + n.Path }

// Compare orders names as a baseline does: by volume, then by path, byte by byte.
func (n Name) Compare(m Name) int {
	return cmp.Or(cmp.Compare(n.Volume, m.Volume), cmp.Compare(n.Path, m.Path))
}

// An Entry is what is known of one file.
type Entry struct {
	Name
	Mode         uint32 // type and permissions, as of stat(2)
	UID, GID     uint32
	Links        uint32  // names it has; 1 for directories, whose number of names says how many directories are in them
	Size         int64   // of regular files, in bytes, else 0
	Digest       Digest  // of a regular file, where its rule asks for contents, else zero
	Target       string  // of a symbolic link
	Major, Minor uint32  // of a device node
	Xattrs       []Xattr // sorted by name: those that decide what a file may do, see Telling
}

// An Xattr is an extended attribute.
type Xattr struct {
	Name  string
	Value string // bytes
}

// A Want is what is to be read of a file.
type Want uint8

// What is wanted, as a set.
const (
	Descend  Want = 1 << iota // of a directory: something in it may be wanted
	Metadata                  // everything but contents and extended attributes
	Content                   // the digest
	Xattrs                    // those of Telling
)

// Telling reports whether an extended attribute is part of a baseline: what decides who may do what with the file, or what it may do.
func Telling(name string) bool {
	switch name {
	case "security.capability", "security.ima", "security.evm", "security.selinux", "security.apparmor",
		"system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	return false
}
