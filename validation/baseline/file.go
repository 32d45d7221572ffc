package baseline

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"iter"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"time"
)

// A baseline file is text:
//
//	redoubt-baseline 1
//	guest 7b8e1c52-6f0c-4a52-9f5e-0d6c1f2b3a49
//	version 3
//	created 2026-03-01T12:00:00Z
//	rules 2
//	rules:
//	  …
//	disk0p1:/bin l 0777 0:0 1 ->usr/bin
//	…
//	entries 41210
//	signature: ed25519 93a1b2c3d4e5f607 …
//
// The rules are in it, in their canonical form of so many lines, and so signed with it. The entries' number is behind
// them: a file that ends early is none, and it can be written as a scan goes. The last line is there once it is signed.

// Bounds of a baseline file.
const (
	MaxFile    = 256 << 20 // bytes
	MaxEntries = 4 << 20
	maxHeader  = 512 // bytes, without rules
	maxTrailer = 512 // bytes of the last lines
)

const magic = "redoubt-baseline 1\n"

// ErrFormat is a file that is no baseline, or is damaged.
var ErrFormat = errors.New("not a baseline file")

// ErrUnsorted is what entries are whose names do not ascend.
var ErrUnsorted = errors.New("entries are not sorted")

func malformed(offset int, format string, args ...any) error {
	return fmt.Errorf("%w: byte %d: %w", ErrFormat, offset, fmt.Errorf(format, args...))
}

// A Header is what a baseline says of itself.
type Header struct {
	Guest   string    // the guest's UUID, in lower case
	Version uint64    // 1 for a guest's first baseline, one more for each that follows
	Created time.Time // to the second
	Rules   *Rules
}

var guestUUID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func (h *Header) check() error {
	switch {
	case !guestUUID.MatchString(h.Guest):
		return fmt.Errorf("guest: %.80q is no UUID in lower case", h.Guest)
	case h.Version == 0:
		return errors.New("version: the first one is 1")
	case h.Created.Year() < 1970 || h.Created.Year() > 9999:
		return fmt.Errorf("created: the year %d", h.Created.Year())
	case h.Rules == nil:
		return errors.New("rules: it has none")
	}
	return nil
}

func (h *Header) encode() []byte {
	lines := bytes.Count(h.Rules.canonical, []byte("\n"))
	b := fmt.Appendf(nil, "%sguest %s\nversion %d\ncreated %s\nrules %d\n", magic, h.Guest, h.Version, h.Created.UTC().Format(time.RFC3339), lines)
	return append(b, h.Rules.canonical...)
}

