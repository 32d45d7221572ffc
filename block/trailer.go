package block

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// An overlay's file is longer than its disk by three blocks: a hole, the trailer, and another hole.
// The trailer says which base the overlay was made for; in the file itself it cannot be lost or
// mixed up, and no file system has to keep attributes. The holes around it tell at every open
// whether holes still are what they were: a file system that tells of none, or a copy that filled
// them, would hide the base behind zeros. And it tells which inode is the overlay: cp and others make
// holes of zeros, so that in a copy the base would come through where the guest had written zeros.
const (
	trailerBlocks = 3
	trailerMagic  = "REDOUBT OVERLAY1"
	trailerSize   = 16 + 4*8 + sha256.Size
)

var (
	// ErrBase says that an overlay was made for another base, or for this one before it changed.
	ErrBase = errors.New("not the base that the overlay was made for")
	// ErrNoOverlay says that a file was not made by CreateOverlay.
	ErrNoOverlay = errors.New("not an overlay: make one with redoubt disk create --base")
	// ErrCopied says that an overlay was copied by something that may have made holes of zeros.
	ErrCopied = errors.New("a copy, whose zeros may be holes now that show the base: copy the original with redoubt disk copy")

	errHoles = errors.New("the file system does not keep holes of 4 KiB, or a copy filled them: an overlay needs them")
)

// A record is what an overlay knows of its base, and of itself. A base that was copied with its times
// kept, to another host too, is still the same, so that its inode is not part of it.
type record struct {
	base  baseRecord
	inode uint64 // the overlay's own
}

type baseRecord struct {
	size       int64
	sec, nanos int64 // of its last change
}

func recordOf(st fs.FileInfo) baseRecord {
	return baseRecord{st.Size(), st.ModTime().Unix(), int64(st.ModTime().Nanosecond())}
}

func inodeOf(f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

func (r record) append(b []byte) []byte {
	n := len(b)
	b = append(b, trailerMagic...)
	for _, v := range []uint64{uint64(r.base.size), uint64(r.base.sec), uint64(r.base.nanos), r.inode} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	sum := sha256.Sum256(b[n:])
	return append(b, sum[:]...)
}

// parseRecord reads what append made.
func parseRecord(b []byte) (r record, err error) {
	if len(b) < trailerSize || string(b[:16]) != trailerMagic {
		return r, ErrNoOverlay
	}
	if sum := sha256.Sum256(b[:trailerSize-sha256.Size]); [sha256.Size]byte(b[trailerSize-sha256.Size:trailerSize]) != sum {
		return r, errors.New("its trailer is damaged")
	}
	r.base.size = int64(binary.LittleEndian.Uint64(b[16:]))
	r.base.sec = int64(binary.LittleEndian.Uint64(b[24:]))
	r.base.nanos = int64(binary.LittleEndian.Uint64(b[32:]))
	r.inode = binary.LittleEndian.Uint64(b[40:])
	return r, nil
}

// readRecord reads the record of an overlay's file of that size.
func readRecord(f *os.File, size int64) (record, error) {
	if size < trailerBlocks*OverlayBlock || size%OverlayBlock != 0 {
		return record{}, ErrNoOverlay
	}
	b := make([]byte, trailerSize)
	if _, err := f.ReadAt(b, size-2*OverlayBlock); err != nil {
		return record{}, err
	}
	return parseRecord(b)
}

// checkTrailer holds an overlay's file of that size to its base.
func checkTrailer(f *os.File, size int64, base baseRecord) error {
	r, err := checkSelf(f, size, false)
	switch {
	case err != nil:
		return err
	case r.base.size != base.size:
		return fmt.Errorf("%w: that had %d bytes, this has %d", ErrBase, r.base.size, base.size)
	case r.base != base:
		return fmt.Errorf("%w: it was changed since, or copied without its times (cp -p)", ErrBase)
	}
	return nil
}

// checkSelf says whether a file of that size is an overlay, whole and the one that was made; or, if
// adopt says so, a copy of it.
func checkSelf(f *os.File, size int64, adopt bool) (record, error) {
	r, err := readRecord(f, size)
	if err != nil {
		return r, err
	}
	if size > MaxOverlay+(trailerBlocks+1)*OverlayBlock || r.base.size <= 0 || roundUp(r.base.size) != size-trailerBlocks*OverlayBlock {
		return r, fmt.Errorf("%d bytes for a base of %d: it was cut or grew", size, r.base.size)
	}
	inode, err := inodeOf(f)
	if err != nil {
		return r, err
	}
	// Holes that were filled are told first: no copy of this one will help.
	if err := checkHoles(f, roundUp(r.base.size)); err != nil {
		return r, err
	}
	if inode != r.inode && !adopt {
		return r, ErrCopied
	}
	return r, nil
}

// checkHoles: of the three blocks at off the second is data, and it alone.
func checkHoles(f *os.File, off int64) error {
	for _, c := range []struct {
		whence     int
		from, want int64
	}{
		{unix.SEEK_HOLE, off, off},
		{unix.SEEK_DATA, off, off + OverlayBlock},
		{unix.SEEK_HOLE, off + OverlayBlock, off + 2*OverlayBlock},
	} {
		if at, err := unix.Seek(int(f.Fd()), c.from, c.whence); err != nil || at != c.want {
			return errHoles
		}
	}
	return nil
}

// extents calls do for each stretch of data below end.
func extents(f *os.File, end int64, do func(from, to int64) error) error {
	for at := int64(0); at < end; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && from >= end {
			return nil
		}
		if err != nil {
			return fmt.Errorf("SEEK_DATA: %w", err)
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("SEEK_HOLE: %w", err)
		}
		if to = min(to, end); to <= from {
			return errHoles
		}
		if err := do(from, to); err != nil {
			return err
		}
		at = to
	}
	return nil
}

