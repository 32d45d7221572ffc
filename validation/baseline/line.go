package baseline

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A line is an entry:
//
//	disk0p1:/usr/bin/sudo f 4755 0:0 1 281624 9f86d0…0a08
//	disk0p1:/usr/bin/ping f 0755 0:0 1 90568 ab12…00 security.capability=\x01\x00…
//	disk0p1:/bin l 0777 0:0 1 ->usr/bin
//	disk0p1:/etc d 0755 0:0 1
//	disk0p1:/dev/sda b 0660 0:6 1 8:0
//
// Name, type as in find -type, permissions, owner and group, number of names; then of a regular file its size and digest (-
// where it is not checked), of a symbolic link its target, of a device node its numbers; then extended attributes.

const (
	maxPath       = 64 << 10  // bytes of a path or of a target
	maxLine       = 512 << 10 // bytes, its end included
	maxXattr      = 64 << 10  // bytes of all values of a file
	maxVolumeName = 64
	minLine       = len("a:/ d 0000 0:0 0\n")
	noDigest      = "-"
)

var types = []struct {
	letter byte
	mode   uint32
	name   string
}{
	{'f', unix.S_IFREG, "file"},
	{'d', unix.S_IFDIR, "directory"},
	{'l', unix.S_IFLNK, "link"},
	{'c', unix.S_IFCHR, "device"},
	{'b', unix.S_IFBLK, "device"},
	{'p', unix.S_IFIFO, "pipe"},
	{'s', unix.S_IFSOCK, "socket"},
}

// typeLetter is a type's letter, 0 if there is none.
func typeLetter(mode uint32) byte {
	for _, t := range types {
		if mode&unix.S_IFMT == t.mode {
			return t.letter
		}
	}
	return 0
}

// checkName says what is wrong with a name.
func checkName(n Name) error {
	switch {
	case !isVolume(n.Volume):
		return fmt.Errorf("%.80q is no name of a volume", n.Volume)
	case len(n.Path) > maxPath:
		return fmt.Errorf("a path of %d bytes: the most is %d", len(n.Path), maxPath)
	case !strings.HasPrefix(n.Path, "/"):
		return errors.New("a path that does not begin with a slash")
	case strings.IndexByte(n.Path, 0) >= 0:
		return errors.New("a path with a zero byte")
	}
	if n.Path == "/" {
		return nil
	}
	for rest := n.Path; rest != ""; {
		part := rest[1:]
		if i := strings.IndexByte(part, '/'); i >= 0 {
			part, rest = part[:i], part[i:]
		} else {
			rest = ""
		}
		if part == "" || part == "." || part == ".." {
			return errors.New("a path that is not clean")
		}
	}
	return nil
}

// isVolume reports whether a text may be a volume's name: letters, digits, dots, dashes and underscores, the first no mark.
func isVolume(s string) bool {
	for i := range len(s) {
		c := s[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || c != '.' && c != '-' && c != '_') {
			return false
		}
	}
	return s != "" && len(s) <= maxVolumeName
}

// checkEntry says what is wrong with an entry that is to be written.
func checkEntry(e *Entry) error {
	if err := checkName(e.Name); err != nil {
		return err
	}
	kind := e.Mode & unix.S_IFMT
	device := kind == unix.S_IFCHR || kind == unix.S_IFBLK
	switch {
	case typeLetter(e.Mode) == 0 || e.Mode&^(unix.S_IFMT|permissions) != 0:
		return fmt.Errorf("mode %o is of no file", e.Mode)
	case e.Size < 0 || kind != unix.S_IFREG && (e.Size != 0 || e.Digest != Digest{}):
		return errors.New("size and digest are of regular files")
	case kind != unix.S_IFLNK && e.Target != "" || strings.IndexByte(e.Target, 0) >= 0 || len(e.Target) > maxPath:
		return errors.New("a target is a symbolic link's, has no zero byte and is no longer than a path")
	case !device && (e.Major != 0 || e.Minor != 0):
		return errors.New("device numbers are of device nodes")
	}
	values := 0
	for i, x := range e.Xattrs {
		values += len(x.Value)
		if !Telling(x.Name) || i > 0 && e.Xattrs[i-1].Name >= x.Name || values > maxXattr {
			return fmt.Errorf("extended attributes are those of Telling, sorted, of %d bytes at most", maxXattr)
		}
	}
	return nil
}

func appendName(b []byte, n Name) []byte {
	b = append(b, n.Volume...)
	b = append(b, ':')
	return appendEscaped(b, n.Path)
}

