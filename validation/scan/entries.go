package scan

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"iter"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
)

// All yields the entries in the order of [baseline.Name.Compare]. A name has none if nothing but [baseline.Descend] was
// wanted of it, or if what was wanted could not be read: then each scan has a [Problem] of it.
func (x *Index) All() iter.Seq[baseline.Entry] {
	return func(yield func(baseline.Entry) bool) {
		for _, v := range x.volumes {
			if !v.all(yield) {
				return
			}
		}
	}
}

func (v *volume) all(yield func(baseline.Entry) bool) bool {
	more := true
	v.each(func(path []byte, i int) bool {
		if e, ok := v.entry(i); ok {
			e.Name = baseline.Name{Volume: v.name, Path: string(path)}
			more = yield(e)
		}
		return more
	})
	return more
}

// each goes through the names in the order of their paths, byte by byte.
func (v *volume) each(do func(path []byte, i int) bool) {
	if v.tree() != nil || v.nameCount() == 0 || !do([]byte("/"), 0) {
		return
	}
	if d, ok := v.dir(rootInode); ok {
		v.below(d, []byte("/"), do)
	}
}

// below goes through what is in a directory whose path is given with its slash. Of two names "a" and "a-b" the first is a
// directory: then "a-b" comes before "a/c".
func (v *volume) below(d int, path []byte, do func(path []byte, i int) bool) bool {
	type later struct {
		dir, name int
	}
	var dirs []later // whose contents are still to come: each is a prefix of the next
	enter := func(l later) bool {
		return v.below(l.dir, append(append(path, v.lettersOf(v.nameAt(l.name))...), '/'), do)
	}
	for i := int(v.dirs[d].first); i < int(v.dirs[d].first+v.dirs[d].count); i++ {
		n := v.nameAt(i)
		letters := v.lettersOf(n)
		for len(dirs) > 0 && afterContents(letters, v.lettersOf(v.nameAt(dirs[len(dirs)-1].name))) {
			l := dirs[len(dirs)-1]
			dirs = dirs[:len(dirs)-1]
			if !enter(l) {
				return false
			}
		}
		if !do(append(path, letters...), i) {
			return false
		}
		if n.want()&baseline.Descend != 0 {
			if c, ok := v.dir(v.inode(int(n.inode())).number()); ok && v.dirs[c].count > 0 {
				dirs = append(dirs, later{c, i})
			}
		}
	}
	for len(dirs) > 0 {
		l := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		if !enter(l) {
			return false
		}
	}
	return true
}

// afterContents reports whether a name comes after what is in a directory of the same parent.
func afterContents(name, dir []byte) bool {
	return !bytes.HasPrefix(name, dir) || len(name) > len(dir) && name[len(dir)] > '/'
}

// Lookup finds the entry of a name.
func (x *Index) Lookup(n baseline.Name) (baseline.Entry, bool) {
	v := x.volume(n.Volume)
	if v == nil {
		return baseline.Entry{}, false
	}
	i, ok := v.lookup(n.Path)
	if !ok {
		return baseline.Entry{}, false
	}
	e, ok := v.entry(i)
	e.Name = n
	return e, ok
}

func (v *volume) lookup(path string) (int, bool) {
	rest, ok := strings.CutPrefix(path, "/")
	if !ok || v.tree() != nil || v.nameCount() == 0 {
		return 0, false
	}
	at := 0
	for ok = rest != ""; ok; {
		var part string
		part, rest, ok = strings.Cut(rest, "/")
		d, isDir := v.dir(v.inode(int(v.nameAt(at).inode())).number())
		if !isDir || v.nameAt(at).want()&baseline.Descend == 0 {
			return 0, false
		}
		i, found := v.child(d, part)
		if !found {
			return 0, false
		}
		at = i
	}
	return at, true
}

// child finds a name in a directory.
func (v *volume) child(d int, letters string) (int, bool) {
	first, count := int(v.dirs[d].first), int(v.dirs[d].count)
	i := first + sort.Search(count, func(k int) bool { return string(v.lettersOf(v.nameAt(first+k))) >= letters })
	return i, i < first+count && string(v.lettersOf(v.nameAt(i))) == letters
}

// path is that of a name.
func (v *volume) path(i int) string {
	var parts []int
	length := 0
	for v.nameAt(i).dir() != 0 {
		parts = append(parts, i)
		length += 1 + int(v.nameAt(i)[12])
		d, ok := v.dir(v.nameAt(i).dir())
		if !ok || length > maxPath+256 {
			break // no index that was opened is like that
		}
		i = int(v.dirs[d].name)
	}
	if length == 0 {
		return "/"
	}
	path := make([]byte, 0, length)
	for _, k := range slices.Backward(parts) {
		path = append(append(path, '/'), v.lettersOf(v.nameAt(k))...)
	}
	return string(path)
}

