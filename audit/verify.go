package audit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A Kind is a kind of damage.
type Kind string

// The kinds of damage.
const (
	Edited    Kind = "edited"     // a line is not what was written there
	Missing   Kind = "missing"    // records are gone between two others, or at the start
	Reordered Kind = "reordered"  // a record stands where it was not written, or stands twice
	Rewritten Kind = "rewritten"  // a record does not continue the one before it
	TornTail  Kind = "torn tail"  // the last line has no end: a write was cut short
	TailCut   Kind = "tail cut"   // a head is known that the log does not reach
	WrongHead Kind = "other log"  // the log has another record where a head is known
	BadHead   Kind = "head file"  // the head file beside the log is no head
	Unread    Kind = "unreadable" // a file could not be read
)

// A Finding is one damage and its place.
type Finding struct {
	Kind   Kind
	File   string // of the log's directory
	Line   int    // from 1; 0: the file as a whole
	Offset int64  // of the line in the file, in bytes
	Seq    uint64 // of the record concerned, as far as is known
	Text   string
}

func (f Finding) String() string {
	place := f.File
	if f.Line > 0 {
		place += fmt.Sprintf(", line %d (byte %d)", f.Line, f.Offset)
	}
	return fmt.Sprintf("%s: %s: %s", place, f.Kind, f.Text)
}

// A Report is what Verify found.
type Report struct {
	Records  uint64
	Head     Head // of the last good record
	Findings []Finding
}

// maxFindings bounds a report about a log that is damaged all over.
const maxFindings = 1000

// A segment is a file of a log.
type segment struct {
	name string
	open func() (io.ReadCloser, error)
}

// headFile keeps the newest head beside the log.
const headFile = "head"

// segmentName is the name of the file that begins with record seq.
func segmentName(seq uint64) string { return fmt.Sprintf("%020d.log", seq) }

// segmentStart is the inverse of segmentName.
func segmentStart(name string) (uint64, bool) {
	n, err := strconv.ParseUint(strings.TrimSuffix(name, ".log"), 10, 64)
	return n, err == nil && segmentName(n) == name
}

// segments are the files of a log in order.
func segments(dir string) ([]segment, error) {
	entries, err := os.ReadDir(dir) // sorted by name, and so by number
	if err != nil {
		return nil, err
	}
	var out []segment
	for _, e := range entries {
		if _, ok := segmentStart(e.Name()); ok {
			path := filepath.Join(dir, e.Name())
			out = append(out, segment{e.Name(), func() (io.ReadCloser, error) { return os.Open(path) }})
		}
	}
	return out, nil
}

// Verify checks the log in dir as a whole. expected are heads that were kept elsewhere; the head
// file beside the log counts as one. The error is about reading, not about damage.
func Verify(dir string, expected ...Head) (Report, error) {
	segs, err := segments(dir)
	if err != nil {
		return Report{}, fmt.Errorf("audit log: %w", err)
	}
	var bad *Finding
	head, err := readHead(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if len(segs) > 0 {
			bad = &Finding{Kind: BadHead, File: headFile, Text: "is not there"}
		}
	case err != nil:
		bad = &Finding{Kind: BadHead, File: headFile, Text: err.Error()}
	default:
		expected = append(slices.Clip(expected), head)
	}
	r := check(segs, expected)
	if errors.Is(err, errEmptyHead) && r.Head.Seq <= 1 {
		bad = nil // a writer was killed in its first record
	}
	if bad != nil {
		r.add(*bad)
	}
	return r, nil
}

func (r *Report) add(f Finding) {
	if len(r.Findings) < maxFindings {
		r.Findings = append(r.Findings, f)
	}
}

// check is Verify without a directory.
func check(segs []segment, expected []Head) (rep Report) {
	c := checker{rep: &rep, expected: expected}
	for i, s := range segs {
		c.segment(s, i == len(segs)-1)
	}
	for _, h := range expected {
		switch {
		case h.Seq > c.last.Seq:
			rep.add(Finding{
				Kind: TailCut, File: lastName(segs), Seq: c.last.Seq + 1,
				Text: fmt.Sprintf("ends with record %d, record %d is known", c.last.Seq, h.Seq),
			})
		case !c.seen(h) && h.Seq > 0:
			rep.add(Finding{
				Kind: WrongHead, File: lastName(segs), Seq: h.Seq,
				Text: fmt.Sprintf("record %d is not the known one with hash %s", h.Seq, h.Hash),
			})
		}
	}
	rep.Head = c.last
	return rep
}

func lastName(segs []segment) string {
	if len(segs) == 0 {
		return segmentName(1)
	}
	return segs[len(segs)-1].name
}

type checker struct {
	rep      *Report
	expected []Head
	met      []Head // of expected, those found
	last     Head   // the record before
}

