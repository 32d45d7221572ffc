package audit

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/eintr"
)

// Options of a Writer.
type Options struct {
	// SegmentSize is how large a file grows before the next one begins, in bytes; 0: 16 MiB.
	SegmentSize int64
	// NoSync leaves it to the kernel when records reach the disk: they survive the writer's
	// end, not the machine's. Otherwise a record is on the disk when Append returns, so that no
	// act it stands for is done without it: a privileged act is rare and worth a flush.
	NoSync bool
	// Actor stands in the records that the Writer makes itself.
	Actor Actor
	// Now is the time of these records; nil: time.Now.
	Now func() time.Time
}

// The acts of the Writer's own records.
const (
	ActBegin = "audit-begin" // the first record of a log, with a random number
	ActTorn  = "audit-torn"  // the end of the log was set aside: detail file, bytes, sha256
)

// ErrLocked is a log that another Writer has.
var ErrLocked = errors.New("another process writes this audit log")

// A DamageError is a log that a Writer does not continue.
type DamageError struct{ Finding Finding }

func (e *DamageError) Error() string {
	return fmt.Sprintf("audit log is damaged (%s): keep the directory as evidence and begin another", e.Finding)
}

// A Writer appends to the log of one directory. Its methods may be called concurrently.
type Writer struct {
	dir  string
	opts Options
	lock *os.File

	mu   sync.Mutex
	file *os.File // the last segment
	size int64
	head Head
	hf   *os.File // the head file
	err  error    // what broke the writer for good
}