// entry makes the entry of a name, but for that name; false: it has none.
func (v *volume) entry(i int) (baseline.Entry, bool) {
	n := v.nameAt(i)
	in := v.inode(int(n.inode()))
	want, state := n.want(), in.state()
	if !complete(want, state) {
		return baseline.Entry{}, false
	}
	off, length := in.rest()
	target, xattrs, ok := parseRest(v.rest[off:][:length])
	if !ok {
		return baseline.Entry{}, false
	}
	le := binary.LittleEndian
	f := fact{
		mode: in.mode(), uid: le.Uint32(in[8:]), gid: le.Uint32(in[12:]), links: le.Uint32(in[16:]), size: in.size(),
		digest: baseline.Digest(in[40:72]), target: target, xattrs: xattrs,
	}
	return f.entry(want), true
}

// complete reports whether what is wanted of an inode is known, and is more than what is in it.
func complete(want baseline.Want, state uint16) bool {
	return want&^baseline.Descend != 0 && state&badTarget == 0 &&
		(want&baseline.Content == 0 || state&badDigest == 0) && (want&baseline.Xattrs == 0 || state&badXattrs == 0)
}

// A fact is what a file is, whatever is wanted of it.
type fact struct {
	mode, uid, gid, links uint32
	size                  int64
	digest                baseline.Digest // of a device: which one
	target                string
	xattrs                []baseline.Xattr
}

// entry is what of it is wanted. Metadata is never left out: nothing else means something without.
func (f *fact) entry(want baseline.Want) baseline.Entry {
	e := baseline.Entry{Mode: f.mode, UID: f.uid, GID: f.gid, Links: f.links}
	switch f.mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = f.size
		if want&baseline.Content != 0 {
			e.Digest = f.digest
		}
	case unix.S_IFDIR:
		e.Links = 1
	case unix.S_IFLNK:
		e.Target = f.target
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Major, e.Minor = binary.LittleEndian.Uint32(f.digest[:]), binary.LittleEndian.Uint32(f.digest[4:])
	}
	if want&baseline.Xattrs != 0 {
		e.Xattrs = f.xattrs
	}
	return e
}

// sameEntry compares two entries but for their names.
func sameEntry(a, b *baseline.Entry) bool {
	return a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && a.Links == b.Links && a.Size == b.Size && a.Digest == b.Digest &&
		a.Target == b.Target && a.Major == b.Major && a.Minor == b.Minor && slices.Equal(a.Xattrs, b.Xattrs)
}

// The rest of an inode: its target's length in four bytes and the target; then of each attribute, by name, its name's length in a
// byte, its value's in four, and both.

func appendRest(b []byte, target string, xattrs []baseline.Xattr) []byte {
	if target == "" && len(xattrs) == 0 {
		return b
	}
	b = append(binary.LittleEndian.AppendUint32(b, uint32(len(target))), target...)
	for _, x := range xattrs {
		b = append(append(b, byte(len(x.Name))), x.Name...)
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(x.Value))), x.Value...)
	}
	return b
}

func parseRest(b []byte) (target string, xattrs []baseline.Xattr, ok bool) {
	if len(b) == 0 {
		return "", nil, true
	}
	take := func(n uint64) (s string, ok bool) {
		if n > uint64(len(b)) {
			return "", false
		}
		s, b = string(b[:n]), b[n:]
		return s, true
	}
	length := func() (uint64, bool) {
		if len(b) < 4 {
			return 0, false
		}
		n := uint64(binary.LittleEndian.Uint32(b))
		b = b[4:]
		return n, true
	}
	n, ok := length()
	if !ok || n > maxPath {
		return "", nil, false
	}
	if target, ok = take(n); !ok {
		return "", nil, false
	}
	for len(b) > 0 {
		var x baseline.Xattr
		k := uint64(b[0])
		b = b[1:]
		if x.Name, ok = take(k); !ok || k == 0 {
			return "", nil, false
		}
		if n, ok = length(); !ok {
			return "", nil, false
		}
		if x.Value, ok = take(n); !ok {
			return "", nil, false
		}
		if last := len(xattrs) - 1; last >= 0 && cmp.Compare(xattrs[last].Name, x.Name) >= 0 {
			return "", nil, false
		}
		xattrs = append(xattrs, x)
	}
	return target, xattrs, true
}
