package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// conn is a front end's connection.
type conn struct {
	c        *net.UnixConn
	protocol uint64 // features that were agreed on
}

// message is one request with its payload and descriptors.
type message struct {
	header
	payload []byte
	files   []*os.File
}

func (m *message) closeFiles() {
	for _, f := range m.files {
		if f != nil {
			f.Close()
		}
	}
}

// takeFile hands the only descriptor over; nil where there is none.
func (m *message) takeFile() (*os.File, error) {
	if len(m.files) > 1 {
		return nil, fmt.Errorf("%w: %v with %d descriptors", ErrProtocol, m.request, len(m.files))
	}
	if len(m.files) == 0 {
		return nil, nil
	}
	f := m.files[0]
	m.files = nil
	return f, nil
}

// receive reads one message. io.EOF is the end between two messages.
func (c *conn) receive() (_ *message, err error) {
	m := &message{}
	defer func() {
		if err != nil {
			m.closeFiles()
		}
	}()
	var head [headerSize]byte
	if err := c.fill(m, head[:], true); err != nil {
		return nil, err
	}
	if m.header, err = parseHeader(head[:]); err != nil {
		return nil, err
	}
	m.payload = make([]byte, m.size)
	return m, c.fill(m, m.payload, false)
}

// fill reads len(b) bytes and whatever descriptors come with them.
func (c *conn) fill(m *message, b []byte, first bool) error {
	oob := make([]byte, unix.CmsgSpace(4*maxRegions))
	for n := 0; n < len(b); {
		got, oobn, flags, _, err := c.c.ReadMsgUnix(b[n:], oob)
		files, ferr := descriptors(oob[:oobn])
		m.files = append(m.files, files...)
		switch {
		case err != nil && !errors.Is(err, io.EOF):
			return err
		case ferr != nil:
			return ferr
		case flags&unix.MSG_CTRUNC != 0 || len(m.files) > maxRegions:
			return fmt.Errorf("%w: more than %d descriptors", ErrProtocol, maxRegions)
		case got == 0 && first && n == 0:
			return io.EOF
		case got == 0:
			return io.ErrUnexpectedEOF
		}
		n += got
	}
	return nil
}

func descriptors(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: control message: %w", ErrProtocol, err)
	}
	var files []*os.File
	for i := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // credentials and the like carry nothing that must be closed
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "vhost-user"))
		}
	}
	return files, nil
}

// loop carries out requests until the front end ends the connection or breaks a rule.
func (c *conn) loop(perform func(*message) ([]byte, error)) error {
	for {
		m, err := c.receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		answer, err := perform(m)
		m.closeFiles()
		if err = c.answer(m, answer, err); err != nil {
			return err
		}
	}
}

// errUnsupported refuses one request without ending the session.
var errUnsupported = errors.New("vhost-user: not supported")

// answer sends a request's own answer, or the acknowledgement that the front end asked for.
func (c *conn) answer(m *message, payload []byte, err error) error {
	var send []byte
	switch {
	case payload != nil:
		send = reply(m.request, payload)
	case m.flags&flagNeedAck != 0 && c.protocol&protoAck != 0:
		code := uint64(0)
		if err != nil {
			code = 1
		}
		send = reply(m.request, u64(code))
	}
	if send != nil {
		if _, werr := c.c.Write(send); werr != nil {
			return errors.Join(err, werr)
		}
	}
	if errors.Is(err, errUnsupported) {
		return nil
	}
	return err
}

// agree takes in the protocol features that the front end chose from those offered.
func (c *conn) agree(m *message, offered uint64) error {
	v, err := parseU64(m.payload)
	if err != nil {
		return err
	}
	if v&^offered != 0 {
		return fmt.Errorf("%w: protocol features %#x of %#x", ErrProtocol, v, offered)
	}
	c.protocol = v
	return nil
}

// config answers GET_CONFIG with what read gives.
func config(m *message, read func(offset uint64, p []byte)) ([]byte, error) {
	offset, size, err := parseConfig(m.payload)
	if err != nil {
		return nil, err
	}
	answer := append([]byte(nil), m.payload...)
	clear(answer[configHead:])
	read(uint64(offset), answer[configHead:configHead+size])
	return answer, nil
}
