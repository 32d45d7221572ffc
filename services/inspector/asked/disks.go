package asked

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"redoubt.dev/redoubt/audit"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/job"
	"redoubt.dev/redoubt/services/protocol"
)

// ScanLimit is what an inspector may take to read a guest's disks.
const ScanLimit = 30 * time.Minute

// A Scanner has guests' disks read.
type Scanner struct {
	job.Runner
	slots chan struct{}
}

// NewScanner makes one.
func NewScanner(j *audit.Journal, start func(guest string) (*process.Process, error)) *Scanner {
	return &Scanner{
		job.Runner{Service: services.Inspector, Journal: j, Start: start, Limit: ScanLimit, Detail: []string{"disks", "read-only"}},
		make(chan struct{}, most),
	}
}

// A Disk is one as it was at its guest's snapshot: descriptors by which nothing can be changed.
type Disk struct {
	Index    int
	Scratch  int64    // of the snapshot, in bytes
	Image    *os.File // required
	Base     *os.File // of an overlay, else nil
	Changes  *os.File // nil of a disk that the guest cannot write, and so is Snapshot
	Snapshot *os.File
}

// CloseDisks closes all that disks have.
func CloseDisks(disks []Disk) {
	for _, d := range disks {
		for _, f := range []*os.File{d.Image, d.Base, d.Changes, d.Snapshot} {
			if f != nil {
				f.Close()
			}
		}
	}
}

// A Text is bytes in memory that is handed on, never read here: File is nil for none.
type Text struct {
	File *os.File
	Size int
}

// Close closes it.
func (t *Text) Close() {
	if t.File != nil {
		t.File.Close()
	}
	*t = Text{}
}

// A Scan is what is asked of an inspector; see protocol.Scan.
type Scan struct {
	Guest    string
	Draft    bool
	Created  time.Time
	Accept   []string
	Changed  bool // the maps of changes are since the scan that left Index
	Index    Text
	Last     Text
	Baseline Text
	Rules    Text
	Listing  Text           // what the guest shows of its files; none: nobody asked
	Seen     *protocol.Seen // what it is, then
}

// An Answer is what came of it. Index and Answer are the caller's to close.
type Answer struct {
	protocol.Scanned
	Index  Text
	Answer Text
}

// Scan has an inspector of its own read a guest's disks, which it closes.
func (s *Scanner) Scan(ctx context.Context, name string, disks []Disk, q Scan) (out Answer, err error) {
	defer CloseDisks(disks)
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return out, ctx.Err()
	}
	defer func() {
		if err != nil {
			out.Index.Close()
			out.Answer.Close()
		}
	}()
	if out.Index.File, err = memfd.New("index", protocol.MaxIndex); err != nil {
		return out, err
	}
	if out.Answer.File, err = memfd.New("answer", protocol.MaxAnswer); err != nil {
		return out, err
	}
	in := protocol.Scan{
		Guest: q.Guest, Draft: q.Draft, Created: q.Created, Accept: q.Accept, Changed: q.Changed,
		Index: q.Index.Size, Last: q.Last.Size, Baseline: q.Baseline.Size, Rules: q.Rules.Size, Seen: q.Seen,
		Files: protocol.Files{protocol.FileNewIndex, protocol.FileAnswer},
	}
	give := []*os.File{out.Index.File, out.Answer.File}
	var read []*os.File
	defer func() { ipc.CloseAll(read) }()
	for _, t := range []struct {
		name string
		of   Text
	}{{protocol.FileIndex, q.Index}, {protocol.FileLast, q.Last}, {protocol.FileBaseline, q.Baseline}, {protocol.FileRules, q.Rules}, {protocol.FileSeen, q.Listing}} {
		if t.of.File == nil {
			continue
		}
		f, err := memfd.ReadOnly(t.of.File)
		if err != nil {
			return out, err
		}
		read = append(read, f)
		in.Files, give = append(in.Files, t.name), append(give, f)
	}
	err = s.Run(ctx, name, func(ctx context.Context, peer *rpc.Peer) error {
		for _, d := range disks {
			if err := d.give(ctx, peer); err != nil {
				return err
			}
		}
		_, err := peer.Call(ctx, protocol.MethodScan, in, &out.Scanned, give...)
		return err
	})
	if err == nil && (out.Scanned.Index < 0 || out.Scanned.Index > protocol.MaxIndex || out.Scanned.Answer < 0 || out.Scanned.Answer > protocol.MaxAnswer) {
		err = fmt.Errorf("%s: an index of %d bytes, an answer of %d", services.Inspector, out.Scanned.Index, out.Scanned.Answer)
	}
	if err != nil && !errors.Is(err, job.ErrDied) && ctx.Err() == nil { // its own words
		err = rpc.Errorf(rpc.KindOf(err), "%.*s", maxWords, err.Error())
	}
	out.Index.Size, out.Answer.Size = out.Scanned.Index, out.Scanned.Answer
	return out, err
}

// maxWords bounds what an inspector may say in place of an answer, in characters.
const maxWords = 512

func (d *Disk) give(ctx context.Context, peer *rpc.Peer) error {
	in := protocol.ViewDisk{Index: d.Index, Scratch: d.Scratch}
	var files []*os.File
	for _, f := range []struct {
		name string
		file *os.File
	}{{protocol.FileDisk, d.Image}, {protocol.FileBase, d.Base}, {protocol.FileChanges, d.Changes}, {protocol.FileSnapshot, d.Snapshot}} {
		if f.file != nil {
			in.Files, files = append(in.Files, f.name), append(files, f.file)
		}
	}
	_, err := peer.Call(ctx, protocol.MethodViewDisk, in, nil, files...)
	return err
}
