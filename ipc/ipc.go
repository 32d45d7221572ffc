// Package ipc is how Redoubt's processes talk to each other: messages with descriptors over
// SOCK_SEQPACKET Unix sockets that were made by one parent and handed to both ends.
//
// A message arrives whole or not at all, in order; a peer's death is io.EOF. No socket has a
// name in the file system and none is shared by two privileges. Whatever arrives is hostile:
// a message over [MaxMessage] or with more than [MaxFiles] descriptors is an error, and
// descriptors of a refused message are closed.
//
// A Conn may be used by any number of goroutines: sends are whole messages; receives are
// serialised by the socket. Close unblocks both.
package ipc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxMessage is the largest message in bytes.
	MaxMessage = 64 << 10
	// MaxFiles is the largest number of descriptors beside one message.
	MaxFiles = 64
)

// ErrTooLarge says that a message or its descriptors exceed the bounds of this package.
var ErrTooLarge = errors.New("ipc: message too large")

// Conn is one end of a connection.
type Conn struct{ c *net.UnixConn }

// Pair makes a connection: one end for this process, the other, as a file, for a child.
// The file is close-on-exec here; os/exec's ExtraFiles hands it on.
func Pair() (*Conn, *os.File, error) {
	a, b, err := pair()
	if err != nil {
		return nil, nil, err
	}
	c, err := FromFile(a)
	if err != nil {
		b.Close()
		return nil, nil, err
	}
	return c, b, nil
}

// Pipe makes a connection with both ends in this process.
func Pipe() (*Conn, *Conn, error) {
	a, f, err := Pair()
	if err != nil {
		return nil, nil, err
	}
	b, err := FromFile(f)
	if err != nil {
		a.Close()
		return nil, nil, err
	}
	return a, b, nil
}

// Files makes a connection with both ends as files, for two children.
func Files() (*os.File, *os.File, error) { return pair() }

// Streams makes a SOCK_STREAM connection, both ends as files, for two children.
func Streams(name string) (*os.File, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: socketpair: %w", name, err)
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// Duplicate makes other descriptors of open files, close-on-exec; none after an error.
func Duplicate(files ...*os.File) (out []*os.File, err error) {
	for _, f := range files {
		fd, err := duplicate(f)
		if err != nil {
			CloseAll(out)
			return nil, err
		}
		out = append(out, os.NewFile(uintptr(fd), f.Name()))
	}
	return out, nil
}

// duplicate makes another descriptor, of a file that nobody closes meanwhile: else it could be another file's by then. The file blocks
// from then on, as whoever is given it expects.
func duplicate(f *os.File) (fd int, err error) {
	f.Fd()
	c, err := f.SyscallConn()
	if err == nil {
		if cerr := c.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
			err = os.ErrClosed
		}
	}
	if err != nil {
		return -1, fmt.Errorf("%s: duplicate: %w", f.Name(), err)
	}
	return fd, nil
}

// OneWay makes a pipe whose ends have deadlines in whatever process they come to: os.Pipe's lose theirs when they are sent.
func OneWay() (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe"), nil
}

// CloseAll closes files.
func CloseAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func pair() (*os.File, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "ipc"), os.NewFile(uintptr(fds[1]), "ipc"), nil
}

// FromFile takes over a descriptor that a parent or a peer handed to this process; f is
// closed in any case.
func FromFile(f *os.File) (*Conn, error) {
	c, err := Socket(f)
	if err != nil {
		return nil, fmt.Errorf("ipc: %w", err)
	}
	return &Conn{c: c}, nil
}

// Socket takes over the descriptor of a Unix socket that speaks another protocol; f is closed in any case.
func Socket(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%s is no Unix socket", f.Name()), c.Close())
	}
	return u, nil
}

// Send sends one message with descriptors, which stay the caller's: they may be closed meanwhile. The error wraps [os.ErrClosed] where one
// was closed before.
func (c *Conn) Send(msg []byte, files ...*os.File) error {
	own := make([]int, 0, len(files))
	defer func() {
		for _, fd := range own {
			unix.Close(fd)
		}
	}()
	for _, f := range files {
		fd, err := duplicate(f)
		if err != nil {
			return err
		}
		own = append(own, fd)
	}
	return c.SendDescriptors(msg, own)
}

// SendDescriptors is Send for who has no use for files.
func (c *Conn) SendDescriptors(msg []byte, fds []int) error {
	if len(msg) == 0 || len(msg) > MaxMessage || len(fds) > MaxFiles {
		return fmt.Errorf("%w: %d bytes, %d descriptors", ErrTooLarge, len(msg), len(fds))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := c.c.WriteMsgUnix(msg, oob, nil)
	return err
}

// Receive waits for one message. The descriptors are the caller's, close-on-exec.
// It returns io.EOF when the peer is gone.
func (c *Conn) Receive() ([]byte, []*os.File, error) {
	buf := buffers.Get().(*[MaxMessage]byte)
	n, files, err := c.ReceiveInto(buf[:])
	if err != nil {
		return nil, nil, err // and the buffer, with whatever is in it, is not used again
	}
	msg := bytes.Clone(buf[:n])
	clear(buf[:n]) // it may be a secret
	buffers.Put(buf)
	return msg, files, nil
}

// buffers are for what is received: messages are short. After a fork each page costs a fault to be
// written again, so memory that is new at each message would make processes dear to start.
var buffers = sync.Pool{New: func() any { return new([MaxMessage]byte) }}

// ReceiveInto is Receive into the caller's buffer; a longer message is an error.
func (c *Conn) ReceiveInto(buf []byte) (int, []*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4*MaxFiles))
	n, oobn, flags, _, err := c.c.ReadMsgUnix(buf, oob)
	if errors.Is(err, unix.ECONNRESET) {
		// The peer closed with messages of ours unread; what it sent before still waits.
		n, oobn, flags, _, err = c.c.ReadMsgUnix(buf, oob)
	}
	if err != nil {
		if errors.Is(err, unix.ECONNRESET) {
			err = io.EOF
		}
		return 0, nil, err
	}
	files, err := parseRights(oob[:oobn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = ErrTooLarge
	}
	if err != nil {
		closeAll(files)
		return 0, nil, err
	}
	if n == 0 { // a zero-length read is how SEQPACKET says the peer closed
		closeAll(files)
		return 0, nil, io.EOF
	}
	return n, files, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("ipc: control message: %w", err)
	}
	var files []*os.File
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("ipc: descriptors: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// SetReadDeadline bounds the next receives; the zero time lifts the bound.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.c.SetReadDeadline(t) }

// SetWriteDeadline bounds the next sends; the zero time lifts the bound.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.c.SetWriteDeadline(t) }

// File duplicates the descriptor, to hand this end to another process.
func (c *Conn) File() (*os.File, error) { return c.c.File() }

// Shutdown ends the connection for everybody who has a copy of this end: the peer sees io.EOF.
func (c *Conn) Shutdown() error { return errors.Join(c.c.CloseWrite(), c.c.CloseRead()) }

// Close ends the connection; the peer sees io.EOF.
func (c *Conn) Close() error { return c.c.Close() }
