package fdstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/ipc"
)

// Held is the keeper's end: what is kept.
type Held struct{ entries map[string]held }

// A held entry has bare descriptors: the runtime would watch files.
type held struct {
	body json.RawMessage
	fds  []int
}

func (e held) close() {
	for _, fd := range e.fds {
		_ = unix.Close(fd)
	}
}

// NewHeld keeps nothing yet.
func NewHeld() *Held { return &Held{map[string]held{}} }

// Len is how many entries there are.
func (h *Held) Len() int { return len(h.entries) }

// Close forgets all.
func (h *Held) Close() {
	for name, e := range h.entries {
		e.close()
		delete(h.entries, name)
	}
}

// Serve gives all that is kept to who is at the other end, and then keeps for it until it is gone: all
// that it has sent is kept then. It closes the connection. An error says that the other end does not
// keep to the protocol.
func (h *Held) Serve(c *ipc.Conn, generation uint64) error {
	defer c.Close()
	send := func(m message, fds []int) error {
		text, err := json.Marshal(m)
		if err != nil {
			return err
		}
		return c.SendDescriptors(text, fds)
	}
	for _, name := range slices.Sorted(maps.Keys(h.entries)) {
		e := h.entries[name]
		if err := send(message{Op: entry, Name: name, Body: e.body}, e.fds); err != nil {
			return nil //nolint:nilerr // it is gone
		}
	}
	if err := send(message{Op: whole, Generation: generation}, nil); err != nil {
		return nil //nolint:nilerr // the same
	}
	for {
		m, files, err := receive(c)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		fds, err := bare(files)
		if err != nil {
			return err
		}
		if m.Op == ask && len(fds) == 0 {
			if err := send(message{Op: done}, nil); err != nil {
				return nil //nolint:nilerr // it is gone
			}
			continue
		}
		if err := h.apply(m, fds); err != nil {
			held{fds: fds}.close()
			return err
		}
	}
}

// bare are descriptors of files, which are closed.
func bare(files []*os.File) (fds []int, err error) {
	defer ipc.CloseAll(files)
	for _, f := range files {
		c, err := f.SyscallConn()
		if err != nil {
			return fds, err
		}
		fd := -1
		if cerr := c.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
			err = cerr
		}
		if err != nil {
			held{fds: fds}.close()
			return nil, fmt.Errorf("fdstore: %w", err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// apply carries out a change.
func (h *Held) apply(m message, fds []int) error {
	last, had := h.entries[m.Name]
	switch {
	case m.Op == put:
		last.close()
		h.entries[m.Name] = held{m.Body, fds}
	case m.Op == note && had && len(fds) == 0:
		last.body = m.Body
		h.entries[m.Name] = last
	case m.Op == drop && len(fds) == 0:
		last.close()
		delete(h.entries, m.Name)
	default:
		return fmt.Errorf("fdstore: %s of %q with %d descriptors", m.Op, m.Name, len(fds))
	}
	return nil
}
