package scan

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/ext4"
	files "redoubt.dev/redoubt/validation/volume"
)

// A record is what is known of an inode now.
type record struct {
	fact
	number, flags, generation uint32
	state                     uint16
	extents                   []extent
	err                       error // why something of it is bad
	fresh                     bool  // contents, map or what decides how they are read may differ
}

func (r *record) isDir() bool { return r.mode&unix.S_IFMT == unix.S_IFDIR }

// An extent is where something of a file lies, in blocks.
type extent struct {
	logical, count uint32 // in the file
	place          uint64 // on the device
	kind           ext4.Kind
}

const (
	maxExtents  = 2048 // of an inode; of more none are kept
	recordBytes = 400  // that a record takes, about, with its name
)

// record decodes that of the last index.
func (v *volume) record(i int) *record {
	in, le := v.inode(i), binary.LittleEndian
	r := &record{number: in.number(), flags: in.flags(), generation: in.generation(), state: in.state()}
	r.fact = fact{
		mode: in.mode(), uid: le.Uint32(in[8:]), gid: le.Uint32(in[12:]), links: le.Uint32(in[16:]), size: in.size(), digest: baseline.Digest(in[40:72]),
	}
	off, length := in.rest()
	r.target, r.xattrs, _ = parseRest(v.rest[off:][:length])
	first, count := in.extents()
	for k := first; k < first+count; k++ {
		r.extents = append(r.extents, v.extent(k))
	}
	return r
}

func (v *volume) extent(k uint32) extent {
	le, b := binary.LittleEndian, v.extents[int(k)*extentSize:][:extentSize]
	place := le.Uint64(b[8:])
	return extent{le.Uint32(b), le.Uint32(b[4:]), place & (1<<56 - 1), ext4.Kind(place >> 56)}
}

func appendExtent(b []byte, e extent) []byte {
	b = binary.LittleEndian.AppendUint32(b, e.logical)
	b = binary.LittleEndian.AppendUint32(b, e.count)
	return binary.LittleEndian.AppendUint64(b, e.place|uint64(e.kind)<<56)
}

func appendInode(b []byte, r *record, extents, rest, restLength uint32) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, r.number)
	b = le.AppendUint16(b, uint16(r.mode))
	b = le.AppendUint16(b, r.state)
	for _, v := range []uint32{r.uid, r.gid, r.links, r.flags, r.generation, 0} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint64(b, uint64(r.size))
	b = append(b, r.digest[:]...)
	for _, v := range []uint32{extents, uint32(len(r.extents)), rest, restLength} {
		b = le.AppendUint32(b, v)
	}
	return b
}

// A reader reads inodes and contents, for one goroutine.
type reader struct {
	u      *update
	inodes *ext4.InodeReader
	buf    []byte
	sum    hash.Hash
}

func (u *update) newReader() *reader {
	return &reader{u: u, inodes: u.fs.InodeReader(), buf: make([]byte, 256<<10), sum: sha256.New()}
}

// errNoFile says that a name leads to an inode that is none.
var errNoFile = errors.New("a name leads to it, and it is no file")

