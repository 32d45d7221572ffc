package crossview

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Bounds of a listing.
const (
	MaxListing = 32 << 20 // bytes
	MaxNames   = 2 << 20
	maxPath    = 64 << 10 // bytes
)

// ErrListing says that bytes are no listing, or not a whole one.
var ErrListing = errors.New("no listing as `find / -xdev -print0` makes it")

// A Listing is the names that a guest shows of its root file system. It does not change.
type Listing struct {
	names []string // sorted, each once
}

// Parse reads a listing: absolute paths, each ended by a zero byte, or by a newline where there is no zero byte at all. It may come
// from anybody: errors name the byte and are [ErrListing].
func Parse(b []byte) (*Listing, error) {
	if len(b) > MaxListing {
		return nil, fmt.Errorf("%w: %d bytes: the most is %d", ErrListing, len(b), MaxListing)
	}
	end := byte(0)
	if bytes.IndexByte(b, 0) < 0 {
		end = '\n'
	}
	if len(b) == 0 || b[len(b)-1] != end {
		return nil, fmt.Errorf("%w: byte %d: the last name has no end: it was cut off", ErrListing, len(b))
	}
	count := bytes.Count(b, []byte{end})
	if count > MaxNames {
		return nil, fmt.Errorf("%w: %d names: the most is %d", ErrListing, count, MaxNames)
	}
	l := &Listing{names: make([]string, 0, count)}
	for text, at := string(b), 0; at < len(text); {
		length := strings.IndexByte(text[at:], end)
		name := text[at : at+length]
		if err := checkName(name); err != nil {
			return nil, fmt.Errorf("%w: byte %d: %.40q: %w", ErrListing, at, name, err)
		}
		l.names = append(l.names, name)
		at += length + 1
	}
	slices.Sort(l.names)
	l.names = slices.Compact(l.names)
	if l.names[0] != "/" {
		return nil, fmt.Errorf("%w: the root is not in it: begin at /", ErrListing)
	}
	return l, nil
}

func checkName(name string) error {
	switch {
	case len(name) > maxPath:
		return fmt.Errorf("%d bytes: the most is %d", len(name), maxPath)
	case name == "/":
		return nil
	case !strings.HasPrefix(name, "/"):
		return errors.New("no absolute path (a name with a newline needs -print0)")
	}
	for part := range strings.SplitSeq(name[1:], "/") {
		if part == "" || part == "." || part == ".." {
			return errors.New("a path with an empty part, or with . or .. as one")
		}
	}
	return nil
}

// Len is how many names it has.
func (l *Listing) Len() int { return len(l.names) }

// find is a name as the listing has it.
func (l *Listing) find(path []byte) (string, bool) {
	i, ok := slices.BinarySearchFunc(l.names, path, func(name string, path []byte) int {
		return strings.Compare(name, string(path))
	})
	if !ok {
		return "", false
	}
	return l.names[i], true
}

// below reports whether anything in a directory is in the listing.
func (l *Listing) below(dir string) bool {
	prefix := strings.TrimSuffix(dir, "/") + "/"
	i, ok := slices.BinarySearch(l.names, prefix)
	if ok { // the root itself
		i++
	}
	return i < len(l.names) && strings.HasPrefix(l.names[i], prefix)
}
