package block

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// A Reader is the contents of an image that somebody else may change meanwhile.
type Reader interface {
	io.ReaderAt
	Size() int64
	Close() error
}

// NewReader reads an image, or with a base an overlay, that another process may have open and write: no lock is taken and
// none is minded. It takes the files over and closes them if they are refused. Which blocks are the overlay's is learnt
// here: what is written to others later shows in a [View] only.
func NewReader(image, base *os.File) (Reader, error) {
	top, err := unlocked(image)
	if base == nil {
		if err != nil {
			return nil, err
		}
		return top, nil
	}
	if err != nil {
		return nil, errors.Join(err, base.Close())
	}
	below, err := unlocked(base)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("base: %w", err), top.Close())
	}
	o, err := overlayOf(top, below)
	if err != nil {
		return nil, err
	}
	return o, nil
}

func unlocked(f *os.File) (*Raw, error) {
	r := &Raw{f: f, readOnly: true}
	if err := r.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("image %s: %w", f.Name(), err), f.Close())
	}
	return r, nil
}