// Open continues the log in dir, which must exist, or begins it. The last segment is checked; a
// last line that a killed writer left unfinished is moved into a file of its own, of which a
// record tells. Any other damage is a [*DamageError].
func Open(dir string, opts Options) (*Writer, error) {
	if opts.SegmentSize == 0 {
		opts.SegmentSize = 16 << 20
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	w := &Writer{dir: dir, opts: opts}
	if err := w.open(); err != nil {
		w.close()
		return nil, fmt.Errorf("audit log %s: %w", dir, err)
	}
	return w, nil
}

func (w *Writer) open() (err error) {
	if w.lock, err = os.OpenFile(filepath.Join(w.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(w.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return ErrLocked
		}
		return err
	}
	segs, err := segments(w.dir)
	if err != nil {
		return err
	}
	known, err := readHead(w.dir)
	empty := errors.Is(err, errEmptyHead)
	fresh := len(segs) == 0 && (empty || errors.Is(err, os.ErrNotExist))
	if err != nil && !fresh && !empty {
		return &DamageError{Finding{Kind: BadHead, File: headFile, Text: err.Error()}}
	}
	if w.hf, err = os.OpenFile(filepath.Join(w.dir, headFile), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if fresh {
		if err := w.begin(segmentName(1)); err != nil {
			return err
		}
		return w.first()
	}
	if err := w.resume(segs, known); err != nil {
		return err
	}
	if empty && w.head.Seq > 2 { // the first record, and perhaps one of a torn line
		return &DamageError{Finding{Kind: BadHead, File: headFile, Text: errEmptyHead.Error()}}
	}
	return nil
}

// first writes the first record. Without its random number two logs could have the same
// records, and one be taken for the other.
func (w *Writer) first() error {
	if w.head.Seq > 0 {
		return nil
	}
	_, err := w.append(w.own(ActBegin, map[string]string{"log": rand.Text()}))
	return err
}

func (w *Writer) own(act string, detail map[string]string) Entry {
	return Entry{Time: w.opts.Now(), Actor: w.opts.Actor, Act: act, Object: "audit log", Outcome: Done, Detail: detail}
}

// resume continues after the last record of the last segment.
func (w *Writer) resume(segs []segment, known Head) (err error) {
	if len(segs) == 0 {
		return &DamageError{Finding{Kind: TailCut, File: headFile, Text: fmt.Sprintf("record %d is known, there is no log", known.Seq)}}
	}
	last := segs[len(segs)-1]
	if w.file, err = os.OpenFile(filepath.Join(w.dir, last.name), os.O_RDWR|os.O_APPEND, 0); err != nil {
		return err
	}
	start, _ := segmentStart(last.name)
	c := checker{rep: &Report{}, expected: []Head{known}}
	c.last.Seq = start - 1
	if err := w.before(segs, &c); err != nil {
		return err
	}
	c.segment(segment{last.name, last.open}, true)
	var torn *Finding
	for _, f := range c.rep.Findings {
		if f.Kind != TornTail {
			return &DamageError{f}
		}
		torn = &f
	}
	if known.Seq > c.last.Seq || known.Seq >= start && !c.seen(known) {
		return &DamageError{Finding{
			Kind: TailCut, File: last.name, Seq: c.last.Seq + 1,
			Text: fmt.Sprintf("ends with record %d, the head file knows record %d with hash %s", c.last.Seq, known.Seq, known.Hash),
		}}
	}
	w.head = c.last
	st, err := w.file.Stat()
	if err != nil {
		return err
	}
	w.size = st.Size()
	if torn != nil {
		return w.setAside(*torn)
	}
	return w.first()
}

// before gives c the record before the last segment, which its first one continues.
func (w *Writer) before(segs []segment, c *checker) error {
	if len(segs) < 2 {
		return nil
	}
	var last *Record
	var failed error
	yieldRecords(segs[len(segs)-2], func(r *Record, err error) bool {
		if err != nil {
			failed = err
			return false
		}
		last = r
		return true
	})
	if failed != nil || last == nil {
		return &DamageError{Finding{Kind: Edited, File: segs[len(segs)-2].name, Text: fmt.Sprint(failed)}}
	}
	c.last = Head{last.Seq, last.Hash}
	if c.expected[0] == c.last {
		c.met = append(c.met, c.last)
	}
	return nil
}

// setAside moves the bytes of an unfinished line into a file of their own. Killed in between, it
// is done again: the line goes only after its copy is on the disk.
func (w *Writer) setAside(torn Finding) error {
	b := make([]byte, w.size-torn.Offset)
	if _, err := w.file.ReadAt(b, torn.Offset); err != nil {
		return err
	}
	name := fmt.Sprintf("torn-%020d", torn.Seq)
	f, err := os.OpenFile(filepath.Join(w.dir, name), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := w.syncDir(); err != nil {
		return err
	}
	if err := w.file.Truncate(torn.Offset); err != nil {
		return err
	}
	w.size = torn.Offset
	if err := w.first(); err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	_, err = w.append(w.own(ActTorn, map[string]string{
		"file": name, "bytes": strconv.Itoa(len(b)), "sha256": hex.EncodeToString(sum[:]),
	}))
	return err
}

// begin makes a new segment.
func (w *Writer) begin(name string) error {
	f, err := os.OpenFile(filepath.Join(w.dir, name), os.O_CREATE|os.O_EXCL|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if w.file != nil {
		w.file.Close()
	}
	w.file, w.size = f, 0
	return w.syncDir()
}

func (w *Writer) syncDir() error {
	d, err := os.Open(w.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Append adds records, in order, and returns the head that names the last of them. They are
// flushed together. After an error of the disk the Writer takes no more: nobody can say how much
// of a record is there.
func (w *Writer) Append(entries ...Entry) (Head, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h, err := w.append(entries...)
	if err != nil {
		return h, fmt.Errorf("audit log %s: %w", w.dir, err)
	}
	return h, nil
}

func (w *Writer) append(entries ...Entry) (Head, error) {
	if w.err != nil {
		return Head{}, w.err
	}
	// What cannot be written at all is refused before anything is.
	head := w.head
	lines := make([][]byte, len(entries))
	for i, e := range entries {
		e.Time = e.Time.UTC().Round(0) // without its monotonic part, which the log cannot hold
		if err := e.check(); err != nil {
			return Head{}, err
		}
		r := &Record{Seq: head.Seq + 1, Entry: e, Prev: head.Hash}
		if len(e.Detail) == 0 {
			r.Detail = nil
		}
		r.Hash = r.sum()
		var err error
		if lines[i], err = r.encode(); err != nil {
			return Head{}, err
		}
		head = Head{r.Seq, r.Hash}
	}
	for i, line := range lines {
		if w.err = w.write(w.head.Seq+uint64(i)+1, line); w.err != nil {
			return Head{}, w.err
		}
	}
	if w.err = w.sync(); w.err != nil {
		return Head{}, w.err
	}
	w.head = head
	if _, w.err = w.hf.WriteAt(w.head.Line(), 0); w.err != nil {
		return Head{}, w.err
	}
	return w.head, nil
}

// write adds a line, to another segment where this one is full.
func (w *Writer) write(seq uint64, line []byte) error {
	if w.size > 0 && w.size+int64(len(line)) > w.opts.SegmentSize {
		if err := w.sync(); err != nil {
			return err
		}
		if err := w.begin(segmentName(seq)); err != nil {
			return err
		}
	}
	n, err := w.file.Write(line)
	w.size += int64(n)
	return err
}

func (w *Writer) sync() error {
	if w.opts.NoSync {
		return nil
	}
	return eintr.Call(func() error { return unix.Fdatasync(int(w.file.Fd())) })
}

// Head names the last record.
func (w *Writer) Head() Head {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.head
}

// Err is why the writer takes no more, nil while it does.
func (w *Writer) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Close ends the writer; the log is whole at any time, so there is nothing to finish.
func (w *Writer) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = os.ErrClosed
	w.close()
}

func (w *Writer) close() {
	for _, f := range []*os.File{w.file, w.hf, w.lock} {
		if f != nil {
			f.Close()
		}
	}
}
