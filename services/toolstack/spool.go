package toolstack

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxLog bounds a console's log file; a guest that prints for ever fills no disk.
const maxLog = 16 << 20

// A spool brings what a guest prints into its console's log, by way of a pipe. Whenever this process is
// killed, each byte comes to the log once: the kernel moves it (splice(2)) from the socket into the pipe and from there
// into the file, whose offset moves along. The Builder keeps all three, and the next toolstack goes on. Where the log takes no
// more, at maxLog or on a full disk, what is printed is shown and not logged.
type spool struct {
	socket syscall.RawConn
	log    *os.File
	pipe   [2]*os.File // its ends to read and to write; neither blocks
	r, w   int         // their descriptors
	logFD  int
	logged int64 // the log's offset, and its size
}

// newSpool takes the files over, and not the console's end.
func newSpool(console *net.UnixConn, log *os.File, pipe [2]*os.File) (*spool, error) {
	s := &spool{log: log, pipe: pipe}
	socket, err := console.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.socket = socket
	for _, f := range []struct {
		file *os.File
		fd   *int
	}{{log, &s.logFD}, {pipe[0], &s.r}, {pipe[1], &s.w}} {
		c, err := f.file.SyscallConn()
		if err == nil {
			err = c.Control(func(fd uintptr) { *f.fd = int(fd) }) // (*os.File).Fd would make it block
		}
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	if s.logged, err = log.Seek(0, io.SeekCurrent); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close closes the files.
func (s *spool) Close() error {
	return errors.Join(s.log.Close(), s.pipe[0].Close(), s.pipe[1].Close())
}

// tail is the end of what the log holds already.
func (s *spool) tail() []byte {
	from := max(0, s.logged-scrollback)
	b := make([]byte, s.logged-from)
	n, _ := s.log.ReadAt(b, from) // what cannot be read is not shown
	return b[:n]
}

// next waits until the guest prints, logs that and says it.
func (s *spool) next(buf []byte) (int, error) {
	for {
		if n, err := s.drain(buf); n > 0 || err != nil {
			return n, err
		}
		if err := s.fill(len(buf)); err != nil {
			return 0, err
		}
	}
}

// fill waits for the guest and takes what it printed into the pipe.
func (s *spool) fill(most int) error {
	var n int
	var err error
	if rerr := s.socket.Read(func(fd uintptr) bool {
		n, err = splice(int(fd), s.w, most)
		return !errors.Is(err, unix.EAGAIN)
	}); rerr != nil {
		return rerr
	}
	if err == nil && n == 0 {
		return io.EOF
	}
	return err
}

// drain logs what the pipe holds, which may be nothing.
func (s *spool) drain(buf []byte) (int, error) {
	if room := min(int64(len(buf)), maxLog-s.logged); room > 0 {
		n, err := splice(s.r, s.logFD, int(room))
		switch {
		case n > 0:
			n, _ = s.log.ReadAt(buf[:n], s.logged)
			s.logged += int64(n)
			return n, nil
		case errors.Is(err, unix.EAGAIN):
			return 0, nil
		}
	}
	n, err := unix.Read(s.r, buf)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return 0, nil
	}
	return max(n, 0), err
}

// splice moves n bytes at most without waiting for any.
func splice(from, to, n int) (int, error) {
	for {
		moved, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_NONBLOCK)
		if !errors.Is(err, unix.EINTR) {
			return int(max(moved, 0)), err
		}
	}
}
