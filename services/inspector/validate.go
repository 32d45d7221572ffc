package inspector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"redoubt.dev/redoubt/block"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/crossview"
	"redoubt.dev/redoubt/validation/scan"
	"redoubt.dev/redoubt/validation/verdict"
)

// Bounds of what an inspector says.
const (
	mostFindings = 10_000
	mostHidden   = 1000
	mostProblems = 100
	// scanMemory is what the scan of one volume may keep, in bytes: with index and baseline less than the sandbox's limit.
	scanMemory = 256 << 20
)

// What the toolstack lets pass is what can be read here.
var _ [protocol.MaxSeen]byte = [crossview.MaxListing]byte{}

// validation is what an inspector has of a guest's disks.
type validation struct {
	sources []scan.Source
	views   []*block.View
	closers []io.Closer
}

func (v *validation) close() error {
	var err error
	for _, c := range v.closers {
		err = errors.Join(err, c.Close())
	}
	return err
}

// disk takes a disk.
func (v *validation) disk(in protocol.ViewDisk, r *rpc.Request) error {
	files, err := in.Files.Take(r)
	if err != nil {
		return err
	}
	one := func(name string) *os.File {
		if len(files[name]) != 1 {
			return nil
		}
		f := files[name][0]
		delete(files, name)
		return f
	}
	image, base, changes, snapshot := one(protocol.FileDisk), one(protocol.FileBase), one(protocol.FileChanges), one(protocol.FileSnapshot)
	for _, f := range []*os.File{changes, snapshot} {
		if f != nil {
			defer f.Close()
		}
	}
	if len(files) != 0 || image == nil || (changes == nil) != (snapshot == nil) {
		for _, more := range files {
			ipc.CloseAll(more)
		}
		return rpc.Errorf(rpc.Invalid, "inspector: disks[%d]: other descriptors than image, base, changes and snapshot", in.Index)
	}
	img, err := block.NewReader(image, base)
	if err != nil {
		return fmt.Errorf("disks[%d]: %w", in.Index, err)
	}
	s := scan.Source{Disk: in.Index, Reader: img, Size: img.Size(), Changed: &scan.Changes{Granule: 1 << 30}}
	if snapshot == nil { // nobody can write it
		s.Changed.Bits = make([]uint64, (img.Size()>>30+64)/64)
		v.closers = append(v.closers, img)
		v.sources = append(v.sources, s)
		return nil
	}
	view, err := block.NewView(img, snapshot, in.Scratch)
	if err != nil {
		return fmt.Errorf("disks[%d]: %w", in.Index, err)
	}
	v.closers = append(v.closers, view)
	v.views = append(v.views, view)
	s.Reader = view
	if s.Changed.Granule, s.Changed.Bits, err = block.Frozen(changes, img.Size()); err != nil {
		return fmt.Errorf("disks[%d]: %w", in.Index, err)
	}
	v.sources = append(v.sources, s)
	return nil
}

// lost reports whether the guest has changed more meanwhile than there was room for.
func (v *validation) lost() bool {
	for _, s := range v.views {
		if s.Lost() {
			return true
		}
	}
	return false
}

// given are what a scan was given beside the disks.
type given struct {
	index, last, baseline, rules, seen []byte
	newIndex, answer                   *os.File
}

// mostText bounds a baseline, rules or a comparison, in bytes.
const mostText = baseline.MaxFile

func take(in protocol.Scan, r *rpc.Request) (g given, err error) {
	files, err := in.Files.Take(r)
	if err != nil {
		return g, err
	}
	seen := 0
	if in.Seen != nil {
		seen = in.Seen.Size
	}
	for name, into := range map[string]struct {
		to         *[]byte
		size, most int
	}{
		protocol.FileIndex: {&g.index, in.Index, protocol.MaxIndex}, protocol.FileLast: {&g.last, in.Last, protocol.MaxAnswer},
		protocol.FileBaseline: {&g.baseline, in.Baseline, mostText}, protocol.FileRules: {&g.rules, in.Rules, baseline.MaxRulesFile},
		protocol.FileSeen: {&g.seen, seen, crossview.MaxListing},
	} {
		if len(files[name]) == 0 {
			continue
		}
		if len(files[name]) != 1 || into.size < 0 || into.size > into.most {
			return g, rpc.Errorf(rpc.Invalid, "inspector: %d descriptors of %s, of %d bytes", len(files[name]), name, into.size)
		}
		*into.to = make([]byte, into.size)
		if _, err := files[name][0].ReadAt(*into.to, 0); err != nil && into.size > 0 {
			return g, fmt.Errorf("%s: %w", name, err)
		}
	}
	if len(files[protocol.FileNewIndex]) != 1 || len(files[protocol.FileAnswer]) != 1 {
		return g, rpc.Errorf(rpc.Invalid, "inspector: nowhere to put an answer")
	}
	g.newIndex, g.answer = files[protocol.FileNewIndex][0], files[protocol.FileAnswer][0]
	return g, nil
}

