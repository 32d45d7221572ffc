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

// Get has ask bring an answer into memory of its own and say how long it is, and returns what a handler does.
func Get(from string, ask func(into *os.File) (protocol.Answered, error)) (any, error) {
	w, err := memfd.New("answer", protocol.MaxAnswer)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	a, err := ask(w)
	if err != nil {
		return nil, err
	}
	if err := a.Check(); err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	r, err := memfd.ReadOnly(w)
	if err != nil {
		return nil, err
	}
	return rpc.WithFiles{Value: a, Files: []*os.File{r}}, nil
}

// Put writes an answer, JSON and what is raw, into the memory that was given for it. One that is too long is an error.
func Put(into *os.File, text, raw []byte) (protocol.Answered, error) {
	a := protocol.Answered{Size: len(text) + len(raw), Raw: len(raw)}
	if err := a.Check(); err != nil {
		return protocol.Answered{}, rpc.Errorf(rpc.Unavailable, "%v", err)
	}
	_, err := into.WriteAt(text, 0)
	if err == nil && len(raw) > 0 {
		_, err = into.WriteAt(raw, int64(len(text)))
	}
	return a, err
}

// Text is Get of an answer that is there.
func Text(from string, b []byte) (any, error) {
	return Get(from, func(into *os.File) (protocol.Answered, error) { return Put(into, b, nil) })
}

// Read reads an answer that came in files, which stay the caller's.
func Read(files []*os.File, a protocol.Answered) (text, raw []byte, err error) {
	if err := a.Check(); err != nil {
		return nil, nil, err
	}
	if len(files) != 1 {
		return nil, nil, fmt.Errorf("an answer with %d descriptors", len(files))
	}
	b := make([]byte, a.Size)
	if _, err := io.ReadFull(io.NewSectionReader(files[0], 0, int64(a.Size)), b); err != nil {
		return nil, nil, err
	}
	end := a.Size - a.Raw
	return b[:end:end], b[end:], nil
}
