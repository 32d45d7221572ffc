package ima

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Bounds of an allowlist.
const (
	MaxAllow   = 32 << 20 // bytes of its file
	maxAllowed = 1 << 19  // lines
)

// An Allowlist says which files may be measured, by digest, and where it names one by path, too.
type Allowlist struct{ paths map[string][]string } // by ALGORITHM:DIGEST; "" is any path

// ParseAllowlist reads lines as sha256sum(1) writes them: a digest, with its algorithm and a colon before it where it is not
// what its length says, and the file's path; without one, any. Empty lines and those that begin with # are not looked at.
func ParseAllowlist(b []byte) (*Allowlist, error) {
	if len(b) > MaxAllow {
		return nil, fmt.Errorf("an allowlist of %d bytes: the most is %d", len(b), MaxAllow)
	}
	a := &Allowlist{map[string][]string{}}
	s := bufio.NewScanner(bytes.NewReader(b))
	s.Buffer(nil, MaxData)
	n := 0
	for line := 1; s.Scan(); line++ {
		text := strings.TrimRight(s.Text(), " \t\r")
		if text == "" || text[0] == '#' {
			continue
		}
		if n++; n > maxAllowed {
			return nil, fmt.Errorf("line %d: more than %d files", line, maxAllowed)
		}
		if err := a.Add(text); err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, errors.New("it names no file: nothing could ever be allowed")
	}
	return a, nil
}

// byLength are the algorithms that a digest's length tells.
var byLength = map[int]string{20: "sha1", 32: "sha256", 48: "sha384", 64: "sha512"}

// Add allows what one line says.
func (a *Allowlist) Add(text string) error {
	digest, path, _ := strings.Cut(text, " ")
	path = strings.TrimPrefix(strings.TrimLeft(path, " "), "*") // sha256sum --binary
	algorithm, sum, given := strings.Cut(digest, ":")
	if !given {
		sum = algorithm
	}
	b, err := hex.DecodeString(sum)
	if !given {
		algorithm = byLength[len(b)]
	}
	if err != nil || len(b) == 0 || algorithm == "" {
		return fmt.Errorf("%q is no digest: use a line of sha256sum, or ALGORITHM:DIGEST  PATH", clip(digest))
	}
	if a.paths == nil {
		a.paths = map[string][]string{}
	}
	key := algorithm + ":" + hex.EncodeToString(b)
	if !slices.Contains(a.paths[key], path) {
		a.paths[key] = append(a.paths[key], path)
	}
	return nil
}

// Merge allows what another list allows, too.
func (a *Allowlist) Merge(other *Allowlist) {
	for key, paths := range other.paths {
		a.paths[key] = append(a.paths[key], paths...)
	}
}

// ID is the same for lists that allow the same.
func (a *Allowlist) ID() []byte {
	if a == nil {
		return nil
	}
	var lines []string
	for key, paths := range a.paths {
		for _, p := range paths {
			lines = append(lines, key+" "+p)
		}
	}
	slices.Sort(lines)
	h := sha256.New()
	for _, l := range slices.Compact(lines) {
		fmt.Fprintf(h, "%d %s\n", len(l), l)
	}
	return h.Sum(nil)
}

// Check is the first entry that may not be there, the number of which counts from first on. The list's own first is not
// looked at: it stands for the registers of the boot, which have a policy of their own. What the kernel says that it
// read while somebody wrote (a violation) is allowed by nothing.
func (a *Allowlist) Check(entries []Entry, first int) error {
	for i := range entries {
		e := &entries[i]
		if e.PCR != PCR || first+i == 1 {
			continue
		}
		f, err := e.File()
		if err != nil {
			return fmt.Errorf("entry %d: %w", first+i, err)
		}
		if e.Violation() {
			return fmt.Errorf("entry %d: %q was read while it was written: nothing says what was read", first+i, clip(f.Path))
		}
		key := fmt.Sprintf("%s:%x", f.Algorithm, f.Digest)
		if paths := a.paths[key]; !slices.Contains(paths, f.Path) && !slices.Contains(paths, "") {
			return fmt.Errorf("entry %d: %q, %s, is not in the allowlist", first+i, clip(f.Path), clip(key))
		}
	}
	return nil
}

// Allow is the allowlist that takes exactly these entries of a list, from its first on, as a file's lines.
func Allow(entries []Entry) []byte {
	var lines []string
	for i := range entries {
		f, err := entries[i].File()
		if i == 0 || err != nil || entries[i].Violation() || entries[i].PCR != PCR || f.Path == "" || strings.ContainsAny(f.Path, "\n\r") {
			continue
		}
		lines = append(lines, f.String()+"\n")
	}
	slices.Sort(lines)
	return []byte(strings.Join(slices.Compact(lines), ""))
}