// scan reads the disks and answers.
func (v *validation) scan(ctx context.Context, in protocol.Scan, r *rpc.Request) (out protocol.Scanned, err error) {
	g, err := take(in, r)
	if err != nil {
		return out, err
	}
	rules := baseline.DefaultRules()
	var base *baseline.Baseline
	if g.baseline != nil {
		if base, err = baseline.Open(g.baseline); err != nil {
			return out, rpc.Errorf(rpc.Invalid, "%v", err)
		}
		rules = base.Rules
	}
	if g.rules != nil {
		if rules, err = baseline.ParseRules(g.rules); err != nil {
			return out, rpc.Errorf(rpc.Invalid, "rules: %v", err)
		}
	}
	var last *scan.Index
	if in.Changed && g.index != nil {
		if last, err = scan.Open(g.index); err != nil {
			out.Why = err.Error()
		}
	}
	if last == nil {
		for i := range v.sources {
			v.sources[i].Changed = nil
		}
	}
	found, err := scan.Run(ctx, v.sources, rules.Digest(), rules, last, scan.Options{MaxMemory: scanMemory, Workers: runtime.NumCPU()})
	if v.lost() {
		return out, rpc.Errorf(rpc.Unavailable, "%v: give validation.scratch more", block.ErrSnapshotLost)
	}
	if err != nil {
		return out, err
	}
	out.Full, out.Names, out.Read, out.Bytes = found.Full, found.Stats.Names, int(found.Stats.Files), found.Stats.Bytes
	if out.Why == "" {
		out.Why = found.Why
	}
	if in.Draft {
		err = draft(in, g, base, rules, found, &out)
	} else {
		var hidden *crossview.Result
		if in.Seen != nil {
			hidden, err = v.hidden(ctx, in.Seen, g.seen, rules)
		}
		if err == nil {
			err = compare(g, base, found, last != nil, hidden, &out)
		}
	}
	if v.lost() { // nothing of it is right, then
		return out, rpc.Errorf(rpc.Unavailable, "%v: give validation.scratch more", block.ErrSnapshotLost)
	}
	if err != nil {
		return out, err
	}
	b := found.Index.Bytes()
	if len(b) > protocol.MaxIndex {
		return out, nil // the next scan is in full
	}
	_, err = g.newIndex.WriteAt(b, 0)
	out.Index = len(b)
	return out, err
}

func put(into *os.File, b []byte, out *protocol.Scanned, most int) error {
	if len(b) > most {
		return rpc.Errorf(rpc.Unavailable, "an answer of %d bytes: the most is %d", len(b), most)
	}
	_, err := into.WriteAt(b, 0)
	out.Answer = len(b)
	return err
}

// compare answers with what deviates. What the last scan's comparison says of files that nobody touched stays true.
func compare(g given, base *baseline.Baseline, found *scan.Result, incremental bool, hidden *crossview.Result, out *protocol.Scanned) error {
	if base == nil {
		return rpc.Errorf(rpc.Invalid, "inspector: nothing to compare with")
	}
	problems := make([]baseline.Problem, len(found.Problems))
	for i, p := range found.Problems {
		problems[i] = baseline.Problem{Name: p.Name, Text: p.Err.Error()}
	}
	var last *baseline.Comparison
	if incremental && g.last != nil {
		last = &baseline.Comparison{}
		if err := json.Unmarshal(g.last, last); err != nil {
			last = nil
		}
	}
	var c baseline.Comparison
	err := baseline.ErrIncomplete
	if last != nil {
		c, err = baseline.CompareTouched(base, found.Touched, found.Index.Lookup, problems, *last, mostFindings)
	}
	if errors.Is(err, baseline.ErrIncomplete) {
		c, err = baseline.Compare(base, found.Index.All(), problems, mostFindings)
	}
	if err != nil {
		return err
	}
	b, err := json.Marshal(verdict.Compared{Comparison: c, Hidden: hidden})
	if err != nil {
		return err
	}
	return put(g.answer, b, out, protocol.MaxAnswer)
}

// hidden finds what a listing does not show.
func (v *validation) hidden(ctx context.Context, seen *protocol.Seen, listing []byte, rules *baseline.Rules) (*crossview.Result, error) {
	l, err := crossview.Parse(listing)
	if err != nil {
		return nil, rpc.Errorf(rpc.Invalid, "%v", err)
	}
	fs, name, err := scan.OpenExt(v.sources, seen.Volume, scan.Options{MaxMemory: scanMemory})
	if err != nil {
		return nil, rpc.Errorf(rpc.Invalid, "what the guest shows is held to its root's volume: %v", err)
	}
	r, err := crossview.Compare(ctx, fs, crossview.Options{
		Volume: name, Listing: l, Rules: rules, Begun: seen.Begun, Taken: seen.Taken, Most: mostHidden,
	})
	return &r, err
}

// draft answers with the text of the next baseline.
func draft(in protocol.Scan, g given, base *baseline.Baseline, rules *baseline.Rules, found *scan.Result, out *protocol.Scanned) error {
	var text bytes.Buffer
	h := baseline.Header{Guest: in.Guest, Version: 1, Created: in.Created, Rules: rules}
	if base != nil {
		h = base.Next(in.Created)
		h.Rules = rules
	}
	var err error
	if base != nil && len(in.Accept) > 0 {
		var names []baseline.Name
		for _, s := range in.Accept {
			n, err := baseline.ParseName(s)
			if err != nil {
				return rpc.Errorf(rpc.Invalid, "%v", err)
			}
			names = append(names, n)
		}
		err = baseline.Accept(&text, base, names, found.Index.Lookup, in.Created)
	} else {
		err = baseline.Write(&text, h, rules.Kept(found.Index.All()))
	}
	if err != nil {
		return err
	}
	for _, p := range found.Problems {
		if len(out.Problems) < mostProblems {
			out.Problems = append(out.Problems, fmt.Sprintf("%v: %.200v", p.Name, p.Err))
		}
	}
	b, err := baseline.Open(text.Bytes())
	if err != nil {
		return err
	}
	out.Entries, out.Version = b.Len(), b.Version
	return put(g.answer, text.Bytes(), out, protocol.MaxAnswer)
}