// load reads what an inode says of itself; near: after those that were read before, as in a full scan.
func (r *reader) load(n uint32, near bool) (*record, *ext4.Inode, error) {
	in, err := r.inode(n, near)
	if err != nil {
		return nil, nil, err
	}
	r.u.run.inodes.Add(1)
	rec := &record{number: n, flags: in.Flags, generation: in.Generation}
	rec.fact = fact{mode: in.Mode, uid: in.UID, gid: in.GID, links: in.Links, size: in.Size}
	if in.InlineData() {
		rec.state |= isInline
	}
	switch in.Type() {
	case unix.S_IFLNK:
		if rec.target, err = in.Readlink(); err != nil || len(rec.target) > maxPath {
			rec.target = ""
			rec.fail(badTarget, cmpErr(err, ErrEffort))
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		major, minor := in.Device()
		binary.LittleEndian.PutUint32(rec.digest[:], major)
		binary.LittleEndian.PutUint32(rec.digest[4:], minor)
	}
	r.places(rec, in)
	return rec, in, nil
}

func (r *reader) inode(n uint32, near bool) (*ext4.Inode, error) {
	if near {
		return r.inodes.Inode(n)
	}
	return r.u.fs.Inode(n)
}

func cmpErr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

func (r *record) fail(state uint16, err error) {
	r.state |= state
	if r.err == nil {
		r.err = err
	}
}

// places finds where the inode's tree, attributes and contents lie. If they cannot be told, or are too many, any change may be one.
func (r *reader) places(rec *record, in *ext4.Inode) {
	bs := r.u.blockSize
	own := in.Offset() / bs * bs
	steps := 0
	for e, err := range in.Extents() {
		if steps++; err != nil || steps > maxExtents || r.u.extents.Add(-1) < 0 {
			rec.state |= unmapped
			rec.extents = nil
			return
		}
		if e.Kind == ext4.Hole || e.Kind == ext4.Metadata && e.Offset == own {
			continue
		}
		x := extent{logical: uint32(max(0, e.Logical) / bs), place: uint64(e.Offset / bs), kind: e.Kind}
		for left := uint64(e.Length / bs); left > 0; { // as long as a record can be
			n := min(left, 1<<31)
			x.count = uint32(n)
			rec.extents = append(rec.extents, x)
			x.logical, x.place, left = x.logical+x.count, x.place+n, left-n
		}
	}
}

// fill reads of an inode what is wanted and not known yet; in may be nil.
func (r *reader) fill(rec *record, in *ext4.Inode, want baseline.Want) error {
	content := want&baseline.Content != 0 && rec.mode&unix.S_IFMT == unix.S_IFREG && rec.state&(hasDigest|badDigest) == 0
	xattrs := want&baseline.Xattrs != 0 && rec.state&(hasXattrs|badXattrs) == 0
	if !content && !xattrs {
		return r.u.run.ctx.Err()
	}
	if in == nil {
		var err error
		if in, err = r.u.fs.Inode(rec.number); err != nil {
			return err
		}
	}
	if xattrs {
		r.u.attributes(rec, in)
	}
	if content {
		if err := r.content(rec, in); err != nil {
			rec.fail(badDigest, err)
		} else {
			rec.state |= hasDigest
		}
	}
	return r.u.run.ctx.Err()
}

// attributes reads those of a record that a baseline has.
func (u *update) attributes(rec *record, in *ext4.Inode) {
	all, err := in.Xattrs()
	if err == nil {
		rec.xattrs, err = u.telling(all)
	}
	if err != nil {
		rec.fail(badXattrs, err)
	} else {
		rec.state |= hasXattrs
	}
}

// telling takes those attributes that a baseline has, and counts all that were read.
func (u *update) telling(all []files.Xattr) (some []baseline.Xattr, err error) {
	read, kept := int64(0), int64(0)
	for _, x := range all {
		read += int64(len(x.Value))
		if !baseline.Telling(x.Name) || len(x.Name) > 255 {
			continue
		}
		kept += int64(len(x.Value)) + 64
		some = append(some, baseline.Xattr{Name: x.Name, Value: string(x.Value)})
	}
	slices.SortFunc(some, func(a, b baseline.Xattr) int { return strings.Compare(a.Name, b.Name) })
	if u.run.left.Add(-read) < 0 {
		return nil, fmt.Errorf("%w: %d bytes of attributes", ErrEffort, read)
	}
	if err := u.need(kept); err != nil {
		return nil, err
	}
	return some, nil
}

func (r *reader) content(rec *record, in *ext4.Inode) error {
	file, err := in.Open()
	if err != nil {
		return err
	}
	rec.digest, err = r.hash(file, rec.size)
	return err
}

// hash hashes contents, if they are not too many. Of holes nothing is read.
func (r *reader) hash(file io.ReaderAt, size int64) (d baseline.Digest, err error) {
	o := &r.u.run.o
	if most := o.MaxFile; size > most && most > 0 || most <= 0 && size > r.u.size {
		return d, fmt.Errorf("%w: a file of %d bytes", ErrEffort, size)
	}
	if r.u.run.left.Add(-size) < 0 {
		r.u.run.left.Add(size)
		return d, fmt.Errorf("%w: a file of %d bytes, after others of %d", ErrEffort, size, r.u.run.hashed.Load())
	}
	if d, err = r.digest(r.u.run.ctx, file, size); err == nil {
		r.u.run.files.Add(1)
		r.u.run.hashed.Add(size)
	}
	return d, err
}

func (r *reader) digest(ctx context.Context, file io.ReaderAt, size int64) (d baseline.Digest, err error) {
	if size <= int64(len(r.buf)) {
		if err := readAll(file, r.buf[:size], 0); err != nil {
			return d, err
		}
		return sha256.Sum256(r.buf[:size]), nil
	}
	r.sum.Reset()
	for off := int64(0); off < size; off += int64(len(r.buf)) {
		if err := ctx.Err(); err != nil {
			return d, err
		}
		piece := r.buf[:min(int64(len(r.buf)), size-off)]
		if err := readAll(file, piece, off); err != nil {
			return d, err
		}
		r.sum.Write(piece)
	}
	r.sum.Sum(d[:0])
	return d, nil
}

func readAll(file io.ReaderAt, p []byte, off int64) error {
	if n, err := file.ReadAt(p, off); n < len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}