func (c *checker) seen(h Head) bool { return slices.Contains(c.met, h) }

func (c *checker) segment(s segment, isLast bool) {
	f, err := s.open()
	if err != nil {
		c.rep.add(Finding{Kind: Unread, File: s.name, Text: err.Error()})
		return
	}
	defer func() { _ = f.Close() }()
	for l, err := range readLines(f) {
		at := Finding{File: s.name, Line: l.number, Offset: l.offset, Seq: c.last.Seq + 1}
		switch {
		case errors.Is(err, errTorn) && isLast:
			at.Kind, at.Text = TornTail, fmt.Sprintf("%d bytes without an end of line", len(l.text))
		case errors.Is(err, errTorn), errors.Is(err, errLong):
			at.Kind, at.Text = Edited, err.Error()
		case err != nil:
			at.Kind, at.Text = Unread, err.Error()
		default:
			c.line(at, l.text, l.number == 1)
			continue
		}
		c.rep.add(at)
		if !errors.Is(err, errLong) {
			return
		}
	}
}

// line judges one line. After damage it goes on from the record at hand, so that one damage is
// one finding, or two where it breaks the chain on both sides.
func (c *checker) line(at Finding, text []byte, first bool) {
	r, err := parse(text)
	if err != nil {
		at.Kind, at.Text = Edited, err.Error()
		c.rep.add(at)
		return
	}
	at.Seq = r.Seq
	switch {
	case r.Seq > c.last.Seq+1:
		at.Kind, at.Text = Missing, fmt.Sprintf("records %d to %d are not there", c.last.Seq+1, r.Seq-1)
		c.rep.add(at)
	case r.Seq <= c.last.Seq:
		at.Kind, at.Text = Reordered, fmt.Sprintf("record %d stands after record %d", r.Seq, c.last.Seq)
		c.rep.add(at)
	case r.Prev != c.last.Hash:
		at.Kind, at.Text = Rewritten, fmt.Sprintf("does not continue record %d as it stands here", c.last.Seq)
		c.rep.add(at)
	case first && at.File != segmentName(r.Seq):
		at.Kind, at.Text = Edited, fmt.Sprintf("the file begins with record %d and is not named after it", r.Seq)
		c.rep.add(at)
	}
	c.rep.Records++
	c.last = Head{r.Seq, r.Hash}
	if slices.Contains(c.expected, c.last) {
		c.met = append(c.met, c.last)
	}
}

// line of a file.
type line struct {
	number int
	offset int64
	text   []byte // without the newline; valid until the next one
}

var (
	errTorn = errors.New("the last line has no end")
	errLong = fmt.Errorf("longer than %d bytes", MaxLine)
)

// readLines yields the lines of a file with bounded memory. A line that is too long is passed
// over; a last line without its end, or a failure to read, ends it.
func readLines(f io.Reader) iter.Seq2[line, error] {
	return func(yield func(line, error) bool) {
		b := bufio.NewReaderSize(f, MaxLine)
		l := line{}
		for {
			l.number++
			text, err := b.ReadSlice('\n')
			n := int64(len(text))
			switch {
			case err == nil:
				l.text = text[:len(text)-1]
			case errors.Is(err, io.EOF):
				if n == 0 {
					return
				}
				l.text = text
				yield(l, errTorn)
				return
			case errors.Is(err, bufio.ErrBufferFull):
				for errors.Is(err, bufio.ErrBufferFull) {
					text, err = b.ReadSlice('\n')
					n += int64(len(text))
				}
				l.text = nil
				if !yield(l, errLong) || err != nil {
					return
				}
				l.offset += n
				continue
			default:
				yield(l, err)
				return
			}
			if !yield(l, nil) {
				return
			}
			l.offset += n
		}
	}
}

// Records yields the records of the log in dir in order; it ends with an error at the first line
// that is damaged in itself. It does not check the chain: see Verify.
func Records(dir string) iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		segs, err := segments(dir)
		if err != nil {
			yield(nil, fmt.Errorf("audit log: %w", err))
			return
		}
		for _, s := range segs {
			if !yieldRecords(s, yield) {
				return
			}
		}
	}
}

func yieldRecords(s segment, yield func(*Record, error) bool) bool {
	f, err := s.open()
	if err != nil {
		yield(nil, fmt.Errorf("audit log: %w", err))
		return false
	}
	defer func() { _ = f.Close() }()
	for l, err := range readLines(f) {
		var r *Record
		if err == nil {
			r, err = parse(l.text)
		}
		if err != nil {
			yield(nil, fmt.Errorf("audit log: %s, line %d (byte %d): %w", s.name, l.number, l.offset, err))
			return false
		}
		if !yield(r, nil) {
			return false
		}
	}
	return true
}
