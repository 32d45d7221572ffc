package emulator

import (
	"encoding/binary"
	"fmt"
	"os"

	"redoubt.dev/redoubt/introspect/memory"
	"redoubt.dev/redoubt/ipc"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
)

// A status is a word of a guest's memory in which it says that a write is in progress. It is the guest's own word, and good for
// nothing but to have a better moment taken. A nil one is always 0.
type status struct {
	file   *os.File
	memory *memory.Physical
	at     int64
}

// newStatus is the guest's, nil where its spec names none. All of the word must be the guest's memory.
func newStatus(in protocol.Start, file *os.File) (*status, error) {
	if in.Status == 0 {
		return nil, nil
	}
	own, err := ipc.Duplicate(file) // its machine has the other one
	if err != nil {
		return nil, err
	}
	s := &status{file: own[0], at: int64(in.Status)}
	s.memory, err = memory.New(s.file, in.Memory, memory.Machine(in.Emulator))
	if err == nil && (in.Status%4 != 0 || s.at < 0) {
		err = fmt.Errorf("%#x: %w", in.Status, memory.ErrNone)
	}
	if err == nil {
		_, err = s.read()
	}
	if err != nil {
		s.file.Close()
		return nil, rpc.Errorf(rpc.Invalid, "validation.status: %v: name a word of the guest's memory", err)
	}
	return s, nil
}

// read reads the word. The guest's processors stand still.
func (s *status) read() (uint32, error) {
	if s == nil {
		return 0, nil
	}
	var b [4]byte
	if _, err := s.memory.ReadAt(b[:], s.at); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

func (s *status) close() {
	if s != nil {
		s.file.Close()
	}
}