// appendLine appends an entry that is right, and the line's end.
func appendLine(b []byte, e *Entry) []byte {
	b = appendName(b, e.Name)
	b = append(b, ' ', typeLetter(e.Mode), ' ')
	for shift := 9; shift >= 0; shift -= 3 {
		b = append(b, '0'+byte(e.Mode>>shift&7))
	}
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(e.UID), 10)
	b = append(b, ':')
	b = strconv.AppendUint(b, uint64(e.GID), 10)
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(e.Links), 10)
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		b = append(b, ' ')
		b = strconv.AppendInt(b, e.Size, 10)
		b = append(b, ' ')
		if (e.Digest == Digest{}) {
			b = append(b, noDigest...)
		} else {
			b = hex.AppendEncode(b, e.Digest[:])
		}
	case unix.S_IFLNK:
		b = append(b, " ->"...)
		b = appendEscaped(b, e.Target)
	case unix.S_IFCHR, unix.S_IFBLK:
		b = append(b, ' ')
		b = strconv.AppendUint(b, uint64(e.Major), 10)
		b = append(b, ':')
		b = strconv.AppendUint(b, uint64(e.Minor), 10)
	}
	for _, x := range e.Xattrs {
		b = append(b, ' ')
		b = append(b, x.Name...)
		b = append(b, '=')
		b = appendEscaped(b, x.Value)
	}
	return append(b, '\n')
}

// ParseName reads a name as baselines and findings have it, disk0p1:/etc/passwd, with [Escape] where it needs it.
func ParseName(s string) (Name, error) {
	volume, path, ok := strings.Cut(s, ":")
	if !ok {
		return Name{}, fmt.Errorf("%.80q is no name such as disk0p1:/etc", s)
	}
	p, err := Unescape(path)
	if err != nil {
		return Name{}, err
	}
	n := Name{volume, p}
	return n, checkName(n)
}

// lineName reads only the name of a line.
func lineName(line []byte) (Name, error) {
	word, _, _ := bytes.Cut(line, []byte(" "))
	return ParseName(string(word))
}

// parseLine reads a line without its end. What it takes, appendLine writes in the same way, but for numbers with zeros in
// front: [Baseline.Check] compares.
func parseLine(line []byte) (Entry, error) {
	var e Entry
	var err error
	if e.Name, err = lineName(line); err != nil {
		return e, err
	}
	words := strings.Split(string(line), " ")[1:]
	if len(words) < 4 || len(words[0]) != 1 || len(words[1]) != 4 {
		return e, errors.New("no type, permissions, owner and number of names")
	}
	for _, t := range types {
		if t.letter == words[0][0] {
			e.Mode = t.mode
		}
	}
	perm, err := strconv.ParseUint(words[1], 8, 12)
	if err != nil || e.Mode == 0 {
		return e, fmt.Errorf("%q is no type and permissions", words[0]+" "+words[1])
	}
	e.Mode |= uint32(perm)
	if e.UID, e.GID, err = pair(words[2]); err != nil {
		return e, err
	}
	links, err := strconv.ParseUint(words[3], 10, 32)
	if err != nil {
		return e, fmt.Errorf("%.40q is no number of names", words[3])
	}
	e.Links = uint32(links)
	rest, err := e.parseType(words[4:])
	if err != nil {
		return e, err
	}
	for _, w := range rest {
		name, value, ok := strings.Cut(w, "=")
		if !ok {
			return e, fmt.Errorf("%.40q is no extended attribute", w)
		}
		if value, err = Unescape(value); err != nil {
			return e, fmt.Errorf("%.40s: %w", name, err)
		}
		e.Xattrs = append(e.Xattrs, Xattr{name, value})
	}
	return e, checkEntry(&e)
}

// parseType reads what only some types have, and returns the words behind it.
func (e *Entry) parseType(words []string) ([]string, error) {
	need := 0
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		need = 2
	case unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK:
		need = 1
	}
	if len(words) < need {
		return nil, errors.New("it ends too early for its type")
	}
	var err error
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if e.Size, err = strconv.ParseInt(words[0], 10, 64); err != nil {
			return nil, fmt.Errorf("%.40q is no size", words[0])
		}
		if words[1] == noDigest {
			break
		}
		if len(words[1]) != hex.EncodedLen(len(e.Digest)) {
			return nil, fmt.Errorf("%.80q is no digest", words[1])
		}
		if _, err = hex.Decode(e.Digest[:], []byte(words[1])); err != nil {
			return nil, err
		}
	case unix.S_IFLNK:
		target, ok := strings.CutPrefix(words[0], "->")
		if !ok {
			return nil, fmt.Errorf("%.40q is no target", words[0])
		}
		e.Target, err = Unescape(target)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Major, e.Minor, err = pair(words[0])
	}
	return words[need:], err
}

// pair reads two numbers and the colon between.
func pair(s string) (a, b uint32, err error) {
	left, right, _ := strings.Cut(s, ":")
	x, errX := strconv.ParseUint(left, 10, 32)
	y, errY := strconv.ParseUint(right, 10, 32)
	if errX != nil || errY != nil {
		return 0, 0, fmt.Errorf("%.40q is no pair of numbers such as 0:0", s)
	}
	return uint32(x), uint32(y), nil
}
