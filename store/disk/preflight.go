package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The fields of a bbolt file that are read before bbolt is let at it: each of the first two
// pages has a page header and then a root record that ends in its own checksum.
const (
	pageHeader  = 16
	metaSize    = 64
	offMagic    = 0
	offPageSize = 8
	offPages    = 40
	offSum      = 56
	boltMagic   = 0xED0CDAED
)

// preflight refuses a file whose two roots are not both whole, where bbolt would take the older
// one without a word, and a file shorter than the pages they speak of, where it would fault.
func preflight(dir *os.File) error {
	fd, err := unix.Openat(int(dir.Fd()), File, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), File)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	pageSize := os.Getpagesize()
	for i := range 2 {
		b := make([]byte, pageHeader+metaSize)
		if n, err := f.ReadAt(b, int64(i*pageSize)); err != nil {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("cut off at offset %d", i*pageSize+n)
			}
			return err
		}
		m := b[pageHeader:]
		s := fnv.New64a()
		_, _ = s.Write(m[:offSum])
		if binary.LittleEndian.Uint32(m[offMagic:]) != boltMagic || binary.LittleEndian.Uint64(m[offSum:]) != s.Sum64() {
			return fmt.Errorf("no whole root at offset %d", i*pageSize+pageHeader)
		}
		if n := binary.LittleEndian.Uint32(m[offPageSize:]); int(n) != pageSize {
			return fmt.Errorf("pages of %d bytes, here they have %d", n, pageSize)
		}
		if n := binary.LittleEndian.Uint64(m[offPages:]); n > uint64(st.Size())/uint64(pageSize) {
			return fmt.Errorf("%d bytes, too few for %d pages", st.Size(), n)
		}
	}
	return nil
}
