package audit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
)

// The head file has one line of fixed length, written in place after each record: killed at any
// moment, the writer leaves the old head or the new one. It may be behind the log, never ahead.
const headFormat = "%020d %s\n"

const headSize = 20 + 1 + 64 + 1

// errEmptyHead is the head file before the log's first record is complete, or damage.
var errEmptyHead = errors.New("is empty")

// Line is a head as text of fixed length with a newline, for a file that is written in place.
func (h Head) Line() []byte { return fmt.Appendf(nil, headFormat, h.Seq, h.Hash) }

// ParseHead is the inverse of Line.
func ParseHead(b []byte) (h Head, err error) {
	if len(b) != headSize {
		return h, fmt.Errorf("%d bytes, not %d", len(b), headSize)
	}
	if h.Seq, err = strconv.ParseUint(string(b[:20]), 10, 64); err != nil {
		return h, err
	}
	if err := h.Hash.UnmarshalText(b[21 : headSize-1]); err != nil {
		return h, err
	}
	if string(h.Line()) != string(b) {
		return h, fmt.Errorf("not as it was written")
	}
	return h, nil
}

func readHead(dir string) (Head, error) {
	f, err := os.Open(filepath.Join(dir, headFile))
	if err != nil {
		return Head{}, err
	}
	defer f.Close()
	b := make([]byte, headSize+1)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Head{}, err
	}
	if n == 0 {
		return Head{}, errEmptyHead
	}
	return ParseHead(b[:n])
}