// CreateOverlay makes an overlay over the image at base, which shows the base's contents until it is
// written and takes no space but one block's; an existing file is refused, and so is a base that
// somebody may write now, or is an overlay itself. From then on the base must not change.
func CreateOverlay(path, base string) (size int64, err error) {
	below, err := Open(base, true)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, below.Close()) }()
	if err := checkOverlaySize(below.size); err != nil {
		return 0, fmt.Errorf("create %s: %w", path, err)
	}
	if _, err := readRecord(below.f, below.size); err == nil {
		return 0, fmt.Errorf("create %s: %s is an overlay itself: a base has none", path, base)
	}
	st, err := below.f.Stat()
	if err != nil {
		return 0, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	err = errors.Join(writeOverlay(context.Background(), f, recordOf(st), nil), f.Close())
	if err != nil {
		return 0, errors.Join(fmt.Errorf("create %s: %w", path, err), os.Remove(path))
	}
	return below.size, nil
}

// CopyOverlay makes a copy of an overlay that nobody writes, over the same base; an existing file is
// refused. With adopt the overlay may itself be a copy that something else made: whoever says so
// knows that it kept zeros and holes apart. Nothing is left of a copy that ctx ended.
func CopyOverlay(ctx context.Context, path, from string, adopt bool) (size int64, err error) {
	top, err := Open(from, true)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, top.Close()) }()
	r, err := checkSelf(top.f, top.size, adopt)
	if err != nil {
		return 0, fmt.Errorf("overlay %s: %w", from, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	err = errors.Join(writeOverlay(ctx, f, r.base, top.f), f.Close())
	if err != nil {
		return 0, errors.Join(fmt.Errorf("create %s: %w", path, err), os.Remove(path))
	}
	return r.base.size, nil
}

// writeOverlay makes an overlay of an empty file, with the blocks of another one if there is one.
func writeOverlay(ctx context.Context, f *os.File, base baseRecord, from *os.File) error {
	inode, err := inodeOf(f)
	if err != nil {
		return err
	}
	end := roundUp(base.size)
	if err := tryHoles(f, end); err != nil {
		return err
	}
	if err := f.Truncate(end + trailerBlocks*OverlayBlock); err != nil {
		return err
	}
	if from != nil {
		buf := make([]byte, 1<<20)
		err := extents(from, end, func(at, to int64) error {
			for ; at < to; at += int64(len(buf)) {
				if err := ctx.Err(); err != nil {
					return err
				}
				p := buf[:min(int64(len(buf)), to-at)]
				if _, err := from.ReadAt(p, at); err != nil {
					return err
				}
				if _, err := f.WriteAt(p, at); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if _, err := f.WriteAt((record{base, inode}).append(nil), end+OverlayBlock); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return checkHoles(f, end)
}

// tryHoles writes a zero where the trailer will be, has it reach the disk, and takes it away again: on
// a file system that makes holes of zeros, a guest that writes zeros would see its base.
func tryHoles(f *os.File, at int64) error {
	if err := f.Truncate(at + trailerBlocks*OverlayBlock); err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte{0}, at+OverlayBlock); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := checkHoles(f, at); err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// EndsAsOverlay says whether a raw image ends as overlays do: by itself such a one would be read as full of holes.
func EndsAsOverlay(r *Raw) bool {
	b := make([]byte, len(trailerMagic))
	at := r.Size() - 2*OverlayBlock
	if at < 0 {
		return false
	}
	_, err := r.ReadAt(b, at)
	return err == nil && string(b) == trailerMagic
}