// Write writes a draft: a baseline that is not signed. Entries must ascend by name and be as their rule has them, see
// [Rules.Kept]; others are refused.
func Write(w io.Writer, h Header, entries iter.Seq[Entry]) error {
	if err := h.check(); err != nil {
		return err
	}
	out := h.encode()
	total, count := 0, 0
	var last Name
	flush := func() error {
		total += len(out)
		if total > MaxFile {
			return fmt.Errorf("a baseline of more than %d bytes: have the rules match less", MaxFile)
		}
		_, err := w.Write(out)
		out = out[:0]
		return err
	}
	var line []byte
	for e := range entries {
		if count > 0 && last.Compare(e.Name) >= 0 {
			return fmt.Errorf("%w: %s after %s", ErrUnsorted, e.escaped(), last.escaped())
		}
		last = e.Name
		if count++; count > MaxEntries {
			return fmt.Errorf("more than %d entries: have the rules match less", MaxEntries)
		}
		var err error
		if line, err = lineOf(line[:0], &e, h.Rules); err != nil {
			return fmt.Errorf("%s: %w", e.escaped(), err)
		}
		if out = append(out, line...); len(out) > 64<<10 {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	out = fmt.Appendf(out, "entries %d\n", count)
	return flush()
}

// lineOf makes a line of an entry that is right.
func lineOf(b []byte, e *Entry, rules *Rules) ([]byte, error) {
	if err := checkEntry(e); err != nil {
		return nil, err
	}
	b = appendLine(b, e)
	if len(b) > maxLine {
		return nil, fmt.Errorf("a line of %d bytes: the most is %d", len(b), maxLine)
	}
	i, check := rules.rule(e)
	if i < 0 {
		return nil, errors.New("no rule matches it")
	}
	if kept, _ := rules.Reduce(*e); !same(&kept, e) {
		return nil, errors.New("it has what its rule does not check")
	}
	if check&Content != 0 && e.Digest == (Digest{}) {
		return nil, errors.New("it has no digest, and its rule checks contents")
	}
	return b, nil
}

// escaped is the name in printable letters.
func (n Name) escaped() string { return n.Volume + ":" + Escape(n.Path) }

// A Baseline is what is known of the files of a guest. It reads from the bytes that it was opened of, which must not
// change, and may be used by several goroutines.
type Baseline struct {
	Header
	file      []byte // whole
	from, to  int    // where the entries are
	count     int
	signature []byte // the last line, if it is signed
}

// Open opens a baseline file, signed or not. It reads header and end only: see [Verify] for who made it, and
// [Baseline.Check] for whether all of it is right.
func Open(file []byte) (*Baseline, error) {
	if len(file) > MaxFile+maxTrailer {
		return nil, fmt.Errorf("%w: %d bytes: the most is %d", ErrFormat, len(file), MaxFile)
	}
	b := &Baseline{file: file}
	if err := b.openHeader(); err != nil {
		return nil, err
	}
	return b, b.openEnd()
}

func (b *Baseline) openHeader() error {
	rest, ok := bytes.CutPrefix(b.file, []byte(magic))
	if !ok {
		return malformed(0, "it does not begin with %q", strings.TrimSpace(magic))
	}
	at := len(magic)
	field := func(name string) (string, error) {
		line, _, ok := bytes.Cut(rest[:min(len(rest), maxHeader)], []byte("\n"))
		value, found := strings.CutPrefix(string(line), name+" ")
		if !ok || !found {
			return "", malformed(at, "no line %q", name+" …")
		}
		at += len(line) + 1
		rest = rest[len(line)+1:]
		return value, nil
	}
	var values [4]string
	for i, name := range []string{"guest", "version", "created", "rules"} {
		var err error
		if values[i], err = field(name); err != nil {
			return err
		}
	}
	version, errVersion := strconv.ParseUint(values[1], 10, 64)
	created, errCreated := time.Parse(time.RFC3339, values[2])
	lines, errLines := strconv.ParseUint(values[3], 10, 32)
	if err := cmp.Or(errVersion, errCreated, errLines); err != nil {
		return malformed(0, "version, created or rules: %w", err)
	}
	end := nthLine(rest[:min(len(rest), MaxRulesFile)], lines)
	if end < 0 {
		return malformed(at, "rules: fewer than %d lines, or more than %d bytes", lines, MaxRulesFile)
	}
	rules, err := ParseRules(rest[:end])
	if err != nil {
		return malformed(at, "rules: %w", err)
	}
	b.Header = Header{Guest: values[0], Version: version, Created: created, Rules: rules}
	if err := b.check(); err != nil {
		return malformed(0, "%w", err)
	}
	b.from = at + end
	if !bytes.Equal(b.encode(), b.file[:b.from]) {
		return malformed(0, "the header is not in its canonical form")
	}
	return nil
}

// nthLine is where n lines end, -1 if there are not so many.
func nthLine(b []byte, n uint64) int {
	end := 0
	for ; n > 0; n-- {
		i := bytes.IndexByte(b[end:], '\n')
		if i < 0 {
			return -1
		}
		end += i + 1
	}
	return end
}

func (b *Baseline) openEnd() error {
	body, line, err := splitSignature(b.file)
	if err != nil {
		return err
	}
	b.signature = line
	if len(body) < b.from || len(body) > MaxFile {
		return malformed(len(body), "it ends too early, or has more than %d bytes", MaxFile)
	}
	last := lastLine(body[b.from:])
	b.to = len(body) - len(last)
	value, ok := strings.CutPrefix(strings.TrimSuffix(string(last), "\n"), "entries ")
	n, err := strconv.ParseUint(value, 10, 32)
	if !ok || err != nil || string(last) != fmt.Sprintf("entries %d\n", n) {
		return malformed(b.to, "no line \"entries …\": it is cut off")
	}
	if n > MaxEntries || (b.to-b.from)/minLine < int(n) {
		return malformed(b.to, "%d entries in %d bytes", n, b.to-b.from)
	}
	b.count = int(n)
	return nil
}

// lastLine is the last line with its end, of no more bytes than a trailer has; empty if there is none.
func lastLine(b []byte) []byte {
	tail := b[max(0, len(b)-maxTrailer):]
	if len(tail) == 0 || tail[len(tail)-1] != '\n' {
		return nil
	}
	i := bytes.LastIndexByte(tail[:len(tail)-1], '\n')
	if i < 0 && len(tail) < len(b) {
		return nil
	}
	return tail[i+1:]
}

// Len is the number of entries, as the file says.
func (b *Baseline) Len() int { return b.count }

// Signed reports whether there is a signature; whose, and whether it is right, says [Verify].
func (b *Baseline) Signed() bool { return b.signature != nil }

// line is the line at an offset, without its end, and where the next one begins.
func (b *Baseline) line(at int) ([]byte, int, error) {
	end := bytes.IndexByte(b.file[at:min(b.to, at+maxLine)], '\n')
	if end < 0 {
		return nil, 0, malformed(at, "a line of more than %d bytes", maxLine)
	}
	return b.file[at : at+end], at + end + 1, nil
}

// Lookup finds an entry by its name, by a binary search in the file. If the entries are not sorted, see [Baseline.Check],
// it may not find it.
func (b *Baseline) Lookup(n Name) (Entry, bool, error) {
	var failed error
	begin := func(at int) int { // of the line that a byte is in
		low := max(b.from, at-maxLine)
		return low + bytes.LastIndexByte(b.file[low:at], '\n') + 1
	}
	// The first byte whose line is not before n.
	at := b.from + sort.Search(b.to-b.from, func(i int) bool {
		if failed != nil {
			return true
		}
		from := begin(b.from + i)
		line, _, err := b.line(from)
		var name Name
		if err == nil {
			name, err = lineName(line)
		}
		if err != nil {
			failed = malformed(from, "%w", err)
			return true
		}
		return name.Compare(n) >= 0
	})
	if failed != nil || at == b.to {
		return Entry{}, false, failed
	}
	e, err := b.entry(begin(at))
	if err != nil || e.Name != n {
		return Entry{}, false, err
	}
	return e, true, nil
}

func (b *Baseline) entry(at int) (Entry, error) {
	line, _, err := b.line(at)
	if err != nil {
		return Entry{}, err
	}
	e, err := parseLine(line)
	if err != nil {
		return Entry{}, malformed(at, "%w", err)
	}
	return e, nil
}

// All yields the entries in their order; an error ends them. That names do not ascend is one.
func (b *Baseline) All() iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		var last Name
		for at := b.from; at < b.to; {
			_, next, err := b.line(at)
			var e Entry
			if err == nil {
				e, err = b.entry(at)
			}
			if err == nil && at > b.from && last.Compare(e.Name) >= 0 {
				err = malformed(at, "%w", ErrUnsorted)
			}
			if !yield(e, err) || err != nil {
				return
			}
			at, last = next, e.Name
		}
	}
}

// Check reads everything and says what is wrong: that a line is damaged or not in its canonical form, entries that are not
// sorted or not so many, an entry that the rules do not match or that has what they do not check.
func (b *Baseline) Check() error {
	count, at := 0, b.from
	var line []byte
	for e, err := range b.All() {
		if err != nil {
			return err
		}
		if line, err = lineOf(line[:0], &e, b.Rules); err != nil {
			return malformed(at, "%w", err)
		}
		if !bytes.HasPrefix(b.file[at:b.to], line) {
			return malformed(at, "a line that is not in its canonical form")
		}
		at += len(line)
		count++
	}
	if count != b.count {
		return malformed(b.to, "%d entries, not %d", count, b.count)
	}
	return nil
}
