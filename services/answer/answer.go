// Package answer carries answers that no message holds: who asks gives memory of protocol.MaxAnswer bytes, who answers writes
// into it and says how much, and it is handed on so that it can only be read. What an answer says is nothing to those who
// carry it.
package answer

import (
	"fmt"
	"io"
	"os"

	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/memfd"
	"redoubt.dev/redoubt/services/protocol"
)

// Get has ask bring an answer into memory of its own and say how many bytes it has, and returns what a handler does.
func Get(from string, ask func(into *os.File) (size int, err error)) (any, error) {
	w, err := memfd.New("answer", protocol.MaxAnswer)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	size, err := ask(w)
	if err != nil {
		return nil, err
	}
	if size < 0 || size > protocol.MaxAnswer {
		return nil, fmt.Errorf("%s: an answer of %d bytes", from, size)
	}
	r, err := memfd.ReadOnly(w)
	if err != nil {
		return nil, err
	}
	return rpc.WithFiles{Value: protocol.Answered{Size: size}, Files: []*os.File{r}}, nil
}

// Put writes an answer into the memory that was given for it. One that is too long is an error.
func Put(into *os.File, b []byte) (protocol.Answered, error) {
	if len(b) > protocol.MaxAnswer {
		return protocol.Answered{}, rpc.Errorf(rpc.Unavailable, "an answer of %d bytes: the most is %d", len(b), protocol.MaxAnswer)
	}
	_, err := into.WriteAt(b, 0)
	return protocol.Answered{Size: len(b)}, err
}

// Read reads an answer that came in files, which stay the caller's.
func Read(files []*os.File, a protocol.Answered) ([]byte, error) {
	if len(files) != 1 || a.Size < 0 || a.Size > protocol.MaxAnswer {
		return nil, fmt.Errorf("%d descriptors, an answer of %d bytes", len(files), a.Size)
	}
	b := make([]byte, a.Size)
	_, err := io.ReadFull(io.NewSectionReader(files[0], 0, int64(a.Size)), b)
	return b, err
}
